"""List scheduling: each free stage does the best operation that it can.

A free stage takes a B whose gradient has come. Otherwise it takes an F whose
input has come and for which it has memory. Otherwise it takes a W that it
deferred. That is the heuristic of Qi et al. (2023),
https://arxiv.org/abs/2401.10241.

A stage starts an F only if the oldest microbatch that has not reached the stage
would still have memory there after the ones before it are done (the banker's
algorithm, Dijkstra, 1965). So there is no deadlock with any limit that allows
one microbatch. For the same reason each stage reserves the memory of one
recomputation.

Memory is in any unit, for example in microbatches of parts.
"""

from collections.abc import Sequence
import dataclasses
import heapq
import math

from t2x.pipeline import from_orders
from t2x.pipeline import operations as ops
from t2x.pipeline import schedule as schedule_lib

# [operation][part][microbatch] -> time at which it ends.
Done = list[list[list[float]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """The numbers, limits and durations of a schedule to be found.

  Attributes:
    num_stages: number of stages, S.
    num_microbatches: number of microbatches, M.
    num_chunks: parts on each stage.
    placement: order in which the stages hold the parts; see `operations`.
    recompute: whether there is an R before every B.
    limits: memory of each stage, at least `least(problem)`.
    waiting: memory of a microbatch of a part from F until R.
    full: memory of a microbatch of a part from F, or R, until B; at least
      `waiting` and `weight`.
    weight: memory of a microbatch of a part from B until W.
    groups: number of each microbatch's group. A whole group passes through a
      chunk before it comes to the next chunk, and comes before later groups.
    defer: whether an F comes before a W that could be done; otherwise each W
      follows its B at once.
    costs: duration of each operation, [operation][part]; None for 1 each.
  """

  num_stages: int
  num_microbatches: int
  num_chunks: int = 1
  placement: ops.Placement = 'loop'
  recompute: bool = False
  limits: Sequence[float]
  waiting: float = 1.0
  full: float = 1.0
  weight: float = 1.0
  groups: Sequence[int]
  defer: bool = True
  costs: Sequence[Sequence[float]] | None = None

  @property
  def piece(self) -> float:
    """Memory of a microbatch of a part after its F."""
    return self.waiting if self.recompute else self.full


def least(problem: Problem) -> float:
  """Returns the memory that one microbatch needs on a stage."""
  return problem.piece * (problem.num_chunks - 1) + problem.full


def schedule(problem: Problem, name: str) -> schedule_lib.Schedule:
  """Returns the schedule that list scheduling finds.

  Args:
    problem: numbers, limits and durations.
    name: name of the schedule.
  """
  return from_orders.from_orders(
    orders(problem),
    name=name,
    num_microbatches=problem.num_microbatches,
    num_chunks=problem.num_chunks,
    placement=problem.placement,
    recompute=problem.recompute,
  )


class StageProgress:
  """The progress and the free memory of one stage.

  Args:
    problem: numbers, limits and durations.
    stage: index of the stage.

  Attributes:
    parts: parts of the stage, one for each chunk.
    next: next microbatch, [operation][chunk].
    deferred: each W whose B is done.
    order: operations that the stage has done.
    limit: memory of the stage.
    space: memory that is free.
    free_at: time at which the stage has finished its last operation.
  """

  def __init__(self, problem: Problem, stage: int):
    place = (problem.num_stages, problem.placement)
    parts = [ops.part(stage, c, *place) for c in range(problem.num_chunks)]
    self.parts = parts
    self.next = [[0] * len(parts) for _ in ops.LETTERS]
    self.deferred: list[ops.Op] = []
    self.order: list[ops.Op] = []
    # A sum of sizes can be slightly too large by rounding.
    self.limit = self.space = problem.limits[stage] * (1 + 1e-9)
    self.free_at = 0.0


def not_done(problem: Problem) -> Done:
  """Returns the times at which operations end: infinity for all of them."""
  num_parts = problem.num_stages * problem.num_chunks
  never = [math.inf] * problem.num_microbatches
  return [[never.copy() for _ in range(num_parts)] for _ in ops.LETTERS]


def orders(problem: Problem) -> list[list[ops.Op]]:
  """Returns the operations of each stage in order.

  Each is (operation, microbatch, chunk).
  """
  num_stages, num_chunks = problem.num_stages, problem.num_chunks
  num_parts = num_stages * num_chunks
  done = not_done(problem)
  stages = [StageProgress(problem, s) for s in range(num_stages)]
  events = [(0.0, s) for s in range(num_stages)]
  while events:
    now, s = heapq.heappop(events)
    stage = stages[s]
    if stage.free_at > now:
      continue
    choice = _choose(problem, stage, done, now)
    if choice is None:
      continue  # The stage is tried again when a message comes.
    kind, micro, chunk = choice
    part = stage.parts[chunk]
    take(problem, stage, choice)
    stage.free_at = end = now + (
      problem.costs[kind][part] if problem.costs else 1.0
    )
    done[kind][part][micro] = end
    heapq.heappush(events, (end, s))
    listener = part + {ops.FORWARD: 1, ops.BACKWARD: -1}.get(kind, 0)
    if listener != part and 0 <= listener < num_parts:
      where = ops.stage_of(listener, num_stages, problem.placement)
      heapq.heappush(events, (end, where))
  expected = problem.num_microbatches * num_chunks * (3 + problem.recompute)
  assert all(len(stage.order) == expected for stage in stages)
  return [stage.order for stage in stages]


def _choose(
  problem: Problem, stage: StageProgress, done: Done, now: float
) -> ops.Op | None:
  """Returns the operation that the stage does now, or None."""
  backward = next_backward(problem, stage, done, now)
  if backward:
    return backward
  if stage.deferred and not problem.defer:
    return stage.deferred[0]
  forward = next_forward(problem, stage, done, now)
  if forward:
    return forward
  if problem.recompute:
    early = early_recompute(problem, stage)
    if early:
      return early
  return stage.deferred[0] if stage.deferred else None


def next_backward(
  problem: Problem, stage: StageProgress, done: Done, now: float
) -> ops.Op | None:
  """Returns the B that the stage can do now, or the R that must precede it.

  Args:
    problem: numbers, limits and durations.
    stage: progress of the stage.
    done: times at which operations end.
    now: current time.

  Returns:
    The operation, or None if none can be done or there is no memory for the R.
  """
  best, groups = None, problem.groups
  last = problem.num_stages * problem.num_chunks - 1
  for chunk, part in enumerate(stage.parts):
    micro = stage.next[ops.BACKWARD][chunk]
    if micro == stage.next[ops.FORWARD][chunk]:
      continue
    source = (
      done[ops.BACKWARD][part + 1] if part < last else done[ops.FORWARD][part]
    )
    if source[micro] <= now:
      needs_r = problem.recompute and stage.next[ops.RECOMPUTE][chunk] == micro
      if needs_r and problem.full - problem.waiting > stage.space:
        continue
      kind = ops.RECOMPUTE if needs_r else ops.BACKWARD
      choice = (groups[micro], -chunk, (kind, micro, chunk))
      best = choice if best is None else min(best, choice)
  return best and best[-1]


def next_forward(
  problem: Problem, stage: StageProgress, done: Done, now: float
) -> ops.Op | None:
  """Returns the F that the stage can do now, or None.

  Args:
    problem: numbers, limits and durations.
    stage: progress of the stage.
    done: times at which operations end.
    now: current time.
  """
  best, groups = None, problem.groups
  piece = problem.piece
  reserve = problem.full - piece  # For one recomputation.
  if stage.space < piece + reserve:
    return None
  forwarded = stage.next[ops.FORWARD]
  oldest = min(forwarded)
  # None of the younger microbatches has begun its backward.
  younger = sum(max(0, micro - 1 - oldest) for micro in forwarded)
  needed = piece * (len(forwarded) + younger) + reserve
  for chunk, part in enumerate(stage.parts):
    micro = forwarded[chunk]
    if micro == problem.num_microbatches:
      continue
    if part == 0 or done[ops.FORWARD][part - 1][micro] <= now:
      if micro == oldest or needed + piece <= stage.limit:
        choice = (groups[micro], chunk, (ops.FORWARD, micro, chunk))
        best = choice if best is None else min(best, choice)
  return best and best[-1]


def early_recompute(problem: Problem, stage: StageProgress) -> ops.Op | None:
  """Returns an R that the stage can do before its gradient comes, or None.

  There is at most one such R at a time, and it leaves memory for another one.

  Args:
    problem: numbers, limits and durations.
    stage: progress of the stage.
  """
  again, back = stage.next[ops.RECOMPUTE], stage.next[ops.BACKWARD]
  if again != back:
    return None
  if 2 * (problem.full - problem.waiting) > stage.space:
    return None
  choices = [
    (problem.groups[micro], -chunk, (ops.RECOMPUTE, micro, chunk))
    for chunk, micro in enumerate(again)
    if min(stage.next[ops.FORWARD]) > micro
  ]
  return min(choices)[-1] if choices else None


def take(problem: Problem, stage: StageProgress, choice: ops.Op) -> None:
  """Records that a stage does an operation, and updates its free memory.

  Args:
    problem: numbers, limits and durations.
    stage: progress of the stage; it is changed.
    choice: the operation.
  """
  kind, micro, chunk = choice
  stage.order.append(choice)
  stage.next[kind][chunk] += 1
  if kind == ops.FORWARD:
    stage.space -= problem.piece
  elif kind == ops.RECOMPUTE:
    stage.space -= problem.full - problem.waiting
  elif kind == ops.BACKWARD:
    stage.space += problem.full - problem.weight
    stage.deferred.append((ops.WEIGHT, micro, chunk))
  else:
    stage.space += problem.weight
    stage.deferred.pop(0)
