"""What a mask shows, one pair at a time, in the words of its patterns."""

from t2x.attention import block_patterns
from t2x.attention import patterns


def by_place(pattern, i, j, prefix=0):
  """Whether the query at index i sees the key at index j."""
  match pattern:
    case patterns.And(left, right):
      return by_place(left, i, j, prefix) and by_place(right, i, j, prefix)
    case patterns.Or(left, right):
      return by_place(left, i, j, prefix) or by_place(right, i, j, prefix)
    case patterns.Everything():
      return True
    case patterns.Causal():
      return j <= i
    case patterns.Window(size):
      return abs(i - j) < size
    case patterns.DilatedPattern(step):
      return abs(i - j) % step == 0
    case patterns.Prefix():
      return j < prefix
    case patterns.Global(num):
      return min(i, j) < num
    case patterns.Region(size):
      return i // size == j // size
    case block_patterns.Blocks():
      return bool(pattern.matrix[i // pattern.size, j // pattern.size])
  raise TypeError(pattern)
