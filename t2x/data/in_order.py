"""The rows of each batch, where each row continues that of the batch before."""

import math
from typing import NamedTuple

import numpy as np

from t2x.data import order


class InOrder:
  """A plan in which row b of every batch reads the b-th part of a split."""

  def __init__(
    self,
    size: int,
    batch_size: int,
    left: np.ndarray | None = None,
    visit: int = 0,
  ):
    """Starts with the unread rows of a pass; full passes follow.

    Args:
      size: number of rows of the split.
      batch_size: number of rows in a batch, each of which reads one part.
      left: numbers of the unread rows, in text order; None for all rows.
      visit: number of passes over the split before this one.
    """
    self._size = size
    self._batch_size = batch_size
    self._left: np.ndarray | range = range(size) if left is None else left
    self._visit = visit

  @property
  def epoch(self) -> int:
    """Number of batches in one pass, which is the number of rows of a part."""
    return math.ceil(self._size / self._batch_size)

  def read(self, number: int, lanes: np.ndarray) -> order.Read:
    """Returns some rows of a batch.

    Args:
      number: number of the batch, from 0.
      lanes: places of the rows in the batch.
    """
    part = self._pass_of(number)
    index = lanes * part.length + part.place
    rows, before = part.at(index), part.at(index - 1)
    goes_on = (part.place > 0) & (rows > 0) & (rows == before + 1)
    return order.Read(0, rows, np.full(len(lanes), part.visit), goes_on)

  def rest(self, number: int) -> tuple[np.ndarray, int]:
    """Returns the unread rows after `number` batches, and their visit."""
    part = self._pass_of(number)
    index = np.arange(self._batch_size * part.length)
    index = index.reshape(-1, part.length)[:, part.place :].ravel()
    rows = part.at(index)
    return rows[rows >= 0], part.visit

  def _pass_of(self, number: int) -> '_Pass':
    first = math.ceil(len(self._left) / self._batch_size)
    if number < first:
      return _Pass(self._left, first, number, self._visit)
    past, place = divmod(number - first, self.epoch)
    return _Pass(range(self._size), self.epoch, place, self._visit + 1 + past)


class _Pass(NamedTuple):
  """One pass over rows, cut into equal parts that are read in parallel.

  Attributes:
    rows: the rows of the pass, in text order.
    length: number of rows in a part.
    place: number of the row that is read next in each part.
    visit: number of passes before this one.
  """

  rows: np.ndarray | range
  length: int
  place: int
  visit: int

  def at(self, index: np.ndarray) -> np.ndarray:
    """Returns the rows at some indices of the pass, -1 past its end."""
    is_row = index < len(self.rows)
    if isinstance(self.rows, np.ndarray):
      index = self.rows[np.where(is_row, index, 0)]
    return np.where(is_row, index, -1)
