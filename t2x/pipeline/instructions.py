"""The instructions of each device for each tick, from a schedule's table.

Messages wait in the slots of an inbox until they are used. Activations wait in
the slots of other buffers from a forward until its backward. The table says
when each slot is free, so slots are allocated here, before the run. A buffer
has as many slots as the device that needs most of them.

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
  'unit',  # Index of its first unit in the tower.
  'slot',  # Index of its first unit on the device.
  'enters',  # 1 for the first part of a tower.
  'ends',  # 1 for the last part of all.
  'input',  # Inbox slot of the message of the part before.
  'gradient',  # Inbox slot of the message of the part after. On the last part
  # it has the part's own output.
  'until_backward',  # Slot of values from F until B, one for a part's units.
  'until_weight',  # Slot of values from F until W, one for a part's units.
  'crossing',  # Slot of values from B until W, one for a part's units.
  'from_self',  # Inbox slot for this device's own message, if it stays here.
  'from_previous',  # Inbox slot for the message of the stage before.
  'from_next',  # Inbox slot for the message of the stage after.
)


# The loops of a tick, named by the work in them.
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
    loop: one of `LOOPS`.
    tower: index of the tower whose parts the loop is for. `measure` and `leave`
      do not use it.
    columns: instructions by column: scalars, or arrays of one shape.

  Returns:
    The number of trips, in the shape of the columns.
  """
  c, operation = columns, columns['operation']
  of_tower = c['tower'] == tower
  if loop in _UNITS:
    return (operation == _UNITS[loop]) * of_tower * c['units']
  if loop == 'enter':
    # `enter` of a later tower makes the output of the tower before, which every
    # operation needs for cross-attention.
    runs = operation != ops.IDLE
    if not tower:
      runs = (operation == ops.FORWARD) | (operation == ops.RECOMPUTE)
    return runs * of_tower * c['enters']
  if loop == 'enter_backward':
    return (operation == ops.BACKWARD) * of_tower * c['enters']
  runs = operation == {'measure': ops.FORWARD, 'leave': ops.BACKWARD}[loop]
  return runs * c['ends']


@dataclasses.dataclass(frozen=True, eq=False)
class Instructions:
  """A schedule's table in the form that devices read.

  Attributes:
    rows_TSC: int32 instructions, with the columns in the order of `COLUMNS`.
    sends_down_T: whether any stage sends a message to the stage after it.
    sends_up_T: whether any stage sends a message to the stage before it.
    inbox: number of slots that messages need. One more slot, of index `inbox`,
      takes messages that no part reads.
    stored: numbers of slots for values from F until B, and from F until W, a
      pair for each tower.
    crossing: number of slots for values from B until W, for each tower.
  """

  rows_TSC: np.ndarray
  sends_down_T: np.ndarray
  sends_up_T: np.ndarray
  inbox: int
  stored: tuple[tuple[int, int], ...]
  crossing: tuple[int, ...]

  @property
  def columns(self) -> dict[str, np.ndarray]:
    """The columns by name, (T, S) each."""
    return dict(zip(COLUMNS, np.moveaxis(self.rows_TSC, -1, 0)))

  def trips(self, loop: str, tower: int) -> np.ndarray:
    """Returns how often each stage runs a loop in all ticks together, (S,)."""
    return trips(loop, tower, self.columns).sum(0)


class _Lifetimes:
  """Allocates slots to values by the ticks in which they are needed."""

  def __init__(self):
    self._of_stage: dict[int, list[tuple[int, int, tuple]]] = {}

  def add(self, stage: int, start: int, end: int, key: tuple) -> None:
    """Adds a value that is kept from the end of tick `start` to tick `end`."""
    self._of_stage.setdefault(stage, []).append((start, end, key))

  def slots(self) -> tuple[dict[tuple, int], int]:
    """Returns the slot of each value, and the number of slots of a device."""
    slots, size = {}, 0
    for lifetimes in self._of_stage.values():
      free, taken, num = [], [], 0
      for start, end, key in sorted(lifetimes):
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
  """Returns the instructions of a schedule.

  Args:
    table: schedule.
    place: layers of its parts.
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


def _fill_inbox(
  table: schedule_lib.Schedule,
  place: placement_lib.Placement,
  columns: dict[str, np.ndarray],
  sends: dict[str, np.ndarray],
) -> int:
  """Fills the columns of the inbox's slots; returns the number of slots."""
  lifetimes, S = _Lifetimes(), table.num_stages
  tick, last = table.tick_OMP, table.num_parts - 1
  messages = []  # (key, tick, from stage, to stage)
  for p in range(table.num_parts):
    stage = int(table.stage_of(p))
    last_use = _last_use_of_input(table, place, p)
    for m in range(table.num_microbatches):
      at = lambda op, p=p, m=m: int(tick[op, m, p])
      if p:
        made = int(tick[ops.FORWARD, m, p - 1])
        key = ('input', m, p)
        lifetimes.add(stage, made, at(last_use), key)
        messages.append((key, made, int(table.stage_of(p - 1)), stage))
      if table.training:
        key = ('gradient', m, p)
        source = stage if p == last else int(table.stage_of(p + 1))
        made = (
          at(ops.FORWARD) if p == last else int(tick[ops.BACKWARD, m, p + 1])
        )
        lifetimes.add(stage, made, at(ops.BACKWARD), key)
        messages.append((key, made, source, stage))
  slots, size = lifetimes.slots()
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


def _last_use_of_input(
  table: schedule_lib.Schedule, place: placement_lib.Placement, p: int
) -> int:
  """Returns the last operation that reads the message of the part before."""
  if place.tower_P[p] and table.training:
    return ops.WEIGHT  # The message has the input of cross-attention.
  return ops.RECOMPUTE if table.recompute else ops.FORWARD


def _fill(
  table: schedule_lib.Schedule,
  place: placement_lib.Placement,
  columns: dict[str, np.ndarray],
  name: str,
) -> tuple[int, ...]:
  """Fills a column of slots of values that stay on a device.

  Returns:
    The number of slots, for each tower.
  """
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
    lifetimes = _Lifetimes()
    for p in np.flatnonzero(place.tower_P == t).tolist():
      for m in range(table.num_microbatches):
        # Taken during the first tick and free after the last.
        start, end = tick[first, m, p], tick[last, m, p] + 1
        lifetimes.add(int(table.stage_of(p)), int(start), int(end), (m, p))
    slots, size = lifetimes.slots()
    sizes.append(size)
    for (m, p), slot in slots.items():
      stage = int(table.stage_of(p))
      for op in {first, ops.BACKWARD, last}:
        columns[name][tick[op, m, p], stage] = slot
  return tuple(sizes)
