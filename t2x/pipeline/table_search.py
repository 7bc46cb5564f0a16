"""Searches for a schedule for given costs and a memory limit.

  table = table_search.search(
    4, 16, costs=simulation.Costs(forward=1, backward=1.2, weight=0.8), limit=6
  )

The candidates are: the results of list scheduling with several heuristics, with
the given costs and with equal ones; tables whose ticks have one kind of
operation each; and the schedules of the literature that are within the limit.
The candidate that the lock-step executor runs in the least time is returned.
The heuristics (Qi et al., 2023, https://arxiv.org/abs/2401.10241) do not always
find the best schedule.
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


def search(
  num_stages: int,
  num_microbatches: int,
  *,
  limit: float | Sequence[float],
  costs: simulation.Costs = simulation.Costs(),
  memory: simulation.MicrobatchMemory = simulation.MicrobatchMemory(),
  num_chunks: int = 1,
  placement: ops.Placement = 'loop',
  recompute: bool = False,
) -> schedule_lib.Schedule:
  """Returns a fast schedule within a memory limit.

  Args:
    num_stages: number of stages, S.
    num_microbatches: number of microbatches, M.
    limit: memory of every stage, or of each stage, in the unit of `memory`.
      With the default `memory` it is the number of microbatches of parts that
      are in flight.
    costs: durations of the operations.
    memory: memory of a microbatch of a part.
    num_chunks: parts on each stage.
    placement: order in which the stages hold the parts; see `operations`.
    recompute: whether there is an R before every B.

  Raises:
    ValueError: a number is below 1, the number of costs is wrong, or a limit is
      below the memory of one microbatch. The message gives the least limit that
      works.
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
  candidates = [
    *_heuristics(problem, cost_OP.tolist()),
    *_named(problem, memory),
  ]
  seconds = lambda table: simulation.simulate(table, costs).span_executed
  best = min(candidates, key=seconds)
  return dataclasses.replace(best, name='generated')


def _heuristics(
  problem: list_scheduling.Problem, costs: list[list[float]]
) -> Iterator[schedule_lib.Schedule]:
  num_microbatches = problem.num_microbatches
  dealt = patterns.groups(problem.num_stages, num_microbatches)
  groupings = [
    range(num_microbatches),  # The oldest microbatch first.
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


def _named(
  problem: list_scheduling.Problem, memory: simulation.MicrobatchMemory
) -> Iterator[schedule_lib.Schedule]:
  """Yields the schedules of the literature that are within the limits."""
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
