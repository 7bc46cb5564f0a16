"""Computes how often each stage of a pipeline runs the loops of its program.

flops = [
  matmul_flops.matrix_flops(text, stage_trips.trips(plan, stage))
  for stage in range(plan.table.num_stages)
]

The program is the same for all stages. The bounds of its loops are read from a
table of instructions in each tick, and that table is known beforehand.
"""

import fractions
import functools
import re

import numpy as np

from t2x.hlo import execution
from t2x.hlo import module
from t2x.pipeline import executor
from t2x.pipeline import instructions
from t2x.pipeline import plan as plan_lib
from t2x.pipeline import tick as tick_lib

_LABEL = re.compile(tick_lib.LOOP + r'(\w+)')
_LAST = re.compile(r'last_(\d+)')


def trips(plan: plan_lib.PipelinePlan, stage: int) -> execution.Trips:
  """Returns a function from a loop of the program to a stage's trip count.

  A loop of a tick is entered in every tick; its trip count is the mean over the
  ticks, so that sums over all ticks are exact. For the conditional in which
  stages send messages, the function returns the share of ticks in which it
  sends. For other loops it returns None.

  Args:
    plan: the pipeline's schedule, which the program runs.
    stage: index of the stage.
  """
  places = {
    f'{name}_{tower.name}': (name, t)
    for name in instructions.LOOPS
    for t, tower in enumerate(plan.placement.towers)
  }

  def of_loop(loop: module.Instruction) -> execution.Times | None:
    path, _, last = loop.op_name.rpartition('/')
    if last == 'cond':
      return _sending(plan, path)
    labels = _LABEL.findall(path)
    if last != 'while' or not labels or not path.endswith(labels[-1]):
      return None
    member = _LAST.fullmatch(labels[-1])
    if member:
      name, t = places[labels[-2]]
      return _share(plan, stage, name, t, int(member[1]))
    return _mean(plan, stage, *places[labels[-1]])

  return functools.cache(of_loop)


def _sending(plan: plan_lib.PipelinePlan, path: str) -> execution.Times | None:
  """Returns the share of the ticks in which stages send down, or up."""
  ticks = {
    'from_previous': plan.instructions.sends_down_T,
    'from_next': plan.instructions.sends_up_T,
  }
  for slot, sends_T in ticks.items():
    if path.endswith(f'{executor.EXCHANGE}_{slot}'):
      return fractions.Fraction(int(sends_T.sum()), len(sends_T))
  return None


def times(
  plan: plan_lib.PipelinePlan, stage: int, name: str, t: int, member: int = 0
) -> execution.Times:
  """Returns how often a stage runs a loop's body over all ticks.

  Args:
    plan: the pipeline's schedule.
    stage: index of the stage.
    name: name of the loop, one of `instructions.LOOPS`.
    t: index of the tower.
    member: index of a layer in its unit. The last unit can have fewer layers,
      so later members can run less often.
  """
  runs = int(_runs(plan, name, t)[:, stage].sum())
  tower = plan.placement.towers[t]
  full = tower.num_layers % tower.group or tower.group
  if member < full:
    return runs
  return runs * _share(plan, stage, name, t, member)


def _runs(plan: plan_lib.PipelinePlan, name: str, t: int) -> np.ndarray:
  """Returns how often each stage runs a loop in each tick: runs_TS."""
  runs_TS = instructions.trips(name, t, plan.instructions.columns)
  if plan.config.uniform:  # As often as the stage that runs it most.
    runs_TS = np.broadcast_to(runs_TS.max(1, keepdims=True), runs_TS.shape)
  return runs_TS


def _mean(
  plan: plan_lib.PipelinePlan, stage: int, name: str, t: int
) -> fractions.Fraction:
  runs_T = _runs(plan, name, t)[:, stage]
  return fractions.Fraction(int(runs_T.sum()), len(runs_T))


def _share(
  plan: plan_lib.PipelinePlan, stage: int, name: str, t: int, i: int
) -> fractions.Fraction:
  """Returns the share of the units run that have a layer i."""
  columns, tower = plan.instructions.columns, plan.placement.towers[t]
  visited = present = 0
  for tick, num in enumerate(_runs(plan, name, t)[:, stage]):
    for done in range(num):
      unit_S = columns['unit'][tick] + done
      if name == 'backward':
        unit_S += columns['units'][tick] - 1 - 2 * done
      there_S = unit_S * tower.group + i
      there_S = there_S < tower.num_layers
      visited += 1
      present += bool(there_S.any() if plan.config.uniform else there_S[stage])
  return fractions.Fraction(present, max(visited, 1))
