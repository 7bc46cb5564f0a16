"""The order of operations on each stage, by the patterns of the literature.

Every function returns for each stage its (operation, microbatch, chunk) in
order, to be placed by `from_orders.from_orders`.
"""

from collections.abc import Iterable
from collections.abc import Sequence

from t2x.pipeline import operations as ops

Orders = list[list[ops.Op]]


def groups(num_stages: int, num_microbatches: int) -> list[range]:
  """Deals microbatches to groups of at least S, and of about equal size.

  A group that passes through a chunk keeps S stages busy until the first of it
  is back for the next chunk.
  """
  num_groups = max(1, num_microbatches // num_stages)
  size, more = divmod(num_microbatches, num_groups)
  starts = [i * size + min(i, more) for i in range(num_groups + 1)]
  return [range(a, b) for a, b in zip(starts, starts[1:])]


def numbered(groups: Sequence[Sequence[int]]) -> list[int]:
  """Returns for each microbatch the number of its group."""
  return [i for i, group in enumerate(groups) for _ in group]


def pieces(
  groups: Sequence[Sequence[int]], chunks: Iterable[int]
) -> list[tuple[int, int]]:
  """(microbatch, chunk): each group through all chunks, then the next."""
  chunks = list(chunks)
  return [(m, c) for group in groups for c in chunks for m in group]


def breadth_first(
  num_stages: int, num_microbatches: int, num_chunks: int
) -> Orders:
  """All forwards, chunk by chunk, then all backwards."""
  everything = [range(num_microbatches)]
  order = [
    (ops.FORWARD, *piece) for piece in pieces(everything, range(num_chunks))
  ]
  for piece in pieces(everything, reversed(range(num_chunks))):
    order += [(ops.BACKWARD, *piece), (ops.WEIGHT, *piece)]
  return [order] * num_stages


def alternating(
  num_stages: int,
  num_microbatches: int,
  num_chunks: int,
  *,
  put_off: bool = False,
) -> Orders:
  """Forwards until a gradient can be there, then B, W and F in turn.

  Args:
    num_stages: S.
    num_microbatches: M.
    num_chunks: parts on each stage.
    put_off: stage s does its W s turns later.
  """
  dealt = groups(num_stages, num_microbatches)
  forwards = pieces(dealt, range(num_chunks))
  backwards = pieces(dealt, reversed(range(num_chunks)))
  orders = []
  for stage in range(num_stages):
    first = num_stages - stage
    if num_chunks > 1:
      first = 2 * first - 1 + (num_chunks - 1) * len(dealt[0])
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
  return orders


def down_and_up(num_stages: int, num_microbatches: int) -> Orders:
  """Chunk 0 down the stages and chunk 1 up, for M >= 2S - 1.

  Forwards until the first gradient is there, then F, B and W of both chunks in
  turn; at the end B before W, so that W fill the time in which others finish.
  """
  orders = []
  for stage in range(num_stages):
    above, below = stage, num_stages - stage
    plan = ['F0'] * (2 * below - 1) + ['F1', 'F0'] * above
    plan += ['F1', 'B1', 'W1'] * below
    plan += ['F0', 'B0', 'W0', 'F1', 'B1', 'W1'] * (
      num_microbatches - num_stages
    )
    plan += ['B0', 'B1'] * above + ['B0', 'W0'] * below
    plan += ['W1'] * above + ['W0'] * above
    order, count = [], dict.fromkeys(plan, 0)
    for step in plan:
      # The last turns of some stages have no F0 left.
      if count[step] < num_microbatches:
        kind = ops.LETTERS.index(step[0])
        order.append((kind, count[step], int(step[1])))
        count[step] += 1
    orders.append(order)
  return orders


def with_recompute(orders: Orders) -> Orders:
  """Puts an R before every B."""
  result = []
  for order in orders:
    result.append([])
    for kind, micro, chunk in order:
      if kind == ops.BACKWARD:
        result[-1].append((ops.RECOMPUTE, micro, chunk))
      result[-1].append((kind, micro, chunk))
  return result
