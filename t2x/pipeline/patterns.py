"""The order of operations on each stage, in the patterns of the literature.

An order is a list of (operation, microbatch, chunk) for each stage.
`from_orders.from_orders` makes a table of it.
"""

from collections.abc import Iterable
from collections.abc import Sequence

from t2x.pipeline import operations as ops

Orders = list[list[ops.Op]]


def groups(num_stages: int, num_microbatches: int) -> list[range]:
  """Divides microbatches into groups of at least S, of about equal size.

  While such a group passes through a chunk, it keeps all S stages busy until
  its first microbatch can start with the next chunk.

  Args:
    num_stages: number of stages, S.
    num_microbatches: number of microbatches, M.
  """
  num_groups = max(1, num_microbatches // num_stages)
  size, more = divmod(num_microbatches, num_groups)
  starts = [i * size + min(i, more) for i in range(num_groups + 1)]
  return [range(a, b) for a, b in zip(starts, starts[1:])]


def numbered(groups: Sequence[Sequence[int]]) -> list[int]:
  """Returns the number of each microbatch's group."""
  return [i for i, group in enumerate(groups) for _ in group]


def pieces(
  groups: Sequence[Sequence[int]], chunks: Iterable[int]
) -> list[tuple[int, int]]:
  """Returns (microbatch, chunk) pairs: each group passes through all chunks.

  Args:
    groups: microbatches of each group.
    chunks: chunks in the order in which a group passes through them.
  """
  chunks = list(chunks)
  return [(m, c) for group in groups for c in chunks for m in group]


def breadth_first(
  num_stages: int, num_microbatches: int, num_chunks: int
) -> Orders:
  """Returns orders with all forwards, chunk by chunk, then all backwards.

  Args:
    num_stages: number of stages, S.
    num_microbatches: number of microbatches, M.
    num_chunks: parts on each stage.
  """
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
  defer_weight: bool = False,
) -> Orders:
  """Returns orders with forwards at first, then B, W and F in turn.

  A stage starts with as many forwards as it takes until a gradient can come.

  Args:
    num_stages: number of stages, S.
    num_microbatches: number of microbatches, M.
    num_chunks: parts on each stage.
    defer_weight: whether stage s does each W s turns later.
  """
  dealt = groups(num_stages, num_microbatches)
  forwards = pieces(dealt, range(num_chunks))
  backwards = pieces(dealt, reversed(range(num_chunks)))
  orders = []
  for stage in range(num_stages):
    first = num_stages - stage
    if num_chunks > 1:
      first = 2 * first - 1 + (num_chunks - 1) * len(dealt[0])
    late = stage if defer_weight else 0
    order = [(ops.FORWARD, *piece) for piece in forwards[:first]]
    for k, piece in enumerate(backwards):
      order.append((ops.BACKWARD, *piece))
      if k >= late:
        order.append((ops.WEIGHT, *backwards[k - late]))
      if first + k < len(forwards):
        order.append((ops.FORWARD, *forwards[first + k]))
    deferred = backwards[max(0, len(backwards) - late) :]
    orders.append(order + [(ops.WEIGHT, *piece) for piece in deferred])
  return orders


def down_and_up(num_stages: int, num_microbatches: int) -> Orders:
  """Returns orders with chunk 0 down the stages and chunk 1 up.

  They start with forwards until the first gradient comes, and go on with F, B
  and W of both chunks in turn. At the end B comes before W, so that W fills the
  time in which other stages finish.

  Args:
    num_stages: number of stages, S.
    num_microbatches: number of microbatches, M, at least 2S - 1.
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
      # On some stages no F0 is left for the last turns.
      if count[step] < num_microbatches:
        kind = ops.LETTERS.index(step[0])
        order.append((kind, count[step], int(step[1])))
        count[step] += 1
    orders.append(order)
  return orders


def with_recompute(orders: Orders) -> Orders:
  """Returns orders with an R before every B."""
  result = []
  for order in orders:
    result.append([])
    for kind, micro, chunk in order:
      if kind == ops.BACKWARD:
        result[-1].append((ops.RECOMPUTE, micro, chunk))
      result[-1].append((kind, micro, chunk))
  return result
