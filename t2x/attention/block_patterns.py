"""Mask patterns made of whole blocks: from a matrix, or drawn at random."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from t2x.attention import patterns


@dataclasses.dataclass(frozen=True)
class Blocks(patterns.Pattern):
  """Pattern given by a matrix of blocks.

  Attributes:
    size: number of tokens along a side of a block.
    rows: one string for each block of queries, with a 1 for each block of keys
      that it sees and a 0 for each block that it does not see.
  """

  size: int
  rows: tuple[str, ...]
  is_relative = False

  @property
  def matrix(self) -> np.ndarray:
    """Whether each block of queries sees each block of keys."""
    return _matrix(self)

  def _build(self) -> np.ndarray:
    return np.array([[c == '1' for c in row] for row in self.rows], bool)

  def sees(
    self,
    q: patterns.Indices,
    k: patterns.Indices,
    prefix: patterns.Indices | None,
  ) -> patterns.Indices:
    matrix = self.matrix
    rows, columns = matrix.shape
    q, k = q // self.size, k // self.size
    # Tokens past the matrix are padding, whose results are not used.
    q, k = q.clip(0, rows - 1), k.clip(0, columns - 1)
    if isinstance(q, np.ndarray) and isinstance(k, np.ndarray):
      return matrix[q, k]
    return jnp.asarray(matrix)[q, k]

  def reach(self, q: patterns.Span, k: patterns.Span) -> patterns.Reach:
    sums = _sums(self)
    rows, columns = self.matrix.shape
    (q_0, q_1), (k_0, k_1) = (
      (np.clip(a // self.size, 0, n - 1), np.clip(b // self.size, 0, n - 1) + 1)
      for (a, b), n in ((q, rows), (k, columns))
    )
    num = sums[q_1, k_1] - sums[q_0, k_1] - sums[q_1, k_0] + sums[q_0, k_0]
    return num > 0, num == (q_1 - q_0) * (k_1 - k_0)


@dataclasses.dataclass(frozen=True)
class RandomBlocks(Blocks):
  """Each block of queries sees `num` blocks of keys, drawn once.

  A causal pattern draws among the blocks up to the query's own, so that the
  first rows are the same in longer sequences. The first blocks of queries then
  see fewer than `num` blocks.

  Attributes:
    size: number of tokens along a side of a block.
    num: number of blocks of keys that a block of queries sees.
    num_blocks: number of blocks in the sequence.
    causal: whether to draw among the blocks up to the query's own only.
    seed: seed of the random draws.
  """

  rows: tuple[str, ...] = ()
  num: int = 1
  num_blocks: int = 1
  causal: bool = False
  seed: int = 0

  def _build(self) -> np.ndarray:
    matrix = np.zeros((self.num_blocks, self.num_blocks), bool)
    for row in range(self.num_blocks):
      among = row + 1 if self.causal else self.num_blocks
      rng = np.random.default_rng((self.seed, row))
      matrix[row, rng.permutation(among)[: self.num]] = True
    return matrix


@functools.lru_cache(maxsize=32)
def _sums(blocks: Blocks) -> np.ndarray:
  """Returns the number of visible blocks before each row and column."""
  return np.pad(blocks.matrix.cumsum(0, np.int32).cumsum(1), (1, 0))


@functools.lru_cache(maxsize=32)
def _matrix(blocks: Blocks) -> np.ndarray:
  return blocks._build()  # pylint: disable=protected-access
