"""The layers of each part of a pipeline, and the slots of a device for them.

The layers of a tower are divided into units. A unit is one repeat of the
tower's group of layers; the last unit may have fewer layers. A part has
consecutive units of one tower. A device has slots for the units of each tower.
All devices run one program, so each has as many slots as the fullest one needs.

Shape suffixes: S stages, P parts, N slots of a tower on a device.
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from t2x.pipeline import schedule as schedule_lib


class PartsError(ValueError):
  """There are fewer layers than parts, or fewer parts than towers."""


@dataclasses.dataclass(frozen=True, eq=False)
class TowerLayers:
  """A stack of layers.

  Attributes:
    name: name of the stack in the model.
    num_layers: number of layers.
    group: number of layers in a unit.
  """

  name: str
  num_layers: int
  group: int = 1

  @property
  def num_units(self) -> int:
    """Number of units; the last may have fewer layers."""
    return -(-self.num_layers // self.group)


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
  """The layers of each part, and their slots.

  Attributes:
    towers: towers, in order of depth.
    tower_P: index of each part's tower.
    first_P: index of each part's first unit in its tower.
    units_P: number of each part's units.
    slot_P: slot of each part's first unit on its device.
    unit_SN: unit in each slot, -1 in an empty slot; one array for each tower.
  """

  towers: tuple[TowerLayers, ...]
  tower_P: np.ndarray
  first_P: np.ndarray
  units_P: np.ndarray
  slot_P: np.ndarray
  unit_SN: tuple[np.ndarray, ...]

  @property
  def enters_P(self) -> np.ndarray:
    """Whether a part is the first of its tower."""
    before = np.concatenate([[-1], self.tower_P[:-1]])
    return self.tower_P != before

  @property
  def most_units(self) -> tuple[int, ...]:
    """Most units of a part, for each tower."""
    towers = range(len(self.towers))
    return tuple(int(self.units_P[self.tower_P == t].max()) for t in towers)

  @property
  def is_contiguous(self) -> bool:
    """Whether each stage has the same share of every tower, in order.

    The layers of a stage are then those after the layers of the stage before.
    """
    for tower, unit_SN in zip(self.towers, self.unit_SN):
      if tower.num_layers % (tower.group * len(unit_SN)):
        return False
      if not np.array_equal(unit_SN.ravel(), np.arange(tower.num_units)):
        return False
    return True


def place(
  towers: Sequence[TowerLayers],
  units_P: Sequence[int],
  table: schedule_lib.Schedule,
) -> Placement:
  """Assigns units to the parts in order of depth, and slots to the units.

  Args:
    towers: towers, in order of depth.
    units_P: number of units of each part. No part has units of two towers.
    table: schedule, which says which parts a stage has.

  Raises:
    ValueError: the number of parts is not that of the schedule, a part is
      empty, or the parts of a tower do not add up to its units.
  """
  units = np.asarray(units_P, int)
  if len(units) != table.num_parts or (units < 1).any():
    raise ValueError(
      f'pipeline.layers={tuple(units_P)}: the {table.num_stages} stages x '
      f'{table.num_chunks} chunks of {table.name} take {table.num_parts} '
      'numbers, each 1 or more.'
    )
  ends = np.cumsum(units)
  tower_ends = np.cumsum([t.num_units for t in towers])
  if ends[-1] != tower_ends[-1] or not set(tower_ends) <= set(ends):
    of_one = '; none has layers of two towers' if len(towers) > 1 else ''
    raise ValueError(
      f'pipeline.layers={tuple(units_P)} adds up to {ends[-1]}. The parts must '
      f'make up {", the next ones ".join(map(_layers, towers))}{of_one}.'
    )
  tower_P = np.searchsorted(tower_ends, ends - units, side='right')
  first_P = ends - units - np.concatenate([[0], tower_ends])[tower_P]
  stage_P = np.array([table.stage_of(p) for p in range(len(units))])
  slot_P, unit_SN = _slots(len(towers), tower_P, first_P, units, stage_P, table)
  return Placement(tuple(towers), tower_P, first_P, units, slot_P, unit_SN)


def _layers(tower: TowerLayers) -> str:
  units = 'layers' if tower.group == 1 else f'groups of {tower.group} layers'
  return f'{tower.num_units} {units} of the {tower.name}'


def _slots(
  num_towers: int,
  tower_P: np.ndarray,
  first_P: np.ndarray,
  units_P: np.ndarray,
  stage_P: np.ndarray,
  table: schedule_lib.Schedule,
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
  """Returns the slot of each part's first unit, and the unit in each slot."""
  units = [[[] for _ in range(table.num_stages)] for _ in range(num_towers)]
  slot_P = np.zeros_like(units_P)
  for p, (t, s) in enumerate(zip(tower_P, stage_P)):
    slot_P[p] = len(units[t][s])
    units[t][s] += range(first_P[p], first_P[p] + units_P[p])
  unit_SN = []
  for rows in units:
    num = max(map(len, rows))
    unit_SN.append(np.array([r + [-1] * (num - len(r)) for r in rows]))
  return slot_P, tuple(unit_SN)


def even(towers: Sequence[TowerLayers], num_parts: int) -> list[int]:
  """Returns the units of each part, divided as evenly as possible.

  No part has units of two towers.

  Args:
    towers: towers, in order of depth.
    num_parts: number of parts, P.

  Raises:
    PartsError: there are fewer units than parts, or fewer parts than towers.
  """
  sizes = [t.num_units for t in towers]
  if num_parts < len(towers) or num_parts > sum(sizes):
    units = ' + '.join(
      f'{t.num_units} ({t.name}, {t.group} to a group)'
      if t.group > 1
      else f'{t.num_units} ({t.name})'
      for t in towers
    )
    raise PartsError(
      f'{num_parts} parts of a pipeline for {units} layers: each part needs '
      'one of its own. Choose fewer stages or chunks (mesh.pipe, '
      f'pipeline.chunks), at most {sum(sizes)} parts and at least '
      f'{len(towers)}.'
    )
  shares = _shares(sizes, num_parts)
  result = []
  for size, parts in zip(sizes, shares):
    # Later parts have one unit less: the last stage has the head, too.
    small, more = divmod(size, parts)
    result += [small + 1] * more + [small] * (parts - more)
  return result


def _shares(sizes: list[int], num_parts: int) -> list[int]:
  """Returns the number of parts of each tower.

  The most units of a part are as few as possible.
  """
  shares = [1] * len(sizes)
  for _ in range(num_parts - len(sizes)):
    loads = [math.ceil(s / n) if n < s else 0 for s, n in zip(sizes, shares)]
    # Of equally full towers, the one that has the fewest parts for its size.
    best = max(
      range(len(sizes)), key=lambda i: (loads[i], sizes[i] / shares[i])
    )
    shares[best] += 1
  return shares
