"""Which blocks of keys each block of queries meets, as a list of steps.

A step is a block of queries and a few blocks of keys. Steps with nothing to see
do not exist, and all have one shape, so that a loop over them compiles once and
its length says what it costs.

Shape suffixes: P steps, C blocks of keys of a step.
"""

import dataclasses
import functools

import numpy as np

from t2x.attention import patterns

# Sides of blocks that are tried: of queries and of keys, and about how fast
# their products are beside those of the first on a CPU.
_SIDES = ((256, 128, 1.0), (128, 128, 0.8), (128, 64, 0.8), (64, 64, 0.6))
_KEYS = 512  # Of a step, at the most.
_STEP = 96  # Keys that could be met in the time that a step takes by itself.
_MOST = 2048  # Blocks to a side of what is looked at.


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Steps:
  """The steps of a pattern, those of a block of queries after each other.

  Attributes:
    q_size: queries to a block.
    k_size: keys to a block.
    q_P: the block of queries of each step.
    k_PC: its blocks of keys; those past the last are empty.
    is_sliced: the blocks of each step follow each other.
  """

  q_size: int
  k_size: int
  q_P: np.ndarray
  k_PC: np.ndarray
  is_sliced: bool

  @property
  def pairs(self) -> int:
    """Pairs of a query and a key that are computed, seen or not."""
    return self.k_PC.size * self.q_size * self.k_size


@functools.lru_cache(maxsize=256)
def plan(
  pattern: patterns.Pattern, num_queries: int, num_keys: int, block: int | None
) -> Steps:
  """Returns the steps that leave out what a pattern hides.

  Args:
    pattern: what is seen by place.
    num_queries: T; the last block may go past it.
    num_keys: S; likewise.
    block: side of the blocks; None chooses.
  """
  sides = _SIDES if block is None else ((block, block, 1.0),)
  longest = max(num_queries, num_keys)
  # What is looked at, and the list of steps, must not grow without end.
  larger = -(-longest // (_SIDES[0][1] * _MOST))
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


def _steps(pattern, T, S, q_size, k_size):
  """Returns the steps with blocks of these sides, and what they cost."""
  q, k = np.arange(0, T, q_size)[:, None], np.arange(0, S, k_size)
  last = lambda first, size, num: np.minimum(first + size, num) - 1
  some, _ = pattern.reach((q, last(q, q_size, T)), (k, last(k, k_size, S)))
  some = np.broadcast_to(some, (len(q), len(k)))
  met = [np.flatnonzero(row) for row in some]
  sliced = all(len(m) < 2 or m[-1] - m[0] + 1 == len(m) for m in met)
  counts = np.array([len(m) for m in met])
  costs = {
    num: int((-(-counts // num)).sum()) * q_size * (num * k_size + _STEP)
    for num in range(1, max(_KEYS // k_size, 1) + 1)
  }
  num = min(costs, key=costs.__getitem__)
  rows = np.repeat(np.arange(len(met)), -(-counts // num))
  # Of each step: which of its row's blocks come first, and all of its places.
  first = np.concatenate([np.arange(0, c, num) for c in counts])
  place = first[:, None] + np.arange(num)
  start = (np.cumsum(counts) - counts)[rows, None]
  columns = np.append(np.concatenate(met), 0)
  found = columns[np.minimum(start + place, len(columns) - 1)]
  is_met = place < counts[rows, None]
  # Slices go on past the end, where the pattern itself hides what comes.
  rest = columns[start] + place if sliced else np.full(place.shape, len(k))
  return Steps(
    q_size=q_size,
    k_size=k_size,
    q_P=rows.astype(np.int32),
    k_PC=np.where(is_met, found, rest).astype(np.int32),
    is_sliced=sliced,
  ), costs[num]
