"""From the order of operations on each stage to a table.

Every operation takes one tick and stands in the first one that its stage's
order and its needs allow.
"""

from collections.abc import Sequence

import numpy as np

from t2x.pipeline import operations as ops
from t2x.pipeline import schedule as schedule_lib


def from_orders(
  orders: Sequence[Sequence[ops.Op]],
  *,
  name: str,
  num_microbatches: int,
  num_chunks: int = 1,
  placement: ops.Placement = 'loop',
  recompute: bool = False,
  training: bool = True,
) -> schedule_lib.Schedule:
  """Places each operation in the earliest tick that it can have.

  Args:
    orders: for each stage its (operation, microbatch, chunk) in order.
    name: of the schedule, as the other arguments.

  Raises:
    ValueError: stages wait for each other, or for what no order holds; or
      whatever `Schedule` refuses.
  """
  num_stages = len(orders)
  ticks = _placed(orders, num_chunks, placement, recompute)
  tables = np.zeros(
    (3, max(ticks.values(), default=0) + 1, num_stages), np.int32
  )
  for (kind, micro, part), tick in ticks.items():
    stage = ops.stage_of(part, num_stages, placement)
    tables[:, tick, stage] = kind, micro, ops.chunk_of(part, num_stages)
  return schedule_lib.Schedule(
    name=name,
    operation_TS=tables[0],
    microbatch_TS=tables[1],
    chunk_TS=tables[2],
    num_microbatches=num_microbatches,
    num_chunks=num_chunks,
    placement=placement,
    recompute=recompute,
    training=training,
  )


def _placed(
  orders: Sequence[Sequence[ops.Op]],
  num_chunks: int,
  placement: ops.Placement,
  recompute: bool,
) -> dict[ops.Op, int]:
  """Returns the tick of each (operation, microbatch, part)."""
  num_stages = len(orders)
  num_parts = num_stages * num_chunks
  ticks: dict[ops.Op, int] = {}
  done = [0] * num_stages  # How many of its order each stage has placed.
  free = [0] * num_stages  # The first tick that it has not used.
  waiting: dict[ops.Op, list[int]] = {}  # Operation -> stages that need it.
  todo = list(range(num_stages))
  while todo:
    stage = todo.pop()
    while done[stage] < len(orders[stage]):
      kind, micro, chunk = orders[stage][done[stage]]
      part = ops.part(stage, chunk, num_stages, placement)
      tick = free[stage]
      for other, where in ops.needs(kind, part, num_parts, recompute=recompute):
        key = (other, micro, where)
        if key not in ticks:
          waiting.setdefault(key, []).append(stage)
          break
        tick = max(tick, ticks[key] + 1)
      else:
        key = (kind, micro, part)
        if key in ticks:
          raise ValueError(
            f'stage {stage} does {_name(kind, micro, chunk)} a second time, at '
            f'place {done[stage]} of its order.'
          )
        ticks[key] = tick
        free[stage] = tick + 1
        done[stage] += 1
        todo += waiting.pop(key, ())
        continue
      break
  if waiting:
    raise ValueError(_deadlock(orders, done, waiting, num_stages, placement))
  return ticks


def _deadlock(orders, done, waiting, num_stages, placement) -> str:
  """Says which stages wait for which, from one to the next."""
  needed = {stage: key for key, stages in waiting.items() for stage in stages}
  stage, lines, seen = min(needed), [], set()
  while stage in needed and stage not in seen:
    seen.add(stage)
    kind, micro, chunk = orders[stage][done[stage]]
    other, m, part = needed[stage]
    source = ops.stage_of(part, num_stages, placement)
    wanted = (other, m, ops.chunk_of(part, num_stages))
    lines.append(
      f'stage {stage}, at place {done[stage]} of its order, waits with '
      f'{_name(kind, micro, chunk)} for {_name(*wanted)} of stage {source}'
    )
    if wanted not in orders[source][done[source] :]:
      return (
        f'Lost: {lines[-1]}, whose order does not hold it. Add it before what '
        'needs it.'
      )
    stage = source
  return (
    f'A cycle, in which nobody can go on: {"; ".join(lines)}. Change the order '
    'of one of them.'
  )


def _name(kind: int, micro: int, chunk: int) -> str:
  return f'{ops.LETTERS[kind]} of microbatch {micro}, chunk {chunk}'
