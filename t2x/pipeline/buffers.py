"""Where a stage keeps what has come and is not yet used.

  sized = buffers.assign(table)
  slot = sized.inputs.slot_MP[microbatch, part]

Four kinds of buffer, each an array of slots on every stage. A slot holds one
microbatch of one part from the tick in which it is filled to the tick in which
it is used last, and each stage has as many slots as it ever holds at once, so
nothing is overwritten before it is used.

Shape suffixes: M microbatches, P parts, S stages.
"""

from collections.abc import Sequence
import dataclasses
import heapq

import numpy as np

from t2x.pipeline import operations as ops
from t2x.pipeline import schedule as schedule_lib


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Slots:
  """One kind of buffer.

  Attributes:
    slot_MP: where each microbatch of each part lies; -1 if it needs none.
    first_MP: the tick at whose end it is filled.
    last_MP: the tick in which it is used last.
    num_S: slots that each stage needs.
  """

  slot_MP: np.ndarray
  first_MP: np.ndarray
  last_MP: np.ndarray
  num_S: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffers:
  """All that is kept between ticks.

  Attributes:
    inputs: what the part before sent, until F, or R where that needs it again.
    gradients: what the part after sent, until B.
    activations: what F, or R, left for B.
    cotangents: what B left for W; with it goes what W needs of the forward.
  """

  inputs: Slots
  gradients: Slots
  activations: Slots
  cotangents: Slots


def assign(schedule: schedule_lib.Schedule) -> Buffers:
  """Returns the slots of a schedule; without training only inputs have any."""
  tick = dict(enumerate(schedule.tick_OMP))
  again = tick[ops.RECOMPUTE if schedule.recompute else ops.FORWARD]
  none_MP = np.full_like(again, -1)
  # A message leaves in the tick in which the neighbour makes it.
  sent_MP, back_MP = none_MP.copy(), none_MP.copy()
  sent_MP[:, 1:] = tick[ops.FORWARD][:, :-1]
  back_MP[:, :-1] = tick[ops.BACKWARD][:, 1:]
  if not schedule.training:
    return Buffers(
      inputs=_slots(schedule, sent_MP, again),
      **dict.fromkeys(
        ('gradients', 'activations', 'cotangents'),
        _slots(schedule, none_MP, none_MP),
      ),
    )
  return Buffers(
    inputs=_slots(schedule, sent_MP, again),
    gradients=_slots(schedule, back_MP, tick[ops.BACKWARD]),
    activations=_slots(schedule, again, tick[ops.BACKWARD]),
    cotangents=_slots(schedule, tick[ops.BACKWARD], tick[ops.WEIGHT]),
  )


def _slots(
  schedule: schedule_lib.Schedule, first_MP: np.ndarray, last_MP: np.ndarray
) -> Slots:
  """Gives what is filled first the lowest slot that is free."""
  slot_MP = np.full_like(first_MP, -1)
  num_S = np.zeros(schedule.num_stages, int)
  stage_P = schedule.stage_of(np.arange(schedule.num_parts))
  for stage in range(schedule.num_stages):
    parts = np.flatnonzero(stage_P == stage)
    kept = [
      (int(first_MP[m, p]), int(last_MP[m, p]), m, int(p))
      for p in parts
      for m in range(schedule.num_microbatches)
      if first_MP[m, p] >= 0
    ]
    num_S[stage] = _fill(sorted(kept), slot_MP)
  return Slots(slot_MP=slot_MP, first_MP=first_MP, last_MP=last_MP, num_S=num_S)


def _fill(kept: Sequence[tuple[int, int, int, int]], slot_MP) -> int:
  """Writes the slots of one stage, and returns how many it needs."""
  free: list[int] = []
  used: list[tuple[int, int]] = []  # (last tick, slot)
  num_slots = 0
  for first, last, micro, part in kept:
    # What is used in a tick can be replaced at the end of that tick.
    while used and used[0][0] <= first:
      heapq.heappush(free, heapq.heappop(used)[1])
    if free:
      slot = heapq.heappop(free)
    else:
      slot, num_slots = num_slots, num_slots + 1
    slot_MP[micro, part] = slot
    heapq.heappush(used, (last, slot))
  return num_slots
