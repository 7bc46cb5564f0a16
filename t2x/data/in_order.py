"""Which rows a step reads where each row of a batch goes on."""

import math
from typing import NamedTuple

import numpy as np

from t2x.data import order


class InOrder:
  """Batches whose row b reads the b-th part of a split from start to end."""

  def __init__(
    self,
    size: int,
    batch_size: int,
    left: np.ndarray | None = None,
    visit: int = 0,
  ):
    """Begins with what is `left` of a visit, then reads all, again and again.

    Args:
      size: rows of the split.
      batch_size: parts that are read at a time.
      left: rows in the order of the text; None for all of them.
      visit: how often they were read before.
    """
    self._size = size
    self._batch_size = batch_size
    self._left: np.ndarray | range = range(size) if left is None else left
    self._visit = visit

  @property
  def epoch(self) -> int:
    """Batches of a pass, the rows of a part."""
    return math.ceil(self._size / self._batch_size)

  def read(self, number: int, lanes: np.ndarray) -> order.Read:
    """Returns rows `lanes` of the batch of a number."""
    part = self._pass_of(number)
    index = lanes * part.length + part.place
    rows, before = part.at(index), part.at(index - 1)
    goes_on = (part.place > 0) & (rows > 0) & (rows == before + 1)
    return order.Read(0, rows, np.full(len(lanes), part.visit), goes_on)

  def rest(self, number: int) -> tuple[np.ndarray, int]:
    """Returns the rows that are left after so many batches, and their visit."""
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
  """What is read once: its rows, those of a part, and a place in each part."""

  rows: np.ndarray | range
  length: int
  place: int
  visit: int

  def at(self, index: np.ndarray) -> np.ndarray:
    """Returns the rows at places of the pass, -1 past its end."""
    is_row = index < len(self.rows)
    if isinstance(self.rows, np.ndarray):
      index = self.rows[np.where(is_row, index, 0)]
    return np.where(is_row, index, -1)
