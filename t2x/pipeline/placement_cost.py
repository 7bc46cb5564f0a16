"""Costs of a placement of layers: the load of each stage, and a device's bytes.

All devices run one program, so each allocates as many bytes as the fullest one
needs (see `placement` and `instructions`). Those are the bytes counted here.

Shape suffixes: T ticks, U ends of units, P parts, S stages, V chunks, C
candidates.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import itertools
import math

import numpy as np

from t2x.pipeline import operations as ops
from t2x.pipeline import placement as placement_lib
from t2x.pipeline import schedule as schedule_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerCosts:
  """The costs of a tower, in FLOPs or in any unit of time, and its bytes.

  Attributes:
    tower: the tower.
    costs: cost of each unit in a step, forward and backward.
    first: additional cost of the tower's first part.
    last: additional cost of the tower's last part.
    unit_bytes: bytes of the parameters of each unit that a device has.
    kept_bytes: bytes of a unit's activations, for each microbatch from its
      forward (or from R, with recomputation) until its W.
    left_bytes: bytes of a unit's activations, for each microbatch from its B
      until its W.
  """

  tower: placement_lib.TowerLayers
  costs: tuple[float, ...]
  first: float = 0.0
  last: float = 0.0
  unit_bytes: float = 0.0
  kept_bytes: float = 0.0
  left_bytes: float = 0.0

  def __post_init__(self) -> None:
    assert len(self.costs) == self.tower.num_units, self.tower
    assert min(*self.costs, self.first, self.last, math.inf) >= 0, self.costs


class CostModel:
  """The layers to be placed, and how good a placement of them is.

  Args:
    stacks: costs of the towers, in order of depth.
    table: schedule.
    fixed_bytes: bytes that a device needs whatever the placement is.
    moved_bytes: bytes that a device needs in addition where layers move from
      where they are kept to where they are used.
    limit: most bytes that a device may need, or None for no limit.

  Attributes:
    stacks: costs of the towers, in order of depth.
    table: schedule.
    limit: most bytes that a device may need, or None for no limit.
    towers: towers, in order of depth.
    sizes: number of units of each tower.
    even_P: units of each part in the even placement.
    part_SV: parts of each stage.
    stage_P: stage of each part.
    costs: cost of each unit, one array of scaled integers for each tower.
    firsts: additional cost of the first part of each tower, scaled alike.
    lasts: additional cost of the last part of each tower, scaled alike.
    before_U: sum of the costs of the units before each end of a unit.
  """

  def __init__(
    self,
    stacks: Sequence[TowerCosts],
    table: schedule_lib.Schedule,
    fixed_bytes: float,
    moved_bytes: float,
    limit: float | None,
  ):
    self.stacks, self.table, self.limit = stacks, table, limit
    self.towers = [stack.tower for stack in stacks]
    self.sizes = [tower.num_units for tower in self.towers]
    self._fixed, self._moved = fixed_bytes, moved_bytes
    self._peaks = {}
    parts = table.num_parts
    even = placement_lib.even(self.towers, parts)
    self.even_P = np.array(even)
    place = placement_lib.place(self.towers, even, table)
    self._even_stays = place.is_contiguous
    stage_P = table.stage_of(np.arange(parts))
    self.part_SV = np.argsort(stage_P, kind='stable').reshape(
      table.num_stages, -1
    )
    self.stage_P = stage_P
    self.costs, self.firsts, self.lasts = _as_integers(stacks)
    self.before_U = np.concatenate([[0], np.cumsum(np.concatenate(self.costs))])

  @property
  def moving_bytes(self) -> float:
    """Bytes that a device needs in addition to its units, where layers move."""
    return self._fixed + self._moved

  def shares(self) -> Iterator[tuple[int, ...]]:
    """Yields each possible number of parts of the towers."""
    parts, sizes = self.table.num_parts, self.sizes
    for some in itertools.product(*(range(1, n + 1) for n in sizes[:-1])):
      last = parts - sum(some)
      if 1 <= last <= sizes[-1]:
        yield (*some, last)

  def spread(self, shares: Sequence[int]) -> np.ndarray:
    """Returns the units of each part, divided as evenly as possible.

    Args:
      shares: number of parts of each tower.
    """
    pieces = [
      placement_lib.even([tower], num)
      for tower, num in zip(self.towers, shares)
    ]
    return np.concatenate(pieces)

  def shares_of(self, units_P: np.ndarray) -> list[int]:
    """Returns the number of parts of each tower in a placement.

    Args:
      units_P: units of each part.
    """
    ends = np.searchsorted(np.cumsum(units_P), np.cumsum(self.sizes)) + 1
    return np.diff(ends, prepend=0).tolist()

  def rank(self, units_P: np.ndarray) -> tuple[float, ...]:
    """Returns the sort key of a placement: the best one has the least.

    Args:
      units_P: units of each part.
    """
    shares = self.shares_of(units_P)
    return tuple(float(key[0]) for key in self.ranks(units_P[None], shares))

  def ranks(
    self, units_CP: np.ndarray, shares: Sequence[int]
  ) -> list[np.ndarray]:
    """Returns the sort keys of placements, (C,) each, the main one first.

    They are the bytes beyond the limit, the load of the slowest stage, the sum
    of squared loads, and the distance from the even placement.

    Args:
      units_CP: units of each part, for each placement.
      shares: number of parts of each tower, in all of them.
    """
    load_CS = self._loads(units_CP, shares)
    bytes_C = self.bytes(units_CP, shares)
    excess_C = np.maximum(bytes_C - (self.limit or math.inf), 0)
    away_C = np.abs(units_CP - self.even_P).sum(1)
    return [excess_C, load_CS.max(1), (load_CS**2).sum(1), away_C]

  def _loads(self, units_CP: np.ndarray, shares: Sequence[int]) -> np.ndarray:
    end_CP = np.cumsum(units_CP, 1)
    cost_CP = self.before_U[end_CP] - self.before_U[end_CP - units_CP]
    cost_CP += self.extra_P(shares)
    return cost_CP[:, self.part_SV].sum(-1)

  def extra_P(self, shares: Sequence[int]) -> np.ndarray:
    """Returns the cost of each part in addition to its units.

    Args:
      shares: number of parts of each tower.
    """
    extra_P = np.zeros(self.table.num_parts, int)
    ends = np.cumsum(shares)
    np.add.at(extra_P, ends - np.asarray(shares), self.firsts)
    np.add.at(extra_P, ends - 1, self.lasts)
    return extra_P

  def bytes_of(self, units_P: np.ndarray) -> float:
    """Returns the bytes that a device needs for a placement.

    Args:
      units_P: units of each part.
    """
    return float(self.bytes(units_P[None], self.shares_of(units_P))[0])

  def bytes(self, units_CP: np.ndarray, shares: Sequence[int]) -> np.ndarray:
    """Returns the bytes that a device needs for each placement, bytes_C.

    Args:
      units_CP: units of each part, for each placement.
      shares: number of parts of each tower, in all of them.
    """
    stays_C = self._even_stays & (units_CP == self.even_P).all(1)
    bytes_C = self._fixed + np.where(stays_C, 0.0, self._moved)
    begin = 0
    for t, num in enumerate(shares):
      end = begin + num
      unit, part = self.prices(t, begin, end)
      of_tower_SV = (self.part_SV >= begin) & (self.part_SV < end)
      units_CS = (units_CP[:, self.part_SV] * of_tower_SV).sum(-1)
      bytes_C = bytes_C + unit * units_CS.max(1)
      bytes_C = bytes_C + part * units_CP[:, begin:end].max(1)
      begin = end
    return bytes_C

  def prices(self, t: int, begin: int, end: int) -> tuple[float, float]:
    """Returns the bytes that each unit of a tower adds to a device.

    Args:
      t: index of the tower.
      begin: index of its first part.
      end: index of the part after its last.

    Returns:
      Bytes for each unit on the device with most units, and bytes for each unit
      in the part with most units.
    """
    kept, left = self._in_flight(begin, end)
    stack = self.stacks[t]
    return stack.unit_bytes, stack.kept_bytes * kept + stack.left_bytes * left

  def _in_flight(self, begin: int, end: int) -> tuple[int, int]:
    """Returns the most microbatches of parts that wait for W on a stage.

    Args:
      begin: index of a tower's first part.
      end: index of the part after its last.

    Returns:
      The number from F (or R) until W, and the number from B until W.
    """
    if (begin, end) not in self._peaks:
      table = self.table
      tick = table.tick_OMP[..., begin:end]
      made = ops.RECOMPUTE if table.recompute else ops.FORWARD
      stage_P = self.stage_P[begin:end]
      peaks = []
      for operation in (made, ops.BACKWARD):
        more_TS = np.zeros((table.num_ticks + 1, table.num_stages), int)
        np.add.at(more_TS, (tick[operation], stage_P), 1)
        np.add.at(more_TS, (tick[ops.WEIGHT] + 1, stage_P), -1)
        peaks.append(int(np.cumsum(more_TS, 0).max()))
      self._peaks[begin, end] = tuple(peaks)
    return self._peaks[begin, end]


def _as_integers(
  stacks: Sequence[TowerCosts],
) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
  """Returns costs scaled to integers, so that equal loads compare as equal.

  The scale is a power of two, and squares of sums fit into 64 bits. Integers
  with a sum of up to 2^29 are exact.

  Returns:
    The costs of each tower's units, and the additional costs of the towers'
    first and last parts.
  """
  total = sum(sum(s.costs) + s.first + s.last for s in stacks)
  scale = 2.0 ** (29 - math.frexp(total)[1]) if total else 1.0
  scaled = lambda values: np.rint(np.array(values) * scale).astype(int)
  costs = [scaled(s.costs) for s in stacks]
  return (
    costs,
    scaled([s.first for s in stacks]),
    scaled([s.last for s in stacks]),
  )
