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

from t2x.pipeline import operations as ops


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
  """Which of several operations goes first.

  Attributes:
    groups: of each microbatch the number of its group. A group passes a chunk
      before it comes to the next, and goes before later groups.
    defer: W gives way to F; otherwise it follows its B at once.
  """

  groups: Sequence[int]
  defer: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
  """What one microbatch of one part takes, and how much a stage has.

  Attributes:
    limits: of each stage.
    waiting: from F until R, where the forward is recomputed.
    full: from F, or R, until B, or until W where that is more.
    weight: from B until W.
  """

  limits: Sequence[float]
  waiting: float = 1.0
  full: float = 1.0
  weight: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
  """What is to be put in order.

  Attributes:
    num_stages: S.
    num_microbatches: M.
    num_chunks: parts on each stage.
    placement: which parts they are.
    recompute: an R stands before every B.
    costs: [operation][part], its duration.
    room: each limit holds one microbatch of every chunk.
    policy: what goes first.
  """

  num_stages: int
  num_microbatches: int
  num_chunks: int
  placement: ops.Placement
  recompute: bool
  costs: Sequence[Sequence[float]]
  room: Room
  policy: Policy


class _Stage:
  """What one stage has done and holds."""

  def __init__(self, parts: Sequence[int], limit: float):
    self.parts = parts
    # next[operation][chunk] is the next microbatch.
    self.next = [[0] * len(parts) for _ in ops.LETTERS]
    self.put_off: list[ops.Op] = []  # Each W whose B is done.
    self.order: list[ops.Op] = []
    self.limit = self.space = limit * (1 + 1e-9)
    self.free_at = 0.0


def orders(problem: Problem) -> list[list[ops.Op]]:
  """Returns for each stage its (operation, microbatch, chunk) in order."""
  num_stages, num_chunks = problem.num_stages, problem.num_chunks
  num_parts = num_stages * num_chunks
  # done[operation][part][microbatch] is when it ends.
  done = [
    [[math.inf] * problem.num_microbatches for _ in range(num_parts)]
    for _ in ops.LETTERS
  ]
  stages = []
  for s in range(num_stages):
    chunks = range(num_chunks)
    parts = [ops.part(s, c, num_stages, problem.placement) for c in chunks]
    stages.append(_Stage(parts, problem.room.limits[s]))
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
    _take(problem, stage, choice)
    stage.free_at = end = now + problem.costs[kind][part]
    done[kind][part][micro] = end
    heapq.heappush(events, (end, s))
    listener = part + {ops.FORWARD: 1, ops.BACKWARD: -1}.get(kind, 0)
    if listener != part and 0 <= listener < num_parts:
      where = ops.stage_of(listener, num_stages, problem.placement)
      heapq.heappush(events, (end, where))
  expected = problem.num_microbatches * num_chunks * (3 + problem.recompute)
  assert all(len(stage.order) == expected for stage in stages)
  return [stage.order for stage in stages]


def _choose(problem: Problem, stage: _Stage, done, now) -> ops.Op | None:
  """The operation that the stage does now, or None if there is none."""
  backward = _backward(problem, stage, done, now)
  if backward:
    return backward
  if stage.put_off and not problem.policy.defer:
    return stage.put_off[0]
  forward = _forward(problem, stage, done, now)
  if forward:
    return forward
  if problem.recompute:
    early = _early_recompute(problem, stage, done, now)
    if early:
      return early
  return stage.put_off[0] if stage.put_off else None


def _backward(problem, stage, done, now) -> ops.Op | None:
  """The B to do now, or the R that it lacks if there is room for that."""
  best, groups = None, problem.policy.groups
  last = problem.num_stages * problem.num_chunks - 1
  for chunk, part in enumerate(stage.parts):
    micro = stage.next[ops.BACKWARD][chunk]
    if micro == stage.next[ops.FORWARD][chunk]:
      continue
    source = done[ops.BACKWARD][part + 1] if part < last else done[1][part]
    if source[micro] <= now:
      lacks = problem.recompute and stage.next[ops.RECOMPUTE][chunk] == micro
      if lacks and problem.room.full - problem.room.waiting > stage.space:
        continue
      kind = ops.RECOMPUTE if lacks else ops.BACKWARD
      choice = (groups[micro], -chunk, (kind, micro, chunk))
      best = choice if best is None else min(best, choice)
  return best and best[-1]


def _forward(problem, stage, done, now) -> ops.Op | None:
  """The F to do now, if there is room for it."""
  best, groups, room = None, problem.policy.groups, problem.room
  piece = room.waiting if problem.recompute else room.full
  again = room.full - piece  # Left for one recomputation.
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


def _early_recompute(problem, stage, done, now) -> ops.Op | None:
  """An R ahead of its gradient, one at most, that leaves room for another."""
  again, back = stage.next[ops.RECOMPUTE], stage.next[ops.BACKWARD]
  if again != back:
    return None
  if 2 * (problem.room.full - problem.room.waiting) > stage.space:
    return None
  choices = [
    (problem.policy.groups[micro], -chunk, (ops.RECOMPUTE, micro, chunk))
    for chunk, micro in enumerate(again)
    if min(stage.next[ops.FORWARD]) > micro
  ]
  return min(choices)[-1] if choices else None


def _take(problem: Problem, stage: _Stage, choice: ops.Op) -> None:
  """Writes an operation down and takes or gives back its room."""
  kind, micro, chunk = choice
  room = problem.room
  stage.order.append(choice)
  stage.next[kind][chunk] += 1
  if kind == ops.FORWARD:
    stage.space -= room.waiting if problem.recompute else room.full
  elif kind == ops.RECOMPUTE:
    stage.space -= room.full - room.waiting
  elif kind == ops.BACKWARD:
    stage.space += room.full - room.weight
    stage.put_off.append((ops.WEIGHT, micro, chunk))
  else:
    stage.space += room.weight
    stage.put_off.pop(0)
