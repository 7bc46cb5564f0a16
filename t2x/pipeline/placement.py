"""Which layers each part of a pipeline holds, and where a device keeps them.

The layers of a tower come in units: one repeat of its group of layers, the last
perhaps with fewer. A part holds consecutive units of one tower. A device has
several slots for the units of each tower, as many as the fullest device needs,
since all run one program.

Shape suffixes: S stages, P parts, N slots of a tower on a device.
"""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from t2x.pipeline import schedule as schedule_lib


class PartsError(ValueError):
  """Not one layer for each part of a pipeline, or no part for a tower."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tower:
  """A stack of layers.

  Attributes:
    name: in the model.
    num_layers: in all.
    group: layers of a unit.
  """

  name: str
  num_layers: int
  group: int = 1

  @property
  def num_units(self) -> int:
    return -(-self.num_layers // self.group)


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
  """Where the parts' layers are.

  Attributes:
    towers: in order of depth.
    tower_P: the tower of each part.
    first_P: its first unit.
    units_P: how many units it has.
    slot_P: where they begin on its device.
    unit_SN: for each tower, the unit in each slot; -1 where there is none.
  """

  towers: tuple[Tower, ...]
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
    """For each tower, the most units of a part."""
    towers = range(len(self.towers))
    return tuple(int(self.units_P[self.tower_P == t].max()) for t in towers)

  @property
  def is_contiguous(self) -> bool:
    """Whether each stage has the same share of every tower, in order."""
    for tower, unit_SN in zip(self.towers, self.unit_SN):
      if tower.num_layers % (tower.group * len(unit_SN)):
        return False
      if not np.array_equal(unit_SN.ravel(), np.arange(tower.num_units)):
        return False
    return True


def place(
  towers: Sequence[Tower],
  units_P: Sequence[int],
  table: schedule_lib.Schedule,
) -> Placement:
  """Places units, part by part.

  Args:
    towers: in order of depth.
    units_P: units of each part; a part lies within one tower.
    table: says which parts a stage has.

  Raises:
    ValueError: the parts are not as many as the table's, one is empty, or
      they do not make up the towers.
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


def _layers(tower: Tower) -> str:
  units = 'layers' if tower.group == 1 else f'groups of {tower.group} layers'
  return f'{tower.num_units} {units} of the {tower.name}'


def _slots(num_towers, tower_P, first_P, units_P, stage_P, table):
  """Returns where parts begin on their devices, and what the slots hold."""
  held = [[[] for _ in range(table.num_stages)] for _ in range(num_towers)]
  slot_P = np.zeros_like(units_P)
  for p, (t, s) in enumerate(zip(tower_P, stage_P)):
    slot_P[p] = len(held[t][s])
    held[t][s] += range(first_P[p], first_P[p] + units_P[p])
  unit_SN = []
  for rows in held:
    num = max(map(len, rows))
    unit_SN.append(np.array([r + [-1] * (num - len(r)) for r in rows]))
  return slot_P, tuple(unit_SN)


def even(towers: Sequence[Tower], num_parts: int) -> list[int]:
  """Returns units of each part: as even as can be, none across towers.

  Raises:
    PartsError: fewer units than parts, or fewer parts than towers.
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
    # Later parts have one less: the last stage has the head besides.
    small, rest = divmod(size, parts)
    result += [small + 1] * rest + [small] * (parts - rest)
  return result


def _shares(sizes: list[int], num_parts: int) -> list[int]:
  """Returns the parts of each tower, so that the fullest is least full."""
  shares = [1] * len(sizes)
  for _ in range(num_parts - len(sizes)):
    loads = [math.ceil(s / n) if n < s else 0 for s, n in zip(sizes, shares)]
    # Of equals, the one that has the fewest parts for its size.
    best = max(
      range(len(sizes)), key=lambda i: (loads[i], sizes[i] / shares[i])
    )
    shares[best] += 1
  return shares
