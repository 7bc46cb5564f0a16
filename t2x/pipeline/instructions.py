"""What each device is told in each tick, from a schedule's table.

Messages that arrive wait in slots of an inbox; so do the activations between a
forward and its backward. Which slot is free when is known beforehand: slots are
given out here, and buffers have as many as the fullest device ever needs.

Shape suffixes: T ticks, S stages, P parts, M microbatches.
"""

import dataclasses
import heapq
from typing import Any

import numpy as np

from t2x.pipeline import operations as ops
from t2x.pipeline import placement as placement_lib
from t2x.pipeline import schedule as schedule_lib

COLUMNS: tuple[str, ...] = (
  'operation',
  'microbatch',
  'tower',
  'units',  # Units of the part.
  'unit',  # Its first unit in the tower.
  'slot',  # The same on the device.
  'enters',  # 1 for the first part of a tower.
  'ends',  # 1 for the last part of all.
  'input',  # Inbox: what came from the part before.
  'gradient',  # Inbox: what came from the part after; the output, of the last.
  'until_backward',  # What F leaves for B, all units of a part to a slot.
  'until_weight',  # What F leaves for W, the same.
  'crossing',  # What B leaves for W, the same.
  'from_self',  # Inbox: where what this device makes goes, if it stays.
  'from_previous',  # Inbox: where the message of the stage before goes.
  'from_next',  # Inbox: where the message of the stage after goes.
)


# The loops of a tick, by what runs in them.
LOOPS = (
  'enter',
  'forward',
  'recompute',
  'measure',
  'leave',
  'backward',
  'enter_backward',
  'weight',
)
_UNITS = {
  'forward': ops.FORWARD,
  'recompute': ops.RECOMPUTE,
  'backward': ops.BACKWARD,
  'weight': ops.WEIGHT,
}


def trips(loop: str, tower: int, columns: dict[str, Any]) -> Any:
  """Returns how often a loop runs.

  Args:
    loop: one of LOOPS.
    tower: whose part it is for; any for `measure` and `leave`.
    columns: integers, or arrays of any shape.
  """
  c, operation = columns, columns['operation']
  mine = c['tower'] == tower
  if loop in _UNITS:
    return (operation == _UNITS[loop]) * mine * c['units']
  if loop == 'enter':
    # What later towers look at is made of their input, whatever is done.
    runs = operation != ops.IDLE
    if not tower:
      runs = (operation == ops.FORWARD) | (operation == ops.RECOMPUTE)
    return runs * mine * c['enters']
  if loop == 'enter_backward':
    return (operation == ops.BACKWARD) * mine * c['enters']
  is_it = operation == {'measure': ops.FORWARD, 'leave': ops.BACKWARD}[loop]
  return is_it * c['ends']


@dataclasses.dataclass(frozen=True, eq=False)
class Instructions:
  """A table for devices.

  Attributes:
    rows_TSC: int32, in the order of COLUMNS.
    sends_down_T: whether any stage sends to the next.
    sends_up_T: whether any stage sends to the one before.
    inbox: slots that messages need. Slot `inbox` is for what no one reads.
    stored: for each tower, slots between F and B, and between F and W.
    crossing: for each tower, slots between B and W.
  """

  rows_TSC: np.ndarray
  sends_down_T: np.ndarray
  sends_up_T: np.ndarray
  inbox: int
  stored: tuple[tuple[int, int], ...]
  crossing: tuple[int, ...]

  @property
  def columns(self) -> dict[str, np.ndarray]:
    """Each column by name, (T, S)."""
    return dict(zip(COLUMNS, np.moveaxis(self.rows_TSC, -1, 0)))

  def trips(self, loop: str, tower: int) -> np.ndarray:
    """Returns how often each stage runs a loop, over all ticks."""
    return trips(loop, tower, self.columns).sum(0)


class _Lives:
  """When slots are taken: from the end of tick `start` to tick `end`."""

  def __init__(self):
    self._of_stage: dict[int, list[tuple[int, int, tuple]]] = {}

  def add(self, stage: int, start: int, end: int, key: tuple) -> None:
    self._of_stage.setdefault(stage, []).append((start, end, key))

  def slots(self) -> tuple[dict[tuple, int], int]:
    """Returns the slot of each key, and how many there are."""
    slots, size = {}, 0
    for lives in self._of_stage.values():
      free, taken, num = [], [], 0
      for start, end, key in sorted(lives):
        while taken and taken[0][0] <= start:
          heapq.heappush(free, heapq.heappop(taken)[1])
        if free:
          slot = heapq.heappop(free)
        else:
          slot, num = num, num + 1
        slots[key] = slot
        heapq.heappush(taken, (end, slot))
      size = max(size, num)
    return slots, size


def make(
  table: schedule_lib.Schedule, place: placement_lib.Placement
) -> Instructions:
  """Returns the instructions of a table.

  Args:
    table: the schedule.
    place: the layers of its parts.
  """
  columns = {
    name: np.zeros(table.operation_TS.shape, np.int32) for name in COLUMNS
  }
  columns['operation'][:] = table.operation_TS
  columns['microbatch'][:] = table.microbatch_TS
  part_TS = table.part(np.arange(table.num_stages)[None], table.chunk_TS)
  columns['tower'][:] = place.tower_P[part_TS]
  busy_TS = table.operation_TS != ops.IDLE
  columns['units'][:] = np.where(busy_TS, place.units_P[part_TS], 0)
  columns['unit'][:] = place.first_P[part_TS]
  columns['slot'][:] = place.slot_P[part_TS]
  columns['enters'][:] = busy_TS & place.enters_P[part_TS]
  columns['ends'][:] = busy_TS & (part_TS == table.num_parts - 1)
  sends = {
    'from_previous': np.zeros(table.num_ticks, bool),
    'from_next': np.zeros(table.num_ticks, bool),
  }
  inbox = _fill_inbox(table, place, columns, sends)
  until_b, until_w, crossing = (
    _fill(table, place, columns, name)
    for name in ('until_backward', 'until_weight', 'crossing')
  )
  stored = tuple(zip(until_b, until_w))
  rows_TSC = np.stack([columns[name] for name in COLUMNS], -1)
  return Instructions(
    rows_TSC,
    sends['from_previous'],
    sends['from_next'],
    inbox,
    stored,
    crossing,
  )


def _fill_inbox(table, place, columns, sends) -> int:
  """Gives out the slots of messages; returns how many there are."""
  lives, S = _Lives(), table.num_stages
  tick, last = table.tick_OMP, table.num_parts - 1
  messages = []  # (key, tick, from stage, to stage)
  for p in range(table.num_parts):
    stage = int(table.stage_of(p))
    uses = _uses_of_input(table, place, p)
    for m in range(table.num_microbatches):
      at = lambda op, p=p, m=m: int(tick[op, m, p])
      if p:
        made = int(tick[ops.FORWARD, m, p - 1])
        key = ('input', m, p)
        lives.add(stage, made, max(at(op) for op in uses), key)
        messages.append((key, made, int(table.stage_of(p - 1)), stage))
      if table.training:
        key = ('gradient', m, p)
        source = stage if p == last else int(table.stage_of(p + 1))
        made = (
          at(ops.FORWARD) if p == last else int(tick[ops.BACKWARD, m, p + 1])
        )
        lives.add(stage, made, at(ops.BACKWARD), key)
        messages.append((key, made, source, stage))
  slots, size = lives.slots()
  for name in ('from_self', 'from_previous', 'from_next'):
    columns[name][:] = size
  for key, made, source, to in messages:
    kind, m, p = key
    if source == to:
      name = 'from_self'
    elif (source + 1) % S == to:
      name = 'from_previous'
    else:
      assert (source - 1) % S == to, (source, to)
      name = 'from_next'
    assert columns[name][made, to] == size, (name, made, to)
    columns[name][made, to] = slots[key]
    if name != 'from_self':
      sends[name][made] = True
    for op in range(1, len(tick)):
      if tick[op, m, p] >= 0 and (kind == 'input' or op == ops.BACKWARD):
        columns[kind][tick[op, m, p], to] = slots[key]
  return size


def _uses_of_input(table, place, p) -> list[int]:
  """Returns the operations that may read what came from the part before."""
  if place.tower_P[p] and table.training:
    return [ops.WEIGHT]  # It carries what cross-attention looks at.
  return [ops.RECOMPUTE] if table.recompute else [ops.FORWARD]


def _fill(table, place, columns, name) -> tuple[int, ...]:
  """Gives out the slots of what stays on a device; returns how many."""
  if not table.training:
    return tuple(0 for _ in place.towers)
  made_by = ops.RECOMPUTE if table.recompute else ops.FORWARD
  first, last = {
    'until_backward': (made_by, ops.BACKWARD),
    'until_weight': (made_by, ops.WEIGHT),
    'crossing': (ops.BACKWARD, ops.WEIGHT),
  }[name]
  tick, sizes = table.tick_OMP, []
  for t in range(len(place.towers)):
    lives = _Lives()
    parts = np.flatnonzero(place.tower_P == t)
    for p in parts:
      for m in range(table.num_microbatches):
        # Taken during the first tick and free after the last.
        start, end = tick[first, m, p], tick[last, m, p] + 1
        lives.add(int(table.stage_of(p)), int(start), int(end), (m, p))
    slots, size = lives.slots()
    sizes.append(size)
    for (m, p), slot in slots.items():
      stage = int(table.stage_of(p))
      for op in {first, ops.BACKWARD, last}:
        columns[name][tick[op, m, p], stage] = slot
  return tuple(sizes)
