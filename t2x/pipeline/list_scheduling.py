"""List scheduling: each stage does the best of what it can do now.

Whenever a stage is free it takes a B whose gradient is there, else an F whose
input is there and for which it has room, else a W that it put off, as the
heuristic of Qi et al. (2023), https://arxiv.org/abs/2401.10241.

An F is let in only if the oldest microbatch that has still to come to the
stage would find room there once those before it are gone (the banker's
algorithm, Dijkstra, 1965). So no limit that holds one microbatch can lead to a
deadlock. For the same reason room for one recomputation is left.
"""

from collections.abc import Sequence
import dataclasses
import heapq
import math

from t2x.pipeline import from_orders
from t2x.pipeline import operations as ops
from t2x.pipeline import schedule as schedule_lib

Done = list[list[list[float]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """What is to be put in order.

  Attributes:
    num_stages: S.
    num_microbatches: M.
    num_chunks: parts on each stage.
    placement: which parts they are.
    recompute: an R stands before every B.
    limits: what each stage has room for: at least `least(problem)`.
    waiting: what a microbatch of a part takes from F until R.
    full: from F, or R, until B; at least `waiting` and `weight`.
    weight: from B until W.
    groups: of each microbatch the number of its group. A group passes a chunk
      before it comes to the next, and goes before later groups.
    defer: W gives way to F; otherwise it follows its B at once.
    costs: [operation][part], its duration; None for 1 each.
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
    """What a microbatch of a part takes after its F."""
    return self.waiting if self.recompute else self.full


def least(problem: Problem) -> float:
  """The room that one microbatch needs on a stage."""
  return problem.piece * (problem.num_chunks - 1) + problem.full


def schedule(problem: Problem, name: str) -> schedule_lib.Schedule:
  """Returns the table of the orders, each operation as early as it can."""
  return from_orders.from_orders(
    orders(problem),
    name=name,
    num_microbatches=problem.num_microbatches,
    num_chunks=problem.num_chunks,
    placement=problem.placement,
    recompute=problem.recompute,
  )


class Stage:
  """What one stage has done and holds."""

  def __init__(self, problem: Problem, stage: int):
    place = (problem.num_stages, problem.placement)
    parts = [ops.part(stage, c, *place) for c in range(problem.num_chunks)]
    self.parts = parts
    # next[operation][chunk] is the next microbatch.
    self.next = [[0] * len(parts) for _ in ops.LETTERS]
    self.put_off: list[ops.Op] = []  # Each W whose B is done.
    self.order: list[ops.Op] = []
    # Sums of sizes can be off in the last bits.
    self.limit = self.space = problem.limits[stage] * (1 + 1e-9)
    self.free_at = 0.0


def not_done(problem: Problem) -> Done:
  """Returns [operation][part][microbatch] -> when it ends, so far never."""
  num_parts = problem.num_stages * problem.num_chunks
  never = [math.inf] * problem.num_microbatches
  return [[never.copy() for _ in range(num_parts)] for _ in ops.LETTERS]


def orders(problem: Problem) -> list[list[ops.Op]]:
  """Returns for each stage its (operation, microbatch, chunk) in order."""
  num_stages, num_chunks = problem.num_stages, problem.num_chunks
  num_parts = num_stages * num_chunks
  done = not_done(problem)
  stages = [Stage(problem, s) for s in range(num_stages)]
  events = [(0.0, s) for s in range(num_stages)]
  while events:
    now, s = heapq.heappop(events)
    stage = stages[s]
    if stage.free_at > now:
      continue
    choice = _choose(problem, stage, done, now)
    if choice is None:
      continue  # A message will wake it.
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
  problem: Problem, stage: Stage, done: Done, now: float
) -> ops.Op | None:
  """The operation that the stage does now, or None if there is none."""
  backward = next_backward(problem, stage, done, now)
  if backward:
    return backward
  if stage.put_off and not problem.defer:
    return stage.put_off[0]
  forward = next_forward(problem, stage, done, now)
  if forward:
    return forward
  if problem.recompute:
    early = early_recompute(problem, stage, done, now)
    if early:
      return early
  return stage.put_off[0] if stage.put_off else None


def next_backward(
  problem: Problem, stage: Stage, done: Done, now: float
) -> ops.Op | None:
  """The B to do now, or the R that it lacks if there is room for that."""
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
      lacks = problem.recompute and stage.next[ops.RECOMPUTE][chunk] == micro
      if lacks and problem.full - problem.waiting > stage.space:
        continue
      kind = ops.RECOMPUTE if lacks else ops.BACKWARD
      choice = (groups[micro], -chunk, (kind, micro, chunk))
      best = choice if best is None else min(best, choice)
  return best and best[-1]


def next_forward(
  problem: Problem, stage: Stage, done: Done, now: float
) -> ops.Op | None:
  """The F to do now, if there is room for it."""
  best, groups = None, problem.groups
  piece = problem.piece
  again = problem.full - piece  # Left for one recomputation.
  if stage.space < piece + again:
    return None
  forwarded = stage.next[ops.FORWARD]
  oldest = min(forwarded)
  # None of the younger has begun its backward.
  younger = sum(max(0, micro - 1 - oldest) for micro in forwarded)
  held = piece * (len(forwarded) + younger) + again
  for chunk, part in enumerate(stage.parts):
    micro = forwarded[chunk]
    if micro == problem.num_microbatches:
      continue
    if part == 0 or done[ops.FORWARD][part - 1][micro] <= now:
      if micro == oldest or held + piece <= stage.limit:
        choice = (groups[micro], chunk, (ops.FORWARD, micro, chunk))
        best = choice if best is None else min(best, choice)
  return best and best[-1]


def early_recompute(
  problem: Problem, stage: Stage, done: Done, now: float
) -> ops.Op | None:
  """An R ahead of its gradient, one at most, that leaves room for another."""
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


def take(problem: Problem, stage: Stage, choice: ops.Op) -> None:
  """Writes an operation down and takes or gives back its room."""
  kind, micro, chunk = choice
  stage.order.append(choice)
  stage.next[kind][chunk] += 1
  if kind == ops.FORWARD:
    stage.space -= problem.piece
  elif kind == ops.RECOMPUTE:
    stage.space -= problem.full - problem.waiting
  elif kind == ops.BACKWARD:
    stage.space += problem.full - problem.weight
    stage.put_off.append((ops.WEIGHT, micro, chunk))
  else:
    stage.space += problem.weight
    stage.put_off.pop(0)
