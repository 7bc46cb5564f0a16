"""Makes a schedule's table from the order of operations on each stage.

Every operation takes one tick. It is in the first tick that the order of its
stage and the operations it depends on allow.
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
  """Returns a schedule with each operation in the earliest tick possible.

  Args:
    orders: operations of each stage in order, as (operation, microbatch,
      chunk).
    name: name of the schedule.
    num_microbatches: number of microbatches, M.
    num_chunks: parts on each stage.
    placement: order in which the stages hold the parts; see `operations`.
    recompute: whether there is an R before every B.
    training: whether there are backward passes; False for forwards alone.

  Raises:
    ValueError: stages wait for each other, or for an operation that no order
      has; or `Schedule` refuses the table.
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
  """Returns the tick of each operation: (operation, microbatch, part)."""
  num_stages = len(orders)
  num_parts = num_stages * num_chunks
  ticks: dict[ops.Op, int] = {}
  done = [0] * num_stages  # Number of operations that each stage has placed.
  free = [0] * num_stages  # First tick that each stage has not used.
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


def _deadlock(
  orders: Sequence[Sequence[ops.Op]],
  done: Sequence[int],
  waiting: dict[ops.Op, list[int]],
  num_stages: int,
  placement: ops.Placement,
) -> str:
  """Returns an error message that says which stage waits for which.

  Args:
    orders: operations of each stage in order.
    done: number of operations that each stage has placed.
    waiting: operation that is missing -> stages that need it.
    num_stages: number of stages, S.
    placement: order in which the stages hold the parts.
  """
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
