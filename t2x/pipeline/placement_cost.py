"""What a placement of layers costs: the load of each stage, a device's bytes.

All devices run one program, so each has room for as much as the fullest one
needs (see `placement` and `instructions`), and that is what is counted.

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
class Stack:
  """What a tower costs.

  Attributes:
    tower: whose layers these are.
    costs: of each unit in a step, forward and backward.
    first: of the tower's first part besides.
    last: of its last part besides.
    unit_bytes: of each unit that a device has.
    kept_bytes: of a unit, for each part and microbatch from its forward (or
      the one that is run again) until its W.
    left_bytes: the same from B until W.
  """

  tower: placement_lib.Tower
  costs: tuple[float, ...]
  first: float = 0.0
  last: float = 0.0
  unit_bytes: float = 0.0
  kept_bytes: float = 0.0
  left_bytes: float = 0.0

  def __post_init__(self):
    assert len(self.costs) == self.tower.num_units, self.tower
    assert min(*self.costs, self.first, self.last, math.inf) >= 0, self.costs


class CostModel:
  """What is to be placed, and how good a placement is.

  Args:
    stacks: of the towers, in order of depth.
    table: the schedule.
    fixed_bytes: of a device, whatever the placement.
    moved_bytes: besides, unless layers stay where they are kept.
    limit: bytes of a device, or None.
  """

  def __init__(
    self,
    stacks: Sequence[Stack],
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
    # The parts of each stage.
    self.part_SV = np.argsort(stage_P, kind='stable').reshape(
      table.num_stages, -1
    )
    self.stage_P = stage_P
    self.costs, self.firsts, self.lasts = _whole(stacks)
    self.before_U = np.concatenate([[0], np.cumsum(np.concatenate(self.costs))])

  @property
  def moving_bytes(self) -> float:
    """What a device needs besides its units, where layers move."""
    return self._fixed + self._moved

  def shares(self) -> Iterator[tuple[int, ...]]:
    """Yields how many parts each tower can have."""
    parts, sizes = self.table.num_parts, self.sizes
    for some in itertools.product(*(range(1, n + 1) for n in sizes[:-1])):
      rest = parts - sum(some)
      if 1 <= rest <= sizes[-1]:
        yield (*some, rest)

  def spread(self, shares: Sequence[int]) -> np.ndarray:
    """Returns units as even as can be, for given parts of each tower."""
    pieces = [
      placement_lib.even([tower], num)
      for tower, num in zip(self.towers, shares)
    ]
    return np.concatenate(pieces)

  def shares_of(self, units_P: np.ndarray) -> list[int]:
    """Returns how many parts each tower has."""
    ends = np.searchsorted(np.cumsum(units_P), np.cumsum(self.sizes)) + 1
    return np.diff(ends, prepend=0).tolist()

  def rank(self, units_P: np.ndarray) -> tuple[float, ...]:
    """Returns what is least for the best placement."""
    shares = self.shares_of(units_P)
    return tuple(float(key[0]) for key in self.ranks(units_P[None], shares))

  def ranks(self, units_CP, shares) -> list[np.ndarray]:
    """Returns the keys of placements, the first counts most."""
    load_CS = self._loads(units_CP, shares)
    bytes_C = self.bytes(units_CP, shares)
    excess_C = np.maximum(bytes_C - (self.limit or math.inf), 0)
    away_C = np.abs(units_CP - self.even_P).sum(1)
    return [excess_C, load_CS.max(1), (load_CS**2).sum(1), away_C]

  def _loads(self, units_CP, shares):
    end_CP = np.cumsum(units_CP, 1)
    cost_CP = self.before_U[end_CP] - self.before_U[end_CP - units_CP]
    cost_CP += self.extra_P(shares)
    return cost_CP[:, self.part_SV].sum(-1)

  def extra_P(self, shares) -> np.ndarray:
    """Returns what parts cost besides their units."""
    extra_P = np.zeros(self.table.num_parts, int)
    ends = np.cumsum(shares)
    np.add.at(extra_P, ends - shares, self.firsts)
    np.add.at(extra_P, ends - 1, self.lasts)
    return extra_P

  def bytes_of(self, units_P: np.ndarray) -> float:
    return float(self.bytes(units_P[None], self.shares_of(units_P))[0])

  def bytes(self, units_CP, shares) -> np.ndarray:
    """Returns what a device needs, of placements (C, P)."""
    stays_C = self._even_stays & (units_CP == self.even_P).all(1)
    bytes_C = self._fixed + np.where(stays_C, 0.0, self._moved)
    begin = 0
    for t, num in enumerate(shares):
      end = begin + num
      unit, part = self.prices(t, begin, end)
      own_SV = (self.part_SV >= begin) & (self.part_SV < end)
      held_CS = (units_CP[:, self.part_SV] * own_SV).sum(-1)
      bytes_C = bytes_C + unit * held_CS.max(1)
      bytes_C = bytes_C + part * units_CP[:, begin:end].max(1)
      begin = end
    return bytes_C

  def prices(self, t: int, begin: int, end: int) -> tuple[float, float]:
    """Returns bytes of a unit of the fullest device, and of the fullest part.

    Args:
      t: the tower.
      begin: its first part.
      end: the one after its last.
    """
    kept, left = self._in_flight(begin, end)
    stack = self.stacks[t]
    return stack.unit_bytes, stack.kept_bytes * kept + stack.left_bytes * left

  def _in_flight(self, begin, end) -> tuple[int, int]:
    """Returns how many parts wait at most on a stage, for W and from B on."""
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


def _whole(stacks):
  """Returns costs as integers, so that equal loads are equal.

  Those of up to 2^29 in all keep their value, up to a power of two; squares of
  sums fit into 64 bits.
  """
  total = sum(sum(s.costs) + s.first + s.last for s in stacks)
  scale = 2.0 ** (29 - math.frexp(total)[1]) if total else 1.0
  whole = lambda values: np.rint(np.array(values) * scale).astype(int)
  costs = [whole(s.costs) for s in stacks]
  return (
    costs,
    whole([s.first for s in stacks]),
    whole([s.last for s in stacks]),
  )
