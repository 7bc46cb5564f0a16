"""The pipeline schedules of the literature, by name.

  table = schedules.make('interleaved', num_stages=4, num_microbatches=8)

With S stages, M >= S microbatches, v chunks and F = B = W = 1, of which each
stage has 3vM, the ticks are

  gpipe, breadth_first         3vM + 2(S - 1)
  one_f_one_b, interleaved     at most that
  zb_h1, zb_h2                 3vM + S - 1
  zb_v                         3vM + S - 1 from M = 2S - 2 on

and the bubble is what is over 3vM, by all ticks. The literature has
(S - 1) / (vM + S - 1) for the first two, with a backward in one piece; here
B's result is sent on before W, so the way back takes one tick a stage and not
two, and the bubble is 2(S - 1) / (3vM + 2(S - 1)). In flight, from F until W,
stage s holds M with gpipe, min(M, S - s) with one_f_one_b, at most S with
zb_h1, 2S - 1 with zb_h2, and with zb_v 2S parts of half a stage.

Every schedule takes any number of microbatches and stages, and any number of
chunks, but zb_v, which has two. With chunks, one_f_one_b is interleaved, gpipe
is breadth_first, and zb_h1 and zb_h2 put off the W of interleaved. Interleaving
in groups of S would need M to be a multiple of S; here the rest of a division
is spread over the groups.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import difflib

from t2x.pipeline import greedy
from t2x.pipeline import operations as ops
from t2x.pipeline import orders as orders_lib
from t2x.pipeline import schedule as schedule_lib

Schedule = schedule_lib.Schedule
Piece = tuple[int, int]  # A microbatch and a chunk.


def gpipe(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 1,
  recompute: bool = False,
) -> Schedule:
  """All forwards, then all backwards (Huang et al., 2018).

  https://arxiv.org/abs/1811.06965
  """
  return _breadth_first(
    'gpipe', num_stages, num_microbatches, num_chunks, recompute
  )


def breadth_first(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 2,
  recompute: bool = False,
) -> Schedule:
  """All microbatches through a chunk before the next (Lamy-Poirier, 2022).

  https://arxiv.org/abs/2211.05953
  """
  return _breadth_first(
    'breadth_first', num_stages, num_microbatches, num_chunks, recompute
  )


def one_f_one_b(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 1,
  recompute: bool = False,
) -> Schedule:
  """One forward, one backward in turn (Narayanan et al., 2019).

  https://arxiv.org/abs/1806.03377
  """
  return _alternating(
    'one_f_one_b', num_stages, num_microbatches, num_chunks, recompute
  )


def interleaved(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 2,
  recompute: bool = False,
) -> Schedule:
  """1F1B over several chunks a stage (Narayanan et al., 2021).

  https://arxiv.org/abs/2104.04473
  """
  return _alternating(
    'interleaved', num_stages, num_microbatches, num_chunks, recompute
  )


def zb_h1(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 1,
  recompute: bool = False,
) -> Schedule:
  """1F1B whose stage s is s weight gradients behind (Qi et al., 2023).

  https://arxiv.org/abs/2401.10241. Every stage then holds as much as the
  first, and gradients reach the first stage sooner.
  """
  return _alternating(
    'zb_h1', num_stages, num_microbatches, num_chunks, recompute, put_off=True
  )


def zb_h2(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 1,
  recompute: bool = False,
) -> Schedule:
  """No idle tick between a stage's first and last (Qi et al., 2023).

  https://arxiv.org/abs/2401.10241. Holds 2S - 1 microbatches in flight, with
  chunks S parts more for each further chunk. So from M = 2S - 1 on; with fewer
  microbatches, or chunks and M no multiple of S, stages can wait.
  """
  _check(num_stages, num_microbatches, num_chunks)
  groups = _groups(num_stages, num_microbatches)
  limit = 2 * num_stages - 1 + (num_chunks - 1) * max(map(len, groups))
  found = _greedy(
    'zb_h2', groups, [limit] * num_stages, num_chunks, 'loop', recompute
  )
  if num_chunks == 1:
    return found
  other = _alternating(
    'zb_h2', num_stages, num_microbatches, num_chunks, recompute, put_off=True
  )
  return min(found, other, key=lambda table: table.num_ticks)


def zb_v(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 2,
  recompute: bool = False,
) -> Schedule:
  """Down the stages in chunk 0 and back up in chunk 1 (Qi et al., 2024).

  https://arxiv.org/abs/2405.15362; the same placement as DualPipe-V. No stage
  waits between its first and last operation from M = 2S - 1 on.

  Raises:
    ValueError: num_chunks is not 2.
  """
  _check(num_stages, num_microbatches, num_chunks)
  if num_chunks != 2:
    raise ValueError(
      f'zb_v goes down the stages in one chunk and up in another; num_chunks='
      f'{num_chunks}, the nearest that works is 2.'
    )
  tables = []
  if num_microbatches >= 2 * num_stages - 1:
    stages = range(num_stages)
    orders = [_v_order(s, num_stages, num_microbatches) for s in stages]
    tables.append(_table('zb_v', orders, num_microbatches, 2, 'v', recompute))
  if recompute or not tables:
    groups = [[micro] for micro in range(num_microbatches)]
    limits = [2 * num_stages] * num_stages
    tables.append(_greedy('zb_v', groups, limits, 2, 'v', recompute))
  return min(tables, key=lambda table: table.num_ticks)


def forward_only(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 1,
  placement: ops.Placement = 'loop',
) -> Schedule:
  """A table without backwards, for evaluation.

  It has vM + S - 1 ticks from M = S on; with placement 'v' vM + v(S - 1), since
  the last microbatch goes all the way each time.
  """
  _check(num_stages, num_microbatches, num_chunks)
  groups = _groups(num_stages, num_microbatches)
  if placement == 'v':  # A group would have to last there and back.
    groups = [list(range(num_microbatches))]
  order = [
    (ops.FORWARD, *piece) for piece in _pieces(groups, range(num_chunks))
  ]
  return orders_lib.from_orders(
    [order] * num_stages,
    name='forward_only',
    num_microbatches=num_microbatches,
    num_chunks=num_chunks,
    placement=placement,
    training=False,
  )


_MAKERS: dict[str, Callable[..., Schedule]] = {
  'gpipe': gpipe,
  'one_f_one_b': one_f_one_b,
  'interleaved': interleaved,
  'breadth_first': breadth_first,
  'zb_h1': zb_h1,
  'zb_h2': zb_h2,
  'zb_v': zb_v,
}
NAMES = tuple(_MAKERS)


def make(
  name: str,
  *,
  num_stages: int,
  num_microbatches: int,
  num_chunks: int | None = None,
  recompute: bool = False,
) -> Schedule:
  """Returns the schedule of that name.

  Args:
    name: one of `NAMES`.
    num_stages: S.
    num_microbatches: M.
    num_chunks: parts on each stage; None for the schedule's own number.
    recompute: whether the backward does the forward again.

  Raises:
    ValueError: an unknown name, or numbers that the schedule cannot take; the
      nearest that it can are named.
  """
  if name not in _MAKERS:
    close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.0)
    raise ValueError(
      f'There is no schedule {name!r}; the closest name is {close[0]!r} of '
      f'{", ".join(NAMES)}.'
    )
  chunks = {} if num_chunks is None else {'num_chunks': num_chunks}
  return _MAKERS[name](
    num_stages, num_microbatches, recompute=recompute, **chunks
  )


def _check(num_stages: int, num_microbatches: int, num_chunks: int) -> None:
  numbers = {
    'num_stages': num_stages,
    'num_microbatches': num_microbatches,
    'num_chunks': num_chunks,
  }
  for name, value in numbers.items():
    if value < 1:
      raise ValueError(f'{name}={value}; the nearest that works is 1.')


def _groups(num_stages: int, num_microbatches: int) -> list[list[int]]:
  """Deals microbatches to groups of at least S, and of about equal size."""
  num_groups = max(1, num_microbatches // num_stages)
  size, more = divmod(num_microbatches, num_groups)
  groups, start = [], 0
  for i in range(num_groups):
    stop = start + size + (i < more)
    groups.append(list(range(start, stop)))
    start = stop
  return groups


def _pieces(
  groups: Sequence[Sequence[int]], chunks: Iterable[int]
) -> list[Piece]:
  """Each group through all chunks, then the next group."""
  chunks = list(chunks)
  return [(m, c) for group in groups for c in chunks for m in group]


def _breadth_first(
  name: str,
  num_stages: int,
  num_microbatches: int,
  num_chunks: int,
  recompute: bool,
) -> Schedule:
  _check(num_stages, num_microbatches, num_chunks)
  groups = [range(num_microbatches)]
  order = [
    (ops.FORWARD, *piece) for piece in _pieces(groups, range(num_chunks))
  ]
  for piece in _pieces(groups, reversed(range(num_chunks))):
    order += [(ops.BACKWARD, *piece), (ops.WEIGHT, *piece)]
  return _table(
    name, [order] * num_stages, num_microbatches, num_chunks, 'loop', recompute
  )


def _alternating(
  name: str,
  num_stages: int,
  num_microbatches: int,
  num_chunks: int,
  recompute: bool,
  put_off: bool = False,
) -> Schedule:
  """Some forwards, then B, W and F in turn; with `put_off`, W s places late."""
  _check(num_stages, num_microbatches, num_chunks)
  groups = _groups(num_stages, num_microbatches)
  forwards = _pieces(groups, range(num_chunks))
  backwards = _pieces(groups, reversed(range(num_chunks)))
  orders = []
  for stage in range(num_stages):
    # What is in flight until the first gradient can be back.
    first = num_stages - stage
    if num_chunks > 1:
      first = 2 * first - 1 + (num_chunks - 1) * max(map(len, groups))
    late = stage if put_off else 0
    order = [(ops.FORWARD, *piece) for piece in forwards[:first]]
    for k, piece in enumerate(backwards):
      order.append((ops.BACKWARD, *piece))
      if k >= late:
        order.append((ops.WEIGHT, *backwards[k - late]))
      if first + k < len(forwards):
        order.append((ops.FORWARD, *forwards[first + k]))
    rest = backwards[max(0, len(backwards) - late) :]
    orders.append(order + [(ops.WEIGHT, *piece) for piece in rest])
  return _table(name, orders, num_microbatches, num_chunks, 'loop', recompute)


def _v_order(stage: int, num_stages: int, num_microbatches: int):
  """What a stage does in zb_v, from M = 2S - 1 on.

  Forwards until the first gradient is there; F, B and W of both chunks in
  turn; at the end B before W, so that the W fill the time until it is over.
  """
  turns = num_microbatches - num_stages
  plan = ['F0'] * (2 * (num_stages - stage) - 1)
  plan += ['F1', 'F0'] * stage
  plan += ['F1', 'B1', 'W1'] * (num_stages - stage)
  plan += ['F0', 'B0', 'W0', 'F1', 'B1', 'W1'] * turns
  plan += ['B0', 'B1'] * stage
  plan += ['B0', 'W0'] * (num_stages - stage)
  plan += ['W1'] * num_microbatches + ['W0'] * num_microbatches
  order, count = [], dict.fromkeys(plan, 0)
  for step in plan:
    if count[step] < num_microbatches:
      kind = ops.LETTERS.index(step[0])
      order.append((kind, count[step], int(step[1])))
      count[step] += 1
  return order


def _table(name, orders, num_microbatches, num_chunks, placement, recompute):
  if recompute:
    orders = [
      [
        op
        for kind, m, c in order
        for op in ([(ops.RECOMPUTE, m, c)] * (kind == ops.BACKWARD))
        + [(kind, m, c)]
      ]
      for order in orders
    ]
  return orders_lib.from_orders(
    orders,
    name=name,
    num_microbatches=num_microbatches,
    num_chunks=num_chunks,
    placement=placement,
    recompute=recompute,
  )


def _greedy(name, groups, limits, num_chunks, placement, recompute):
  num_stages, num_microbatches = len(limits), sum(map(len, groups))
  numbers = [i for i, group in enumerate(groups) for _ in group]
  ones = [1.0] * (num_stages * num_chunks)
  problem = greedy.Problem(
    num_stages=num_stages,
    num_microbatches=num_microbatches,
    num_chunks=num_chunks,
    placement=placement,
    recompute=recompute,
    costs=[ones] * len(ops.LETTERS),
    room=greedy.Room(limits=limits),
    policy=greedy.Policy(groups=numbers),
  )
  return orders_lib.from_orders(
    greedy.orders(problem),
    name=name,
    num_microbatches=num_microbatches,
    num_chunks=num_chunks,
    placement=placement,
    recompute=recompute,
  )
