"""Plans the blocks of queries and keys that scanned attention computes.

The plan is a list of steps: a step is a block of queries and a few blocks of
keys. No step is made for blocks that are hidden, and all steps have one shape,
so that a loop over them compiles once and its cost follows from its length.

Shape suffixes: P steps, C blocks of keys of a step.
"""

import dataclasses
import functools

import numpy as np

from t2x.attention import patterns

# Sides of blocks that are tried, (queries, keys), and about the speed of their
# products relative to those of the first on a CPU.
_SIDES = ((256, 128, 1.0), (128, 128, 0.8), (128, 64, 0.8), (64, 64, 0.6))
_MAX_KEYS = 512  # Largest number of keys in a step.
_STEP_COST = 96  # Overhead of a step, as the number of keys of equal time.
_MAX_BLOCKS = 2048  # Largest number of blocks along a side of the plan.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
  """The steps of a pattern; those of one block of queries are consecutive.

  Attributes:
    q_size: number of queries in a block.
    k_size: number of keys in a block.
    q_P: block of queries of each step.
    k_PC: blocks of keys of each step; those past the last block are empty.
    is_sliced: whether the blocks of keys of each step are consecutive.
  """

  q_size: int
  k_size: int
  q_P: np.ndarray
  k_PC: np.ndarray
  is_sliced: bool

  @property
  def pairs(self) -> int:
    """Number of pairs of a query and a key that are computed, seen or not."""
    return self.k_PC.size * self.q_size * self.k_size


@functools.lru_cache(maxsize=256)
def plan(
  pattern: patterns.Pattern, num_queries: int, num_keys: int, block: int | None
) -> Steps:
  """Returns the steps that compute a pattern, without hidden blocks.

  Args:
    pattern: keys that are seen by their index.
    num_queries: number of queries in a row; the last block may go past it.
    num_keys: number of keys in a row; the last block may go past it.
    block: side of the blocks; None chooses the sides of the lowest cost.
  """
  sides = _SIDES if block is None else ((block, block, 1.0),)
  longest = max(num_queries, num_keys)
  # Bounds the time of planning and the number of steps for long sequences.
  larger = -(-longest // (_SIDES[0][1] * _MAX_BLOCKS))
  best, least = None, np.inf
  for q_size, k_size, rate in sides:
    if block is None:
      q_size, k_size = q_size * larger, k_size * larger
    q_size = min(q_size, -(-num_queries // 8) * 8)
    k_size = min(k_size, -(-num_keys // 8) * 8)
    steps, cost = _steps(pattern, num_queries, num_keys, q_size, k_size)
    if cost / rate < least:
      best, least = steps, cost / rate
  assert best is not None
  return best


def _steps(
  pattern: patterns.Pattern, T: int, S: int, q_size: int, k_size: int
) -> tuple[Steps, int]:
  """Returns the steps with blocks of these sides, and their cost."""
  q, k = np.arange(0, T, q_size)[:, None], np.arange(0, S, k_size)
  last = lambda first, size, num: np.minimum(first + size, num) - 1
  some, _ = pattern.reach((q, last(q, q_size, T)), (k, last(k, k_size, S)))
  some = np.broadcast_to(some, (len(q), len(k)))
  visible = [np.flatnonzero(row) for row in some]
  sliced = all(len(v) < 2 or v[-1] - v[0] + 1 == len(v) for v in visible)
  counts = np.array([len(v) for v in visible])
  costs = {
    num: int((-(-counts // num)).sum()) * q_size * (num * k_size + _STEP_COST)
    for num in range(1, max(_MAX_KEYS // k_size, 1) + 1)
  }
  num = min(costs, key=costs.__getitem__)
  rows = np.repeat(np.arange(len(visible)), -(-counts // num))
  # Numbers of each step's blocks among the visible blocks of its row.
  first = np.concatenate([np.arange(0, c, num) for c in counts])
  place = first[:, None] + np.arange(num)
  start = (np.cumsum(counts) - counts)[rows, None]
  columns = np.append(np.concatenate(visible), 0)
  chosen = columns[np.minimum(start + place, len(columns) - 1)]
  is_visible = place < counts[rows, None]
  # Slices go on past the end, where the pattern itself hides the keys.
  rest = columns[start] + place if sliced else np.full(place.shape, len(k))
  return Steps(
    q_size=q_size,
    k_size=k_size,
    q_P=rows.astype(np.int32),
    k_PC=np.where(is_visible, chosen, rest).astype(np.int32),
    is_sliced=sliced,
  ), costs[num]
