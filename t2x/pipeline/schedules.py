"""The pipeline schedules of the literature, by name.

  table = schedules.make('interleaved', num_stages=4, num_microbatches=8)

Let there be S stages, M >= S microbatches and v chunks, and let F, B and W take
one tick each. Each stage has 3vM operations. The number of ticks is

  gpipe, breadth_first         3vM + 2(S - 1)
  one_f_one_b, interleaved     at most that
  zb_h1, zb_h2                 3vM + S - 1
  zb_v                         3vM + S - 1 for M >= 2S - 2

and the bubble is the share of ticks beyond 3vM. The literature has
(S - 1) / (vM + S - 1) for the first two, whose backward is one operation. Here
the result of B is sent before W, so the way back takes one tick a stage and not
two, and the bubble is 2(S - 1) / (3vM + 2(S - 1)). In flight, from F until W,
stage s holds M microbatches with gpipe, min(M, S - s) with one_f_one_b, at most
S with zb_h1, 2S - 1 with zb_h2, and 2S parts of half a stage with zb_v.

Each function takes these numbers, with the chunks as the parts on each stage,
and whether the backward recomputes the forward: an R before every B.

Every schedule takes any number of microbatches, stages and chunks, except zb_v,
which has two chunks. With several chunks one_f_one_b is interleaved, gpipe is
breadth_first, and zb_h1 and zb_h2 defer the W of interleaved. Interleaving in
groups of S microbatches would need M to be a multiple of S. Here the remaining
microbatches are spread over the groups.
"""

from collections.abc import Callable
import difflib

from t2x.pipeline import from_orders
from t2x.pipeline import list_scheduling
from t2x.pipeline import operations as ops
from t2x.pipeline import patterns
from t2x.pipeline import schedule as schedule_lib

Schedule = schedule_lib.Schedule


def gpipe(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 1,
  recompute: bool = False,
) -> Schedule:
  """All forwards, then all backwards (GPipe; Huang et al., 2018).

  https://arxiv.org/abs/1811.06965
  """
  check_numbers(num_stages, num_microbatches, num_chunks)
  orders = patterns.breadth_first(num_stages, num_microbatches, num_chunks)
  return _table('gpipe', orders, num_microbatches, num_chunks, recompute)


def breadth_first(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 2,
  recompute: bool = False,
) -> Schedule:
  """All microbatches through a chunk before the next (Lamy-Poirier, 2022).

  https://arxiv.org/abs/2211.05953
  """
  check_numbers(num_stages, num_microbatches, num_chunks)
  orders = patterns.breadth_first(num_stages, num_microbatches, num_chunks)
  return _table(
    'breadth_first', orders, num_microbatches, num_chunks, recompute
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
  check_numbers(num_stages, num_microbatches, num_chunks)
  orders = patterns.alternating(num_stages, num_microbatches, num_chunks)
  return _table('one_f_one_b', orders, num_microbatches, num_chunks, recompute)


def interleaved(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 2,
  recompute: bool = False,
) -> Schedule:
  """1F1B over several chunks a stage (Narayanan et al., 2021).

  https://arxiv.org/abs/2104.04473
  """
  check_numbers(num_stages, num_microbatches, num_chunks)
  orders = patterns.alternating(num_stages, num_microbatches, num_chunks)
  return _table('interleaved', orders, num_microbatches, num_chunks, recompute)


def zb_h1(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 1,
  recompute: bool = False,
) -> Schedule:
  """1F1B in which stage s does each W s turns later (Qi et al., 2023).

  https://arxiv.org/abs/2401.10241. Every stage then needs as much memory as the
  first, and gradients reach the first stage sooner.
  """
  check_numbers(num_stages, num_microbatches, num_chunks)
  orders = patterns.alternating(
    num_stages, num_microbatches, num_chunks, defer_weight=True
  )
  return _table('zb_h1', orders, num_microbatches, num_chunks, recompute)


def zb_h2(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 1,
  recompute: bool = False,
) -> Schedule:
  """No idle tick between a stage's first and last (Qi et al., 2023).

  https://arxiv.org/abs/2401.10241. There are 2S - 1 microbatches in flight, and
  S parts more for each further chunk. Stages never wait if M is 2S - 1 or more.
  With fewer microbatches, or with several chunks and M no multiple of S, they
  may wait.
  """
  check_numbers(num_stages, num_microbatches, num_chunks)
  groups = patterns.groups(num_stages, num_microbatches)
  limit = 2 * num_stages - 1 + (num_chunks - 1) * len(groups[0])
  problem = list_scheduling.Problem(
    num_stages=num_stages,
    num_microbatches=num_microbatches,
    num_chunks=num_chunks,
    recompute=recompute,
    limits=(limit,) * num_stages,
    groups=patterns.numbered(groups),
  )
  listed = list_scheduling.schedule(problem, 'zb_h2')
  if num_chunks == 1:
    return listed
  orders = patterns.alternating(
    num_stages, num_microbatches, num_chunks, defer_weight=True
  )
  other = _table('zb_h2', orders, num_microbatches, num_chunks, recompute)
  return min(listed, other, key=lambda table: table.num_ticks)


def zb_v(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 2,
  recompute: bool = False,
) -> Schedule:
  """Down the stages in chunk 0 and back up in chunk 1 (Qi et al., 2024).

  https://arxiv.org/abs/2405.15362. DualPipe-V has the same placement. If M is
  2S - 1 or more, no stage waits between its first and its last operation.

  Raises:
    ValueError: num_chunks is not 2.
  """
  check_numbers(num_stages, num_microbatches, num_chunks)
  if num_chunks != 2:
    raise ValueError(
      f'zb_v has two chunks a stage, one on the way down the stages and one on '
      f'the way up, and chunks={num_chunks}; the nearest that works is 2.'
    )
  tables = []
  if num_microbatches >= 2 * num_stages - 1:
    orders = patterns.down_and_up(num_stages, num_microbatches)
    tables.append(_table('zb_v', orders, num_microbatches, 2, recompute, 'v'))
  if recompute or not tables:
    problem = list_scheduling.Problem(
      num_stages=num_stages,
      num_microbatches=num_microbatches,
      num_chunks=2,
      placement='v',
      recompute=recompute,
      limits=(2 * num_stages,) * num_stages,
      groups=range(num_microbatches),
    )
    tables.append(list_scheduling.schedule(problem, 'zb_v'))
  return min(tables, key=lambda table: table.num_ticks)


def forward_only(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int = 1,
  placement: ops.Placement = 'loop',
) -> Schedule:
  """Forwards alone, for evaluation.

  If M is S or more, there are vM + S - 1 ticks. With placement 'v' there are
  vM + v(S - 1), since the last microbatch passes through all stages for each
  chunk.

  Args:
    num_stages: number of stages, S.
    num_microbatches: number of microbatches, M.
    num_chunks: parts on each stage, v.
    placement: order in which the stages hold the parts; see `operations`.
  """
  check_numbers(num_stages, num_microbatches, num_chunks)
  groups = patterns.groups(num_stages, num_microbatches)
  # A group would have to keep the stages busy on the way down and back up.
  if placement == 'v':
    groups = [range(num_microbatches)]
  pieces = patterns.pieces(groups, range(num_chunks))
  return from_orders.from_orders(
    [[(ops.FORWARD, *piece) for piece in pieces]] * num_stages,
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
    num_stages: number of stages, S.
    num_microbatches: number of microbatches, M.
    num_chunks: parts on each stage; None for the schedule's own number.
    recompute: whether there is an R before every B.

  Raises:
    ValueError: the name is unknown, or the schedule cannot take the numbers.
      The message gives the nearest that it can take.
  """
  check_name(name)
  chunks = {} if num_chunks is None else {'num_chunks': num_chunks}
  return _MAKERS[name](
    num_stages, num_microbatches, recompute=recompute, **chunks
  )


def check_name(name: str) -> None:
  """Checks that a schedule exists.

  Args:
    name: name of the schedule.

  Raises:
    ValueError: the name is none of `NAMES`.
  """
  if name in _MAKERS:
    return
  close = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.5)
  hint = f' Did you mean {close[0]!r}?' if close else ''
  raise ValueError(
    f'There is no schedule {name!r}.{hint} There are {", ".join(NAMES)}, and '
    'the path of a table of your own (.csv); scripts/show_schedule.py '
    '--schedule=generated makes one for given costs.'
  )


def check_numbers(
  num_stages: int, num_microbatches: int, num_chunks: int
) -> None:
  """Checks that the numbers of a schedule are at least 1.

  Args:
    num_stages: number of stages, S.
    num_microbatches: number of microbatches, M.
    num_chunks: parts on each stage.

  Raises:
    ValueError: one of them is below 1.
  """
  numbers = {
    'stages': num_stages,
    'microbatches': num_microbatches,
    'chunks': num_chunks,
  }
  for name, value in numbers.items():
    if value < 1:
      raise ValueError(f'{name}={value}; the nearest that works is 1.')


def _table(
  name: str,
  orders: patterns.Orders,
  num_microbatches: int,
  num_chunks: int,
  recompute: bool,
  placement: ops.Placement = 'loop',
) -> Schedule:
  return from_orders.from_orders(
    patterns.with_recompute(orders) if recompute else orders,
    name=name,
    num_microbatches=num_microbatches,
    num_chunks=num_chunks,
    placement=placement,
    recompute=recompute,
  )
