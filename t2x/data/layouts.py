"""The interface of layouts: which tokens of a split stand in which row."""

from typing import Protocol

import numpy as np

from t2x.data import counts


class RowLayout(Protocol):
  """The rows of a split, in groups of equal length."""

  @property
  def order(self) -> tuple:
    """Values that decide which tokens a row has, besides those of the split."""
    ...

  def count(self) -> counts.Count:
    """Returns the number of documents and tokens that an epoch reads."""
    ...

  def group_lengths(self) -> tuple[int, ...]:
    """Returns the row length of each group, ascending."""
    ...

  def group_sizes(self) -> tuple[int, ...]:
    """Returns the number of rows in each group."""
    ...

  def examples(self, group: int, rows: np.ndarray) -> np.ndarray:
    """Returns the numbers of some rows in the split, across groups.

    Args:
      group: number of the rows' group.
      rows: numbers of the rows in the group.
    """
    ...

  def read(self, group: int, rows: np.ndarray, keys: np.ndarray) -> tuple:
    """Returns the positional arguments of the objective's `examples`.

    Args:
      group: number of the rows' group.
      rows: numbers of the rows in the group; a row of -1 is empty.
      keys: keys of the random draws, one for each row.
    """
    ...


class OneGroup(RowLayout):
  """A layout whose rows all have one length."""

  _length: int

  def group_lengths(self) -> tuple[int, ...]:
    return (self._length,)

  def examples(self, group: int, rows: np.ndarray) -> np.ndarray:
    del group  # There is one.
    return rows
