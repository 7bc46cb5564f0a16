"""Mask patterns: which keys a query sees by the positions of both, as values.

Patterns are combined with `&` and `|`. They are small and hashable, so that jit
takes them as static, and evaluated in two ways: for pairs of a query and a key
(`sees`, the dense mask), and for whole blocks of pairs, of which some or all
may be seen (`reach`), so that blocks are left out before anything runs.

  >>> import numpy as np
  >>> band = Causal() & (Window(2) | Global(1))
  >>> index = np.arange(5)
  >>> band.sees(index[:, None], index[None], None).astype(int)
  array([[1, 0, 0, 0, 0],
         [1, 1, 0, 0, 0],
         [1, 1, 1, 0, 0],
         [1, 0, 1, 1, 0],
         [1, 0, 0, 1, 1]])

Queries and keys are given by their index in the sequence. A span is the lowest
and the highest index of a block, both included; arrays of spans broadcast.
"""

import dataclasses
import functools

import jax
import numpy as np

Indices = jax.Array | np.ndarray
Span = tuple[np.ndarray, np.ndarray]
Reach = tuple[np.ndarray, np.ndarray]  # Whether some, and whether all, is seen.
_COUNTED = 64  # The side of the blocks whose pairs are counted one by one.


class Pattern:
  """The keys that a query sees, by the positions of both.

  Attributes:
    is_relative: whether the pattern depends only on the distance between a
      query and a key.
  """

  is_relative: bool = True

  def sees(self, q: Indices, k: Indices, prefix: Indices | None) -> Indices:
    """Returns whether each query sees each key, a boolean array.

    Args:
      q: indices of queries, numpy or jax, that broadcast with `k`.
      k: indices of keys.
      prefix: index at which the prefix of each key's document ends, that
        broadcasts with both; None is no prefix.
    """
    raise NotImplementedError

  def reach(self, q: Span, k: Span) -> Reach:
    """Returns whether some, and whether all, pairs of blocks are seen.

    Blocks about which this is not known before the program runs count as seen
    in part. So may blocks of which two combined patterns see nothing together.

    Args:
      q: lowest and highest index of each block of queries.
      k: lowest and highest index of each block of keys.
    """
    raise NotImplementedError

  def __and__(self, other: 'Pattern') -> 'Pattern':
    if isinstance(self, Everything) or self == other:
      return other
    return self if isinstance(other, Everything) else And(self, other)

  def __or__(self, other: 'Pattern') -> 'Pattern':
    if isinstance(self, Everything) or self == other:
      return self
    return other if isinstance(other, Everything) else Or(self, other)


@dataclasses.dataclass(frozen=True)
class _Joined(Pattern):
  """A combination of two patterns."""

  left: Pattern
  right: Pattern

  @property
  def is_relative(self) -> bool:  # pyright: ignore
    return self.left.is_relative and self.right.is_relative


@dataclasses.dataclass(frozen=True)
class And(_Joined):
  """Keys that both patterns show."""

  def sees(self, q: Indices, k: Indices, prefix: Indices | None) -> Indices:
    return self.left.sees(q, k, prefix) & self.right.sees(q, k, prefix)

  def reach(self, q: Span, k: Span) -> Reach:
    left, right = self.left.reach(q, k), self.right.reach(q, k)
    return left[0] & right[0], left[1] & right[1]


@dataclasses.dataclass(frozen=True)
class Or(_Joined):
  """Keys that either pattern shows."""

  def sees(self, q: Indices, k: Indices, prefix: Indices | None) -> Indices:
    return self.left.sees(q, k, prefix) | self.right.sees(q, k, prefix)

  def reach(self, q: Span, k: Span) -> Reach:
    left, right = self.left.reach(q, k), self.right.reach(q, k)
    return left[0] | right[0], left[1] | right[1]


@dataclasses.dataclass(frozen=True)
class Everything(Pattern):
  """Every key."""

  def sees(self, q: Indices, k: Indices, prefix: Indices | None) -> Indices:
    return (q == q) & (k == k)

  def reach(self, q: Span, k: Span) -> Reach:
    some = np.broadcast_to(True, np.broadcast_shapes(q[0].shape, k[0].shape))
    return some, some


@dataclasses.dataclass(frozen=True)
class Causal(Pattern):
  """The query's own key and earlier ones."""

  def sees(self, q: Indices, k: Indices, prefix: Indices | None) -> Indices:
    return k <= q

  def reach(self, q: Span, k: Span) -> Reach:
    return k[0] <= q[1], k[1] <= q[0]


@dataclasses.dataclass(frozen=True)
class Window(Pattern):
  """Keys at a distance below `size` on both sides, and the query's own key.

  Attributes:
    size: number of keys on one side, the query's own included.
  """

  size: int

  def sees(self, q: Indices, k: Indices, prefix: Indices | None) -> Indices:
    return (k > q - self.size) & (k < q + self.size)

  def reach(self, q: Span, k: Span) -> Reach:
    # Range of key index minus query index.
    low, high = k[0] - q[1], k[1] - q[0]
    some = (low < self.size) & (high > -self.size)
    return some, (low > -self.size) & (high < self.size)


@dataclasses.dataclass(frozen=True)
class Below(Pattern):
  """Keys whose index is below `end`.

  Attributes:
    end: index after the last visible key.
  """

  end: int
  is_relative = False

  def sees(self, q: Indices, k: Indices, prefix: Indices | None) -> Indices:
    return (q == q) & (k < self.end)

  def reach(self, q: Span, k: Span) -> Reach:
    some, every = k[0] < self.end, k[1] < self.end
    shape = np.broadcast_shapes(q[0].shape, k[0].shape)
    return np.broadcast_to(some, shape), np.broadcast_to(every, shape)


@dataclasses.dataclass(frozen=True)
class DilatedPattern(Pattern):
  """Keys at distances that are multiples of `step` (Beltagy et al., 2020).

  Attributes:
    step: distance between neighbouring visible keys.
  """

  step: int

  def sees(self, q: Indices, k: Indices, prefix: Indices | None) -> Indices:
    return (k - q) % self.step == 0

  def reach(self, q: Span, k: Span) -> Reach:
    low, high = k[0] - q[1], k[1] - q[0]
    # The first multiple of the step at or past the lowest distance.
    some = -(-low // self.step) * self.step <= high
    return some, some & (self.step == 1)


@dataclasses.dataclass(frozen=True)
class Prefix(Pattern):
  """Keys of a document's prefix, which all its queries see (prefix LM)."""

  is_relative = False

  def sees(self, q: Indices, k: Indices, prefix: Indices | None) -> Indices:
    assert prefix is not None, 'the mask has no prefix_BS'
    return (q == q) & (k < prefix)

  def reach(self, q: Span, k: Span) -> Reach:
    some = np.broadcast_to(True, np.broadcast_shapes(q[0].shape, k[0].shape))
    return some, ~some


@dataclasses.dataclass(frozen=True)
class Global(Pattern):
  """The first `num` tokens see all keys, and all queries see them.

  Attributes:
    num: number of global tokens.
  """

  num: int
  is_relative = False

  def sees(self, q: Indices, k: Indices, prefix: Indices | None) -> Indices:
    return (q < self.num) | (k < self.num)

  def reach(self, q: Span, k: Span) -> Reach:
    some = (q[0] < self.num) | (k[0] < self.num)
    return some, (q[1] < self.num) | (k[1] < self.num)


@dataclasses.dataclass(frozen=True)
class Region(Pattern):
  """Keys in the same region as the query, of regions of `size` tokens.

  Attributes:
    size: number of tokens in a region.
  """

  size: int
  is_relative = False

  def sees(self, q: Indices, k: Indices, prefix: Indices | None) -> Indices:
    return q // self.size == k // self.size

  def reach(self, q: Span, k: Span) -> Reach:
    q, k = ((a // self.size, b // self.size) for a, b in (q, k))
    some = (q[0] <= k[1]) & (k[0] <= q[1])
    return some, some & (q[0] == q[1]) & (k[0] == k[1]) & (q[0] == k[0])


def has(pattern: Pattern, kind: type[Pattern]) -> bool:
  """Returns whether a pattern is, or contains, one of a class.

  Args:
    pattern: the pattern.
    kind: class to look for.
  """
  if isinstance(pattern, _Joined):
    return has(pattern.left, kind) or has(pattern.right, kind)
  return isinstance(pattern, kind)


def sees_itself(pattern: Pattern, length: int) -> bool:
  """Returns whether every query of a sequence sees its own key."""
  index = np.arange(length)
  return bool(np.all(pattern.reach((index, index), (index, index))[0]))


@functools.lru_cache(maxsize=1024)
def count(pattern: Pattern, num_queries: int, num_keys: int) -> int:
  """Returns the number of pairs of a query and a key that are seen.

  A prefix counts as empty.

  Args:
    pattern: the pattern.
    num_queries: number of queries, of indices 0, 1, 2, ...
    num_keys: number of keys, of indices 0, 1, 2, ...
  """
  if pattern.is_relative:
    back, ahead = np.arange(1 - num_queries, 0), np.arange(num_keys)
    # Number of pairs at each distance of a key from its query.
    pairs = [
      np.minimum(num_queries + back, num_keys),
      np.minimum(num_keys - ahead, num_queries),
    ]
    at = np.concatenate([back, ahead])
    seen = pattern.sees(np.zeros_like(at), at, None)
    return int(np.concatenate(pairs)[np.broadcast_to(seen, at.shape)].sum())
  starts = [np.arange(0, n, _COUNTED) for n in (num_queries, num_keys)]
  q, k = (
    (start, np.minimum(start + _COUNTED, n) - 1)
    for start, n in zip(starts, (num_queries, num_keys))
  )
  across = lambda span: (span[0][:, None], span[1][:, None])
  some, every = pattern.reach(across(q), k)
  area = (q[1] - q[0] + 1)[:, None] * (k[1] - k[0] + 1)
  total = int(area[every].sum())
  inside = np.arange(_COUNTED)
  for row, column in zip(*np.nonzero(some & ~every)):
    i, j = (q[0][row] + inside)[:, None], k[0][column] + inside
    seen = pattern.sees(i, j, np.zeros((), int))
    total += int((seen & (i < num_queries) & (j < num_keys)).sum())
  return total


def ordered(*, causal: bool, window: int | None = None) -> Pattern:
  """Returns the pattern of causal order, of a window, or of both.

  Args:
    causal: whether a query sees only its own key and earlier ones.
    window: distance between a query and a key below which it sees the key; None
      is no limit.
  """
  pattern: Pattern = Causal() if causal else Everything()
  return pattern if window is None else pattern & Window(window)
