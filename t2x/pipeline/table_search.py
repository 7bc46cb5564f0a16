"""A table made for given costs and memory.

  table = generate.generate(
    4, 16, costs=simulation.Costs(forward=1, backward=1.2, weight=0.8), limit=6
  )

Several heuristics are tried, with the costs as they are and as if they were
alike, and with ticks of one kind of operation each; and the schedules of the
literature that fit the limit. The one that the lock-step executor runs in the
least time is returned. It is a search by heuristics (Qi et al., 2023,
https://arxiv.org/abs/2401.10241), so not always the best.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses

import numpy as np

from t2x.pipeline import aligned
from t2x.pipeline import list_scheduling
from t2x.pipeline import operations as ops
from t2x.pipeline import patterns
from t2x.pipeline import schedule as schedule_lib
from t2x.pipeline import schedules
from t2x.pipeline import simulation


def generate(
  num_stages: int,
  num_microbatches: int,
  *,
  limit: float | Sequence[float],
  costs: simulation.Costs = simulation.Costs(),
  memory: simulation.Memory = simulation.Memory(),
  num_chunks: int = 1,
  placement: ops.Placement = 'loop',
  recompute: bool = False,
) -> schedule_lib.Schedule:
  """Returns a schedule within a memory limit.

  Args:
    num_stages: S.
    num_microbatches: M.
    limit: of every stage, or one for each, in the unit of `memory`; with the
      default that is how many microbatches of parts are in flight.
    costs: how long operations take.
    memory: what a microbatch of a part takes.
    num_chunks: parts on each stage.
    placement: which parts they are.
    recompute: whether the backward does the forward again.

  Raises:
    ValueError: numbers below 1, costs that do not fit, or a limit below what
      one microbatch needs; the least that works is named.
  """
  schedules.check_numbers(num_stages, num_microbatches, num_chunks)
  if np.ndim(limit) and np.size(limit) != num_stages:
    raise ValueError(
      f'There are {np.size(limit)} limits for {num_stages} stages; give one, '
      'or one for each.'
    )
  limits = np.broadcast_to(np.asarray(limit, float), num_stages).tolist()
  cost_OP = costs.table(num_stages * num_chunks)
  problem = list_scheduling.Problem(
    num_stages=num_stages,
    num_microbatches=num_microbatches,
    num_chunks=num_chunks,
    placement=placement,
    recompute=recompute,
    limits=limits,
    waiting=memory.inputs,
    full=max(
      memory.activations, memory.weight, memory.inputs if recompute else 0.0
    ),
    weight=memory.weight,
    groups=range(num_microbatches),
  )
  least = list_scheduling.least(problem)
  for stage, room in enumerate(limits):
    if not room >= least:
      raise ValueError(
        f'stage {stage}: a memory limit of {room:g} is below what one '
        f'microbatch needs; the least that works is {least:g}.'
      )
  found = [
    *_heuristics(problem, cost_OP.tolist()),
    *_known(problem, memory),
  ]
  seconds = lambda table: simulation.simulate(table, costs).span_executed
  best = min(found, key=seconds)
  return dataclasses.replace(best, name='generated')


def _heuristics(
  problem: list_scheduling.Problem, costs: list[list[float]]
) -> Iterator[schedule_lib.Schedule]:
  num_microbatches = problem.num_microbatches
  dealt = patterns.groups(problem.num_stages, num_microbatches)
  groupings = [
    range(num_microbatches),  # The oldest first.
    patterns.numbered(dealt),
    [0] * num_microbatches,  # The first chunk first.
  ]
  for groups in groupings if problem.num_chunks > 1 else groupings[:1]:
    for defer in (True, False):
      for durations in (None, costs):
        yield list_scheduling.schedule(
          dataclasses.replace(
            problem, groups=groups, defer=defer, costs=durations
          ),
          'generated',
        )
    kinds = ops.kinds(training=True, recompute=problem.recompute)
    for times in (1, problem.num_stages, num_microbatches + problem.num_stages):
      yield aligned.schedule(
        dataclasses.replace(problem, groups=groups),
        [kind for kind in kinds for _ in range(times)],
        'generated',
      )


def _known(
  problem: list_scheduling.Problem, memory: simulation.Memory
) -> Iterator[schedule_lib.Schedule]:
  """The schedules of the literature that have this form and fit."""
  for name in schedules.NAMES:
    if (name == 'zb_v') != (problem.placement == 'v'):
      continue
    if name == 'zb_v' and problem.num_chunks != 2:
      continue
    table = schedules.make(
      name,
      num_stages=problem.num_stages,
      num_microbatches=problem.num_microbatches,
      num_chunks=problem.num_chunks,
      recompute=problem.recompute,
    )
    peak_S = simulation.simulate(table, memory=memory).peak_memory
    if all(peak <= limit for peak, limit in zip(peak_S, problem.limits)):
      yield table
