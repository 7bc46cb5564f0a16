"""List scheduling in which every tick has one kind of operation.

A tick lasts as long as its slowest operation. Where F, B and W take different
times, a tick that mixes kinds leaves the stages with a cheaper kind idle. Here
all stages do the same kind in a tick, or nothing. With many microbatches the
ticks are then full whatever the operations cost. In return there are more ticks
at the start and at the end, and a message waits until the turn of its kind
comes. With few microbatches that loses more than it saves.
"""

from collections.abc import Sequence
import itertools

import numpy as np

from t2x.pipeline import list_scheduling
from t2x.pipeline import operations as ops
from t2x.pipeline import schedule as schedule_lib


def schedule(
  problem: list_scheduling.Problem, cycle: Sequence[int], name: str
) -> schedule_lib.Schedule:
  """Returns a schedule whose ticks take the kinds of `cycle` in turn.

  Args:
    problem: the numbers and limits of the schedule. Its `costs` and `defer` are
      ignored.
    cycle: kinds of operations, repeated until all work is done. Every kind that
      the schedule uses must be in it. A turn in which no stage can do anything
      takes no tick.
    name: name of the schedule.
  """
  num_parts = problem.num_stages * problem.num_chunks
  done = list_scheduling.not_done(problem)
  stages = [
    list_scheduling.StageProgress(problem, s) for s in range(problem.num_stages)
  ]
  total = problem.num_microbatches * num_parts * (3 + problem.recompute)
  rows: list[list[ops.Op]] = []
  idle = (ops.IDLE, 0, 0)
  skipped = 0
  for kind in itertools.cycle(cycle):
    if total == 0:
      break
    now = float(len(rows))
    row = [_choose(problem, stage, done, now, kind) for stage in stages]
    if not any(row):
      skipped += 1
      assert skipped <= len(cycle), 'Nothing can go on.'
      continue
    skipped = 0
    for stage, choice in zip(stages, row):
      if choice:
        _, micro, chunk = choice
        list_scheduling.take(problem, stage, choice)
        done[kind][stage.parts[chunk]][micro] = now + 1
        total -= 1
    rows.append([choice or idle for choice in row])
  table_TSX = np.array(rows)
  return schedule_lib.Schedule(
    name=name,
    operation_TS=table_TSX[..., 0],
    microbatch_TS=table_TSX[..., 1],
    chunk_TS=table_TSX[..., 2],
    num_microbatches=problem.num_microbatches,
    num_chunks=problem.num_chunks,
    placement=problem.placement,
    recompute=problem.recompute,
  )


def _choose(
  problem: list_scheduling.Problem,
  stage: list_scheduling.StageProgress,
  done: list_scheduling.Done,
  now: float,
  kind: int,
) -> ops.Op | None:
  """Returns the operation of that kind that the stage can do, or None."""
  if kind == ops.FORWARD:
    return list_scheduling.next_forward(problem, stage, done, now)
  if kind == ops.WEIGHT:
    return stage.deferred[0] if stage.deferred else None
  choice = list_scheduling.next_backward(problem, stage, done, now)
  if choice and choice[0] == kind:
    return choice
  if kind == ops.RECOMPUTE:
    return list_scheduling.early_recompute(problem, stage)
  return None
