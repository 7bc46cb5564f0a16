"""Patterns of whole blocks: any matrix of them, and random ones."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

from t2x.attention import patterns


@dataclasses.dataclass(frozen=True)
class Blocks(patterns.Pattern):
  """Any pattern of whole blocks.

  Attributes:
    size: tokens to a side of a block.
    rows: a string for each block of queries, with a 1 for each block of keys
      that it sees and a 0 for each that it does not.
  """

  size: int
  rows: tuple[str, ...]
  is_relative = False

  @property
  def matrix(self) -> np.ndarray:
    """Whether each block of queries sees each block of keys."""
    return _matrix(self)

  def _made(self) -> np.ndarray:
    return np.array([[c == '1' for c in row] for row in self.rows], bool)

  def sees(self, q, k, prefix):
    matrix = self.matrix
    rows, columns = matrix.shape
    q, k = q // self.size, k // self.size
    # Padding past the matrix sees nothing that counts.
    q, k = q.clip(0, rows - 1), k.clip(0, columns - 1)
    if isinstance(q, np.ndarray) and isinstance(k, np.ndarray):
      return matrix[q, k]
    return jnp.asarray(matrix)[q, k]

  def reach(self, q, k):
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

  A causal one draws among the blocks up to its own, so that the first rows are
  the same in longer sequences; then a row has no more than there are.

  Attributes:
    size: tokens to a side of a block.
    num: blocks of keys that a block of queries sees.
    num_blocks: of the sequence.
    causal: draw among the blocks up to the query's own.
    seed: of the draws.
  """

  rows: tuple[str, ...] = ()
  num: int = 1
  num_blocks: int = 1
  causal: bool = False
  seed: int = 0

  def _made(self) -> np.ndarray:
    matrix = np.zeros((self.num_blocks, self.num_blocks), bool)
    for row in range(self.num_blocks):
      among = row + 1 if self.causal else self.num_blocks
      rng = np.random.default_rng((self.seed, row))
      matrix[row, rng.permutation(among)[: self.num]] = True
    return matrix


@functools.lru_cache(maxsize=32)
def _sums(blocks: Blocks) -> np.ndarray:
  """Blocks that are seen up to each row and column."""
  return np.pad(blocks.matrix.cumsum(0, np.int32).cumsum(1), (1, 0))


@functools.lru_cache(maxsize=32)
def _matrix(blocks: Blocks) -> np.ndarray:
  return blocks._made()  # pylint: disable=protected-access
