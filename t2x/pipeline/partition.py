"""Divides a chain of units into consecutive parts by dynamic programming.

Shape suffixes: U ends of parts, 0 to the number of units.
"""

import dataclasses

import numpy as np

_NEVER = 2**62


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
  """The costs of units in order.

  Attributes:
    costs: cost of each unit, integers with a sum below 2^30.
    first: additional cost of the first part.
    last: additional cost of the last part.
  """

  costs: np.ndarray
  first: int
  last: int
  _slowest: dict[int, list[int]] = dataclasses.field(
    default_factory=dict, init=False
  )

  def slowest(self, num: int, most: int) -> int:
    """Returns the cost of the most expensive part in the best division.

    Args:
      num: number of parts.
      most: most units that a part may have.
    """
    if most not in self._slowest:
      cost_UU = self._parts(most)
      first_UU = np.minimum(cost_UU + self.first, _NEVER)
      last_U = np.minimum(cost_UU[:, -1] + self.last, _NEVER)
      # Entry n is for n parts. The first part begins at 0.
      one_part = min(int(first_UU[0, -1]) + self.last, _NEVER)
      results = [_NEVER, one_part]
      best_U = first_UU[0]
      for _ in range(len(self.costs) - 1):
        results.append(int(np.maximum(best_U, last_U).min()))
        best_U = np.maximum(best_U[:, None], cost_UU).min(0)
      self._slowest[most] = results
    return self._slowest[most][num]

  def even(self, near: np.ndarray, most: int, bound: int) -> np.ndarray:
    """Returns the units of each part with the least sum of squared costs.

    Of several such divisions it is the one closest to a given one.

    Args:
      near: units of each part in the given division.
      most: most units that a part may have.
      bound: highest cost that a part may have; some division must meet it.
    """
    size, num = len(self.costs), len(near)
    cost_UU = self._parts(most)
    units_UU = np.arange(size + 1) - np.arange(size + 1)[:, None]
    square_U = np.where(np.arange(size + 1), _NEVER, 0)
    away_U = np.zeros(size + 1, int)
    begins = []
    for part in range(num):
      cost = cost_UU + self.first * (part == 0) + self.last * (part == num - 1)
      there_UU = (cost <= bound) & (square_U[:, None] < _NEVER)
      squares = np.where(
        there_UU, square_U[:, None] + cost * there_UU * cost, 0
      )
      squares = np.where(there_UU, squares, _NEVER)
      square_U = squares.min(0)
      away = away_U[:, None] + np.abs(units_UU - near[part])
      away = np.where(squares == square_U, away, _NEVER)
      begins.append(away.argmin(0))
      away_U = away.min(0)
    assert square_U[-1] < _NEVER, bound
    ends = [size]
    for begin_U in reversed(begins):
      ends.append(int(begin_U[ends[-1]]))
    return np.diff(ends[::-1])

  def _parts(self, most: int) -> np.ndarray:
    """Returns the cost of a part by its begin and its end, cost_UU."""
    before_U = np.concatenate([[0], np.cumsum(self.costs)])
    units = np.arange(len(before_U)) - np.arange(len(before_U))[:, None]
    fits = (units >= 1) & (units <= most)
    return np.where(fits, before_U - before_U[:, None], _NEVER)
