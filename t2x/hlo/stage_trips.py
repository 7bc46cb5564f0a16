"""How often the loops of a pipeline's program run on each stage.

flops = [
  matrix.matrix_flops(text, pipelines.trips(plan, stage))
  for stage in range(plan.table.num_stages)
]

The program is the same for all stages, and what its loops' bounds are is read
from the instructions in each tick. They are known beforehand.
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


def trips(plan: plan_lib.Plan, stage: int) -> execution.Trips:
  """Returns the trips of a stage's loops, for what counts a program.

  A loop of a tick is entered in every tick: its trips are the mean over them,
  so that counts over all ticks are exact. So are those of the conditional in
  which messages are sent, of what only its branch that sends has. None for
  others.

  Args:
    plan: what the program runs.
    stage: whose device is meant.
  """
  places = {
    f'{name}_{tower.name}': (name, t)
    for name in instructions.LOOPS
    for t, tower in enumerate(plan.place.towers)
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


def _sending(plan: plan_lib.Plan, path: str) -> execution.Times | None:
  """Returns the share of the ticks in which messages go down, or up."""
  ticks = {
    'from_previous': plan.told.sends_down_T,
    'from_next': plan.told.sends_up_T,
  }
  for slot, sends_T in ticks.items():
    if path.endswith(f'{executor.EXCHANGE}_{slot}'):
      return fractions.Fraction(int(sends_T.sum()), len(sends_T))
  return None


def times(
  plan: plan_lib.Plan, stage: int, name: str, t: int, member: int = 0
) -> execution.Times:
  """Returns how often a stage runs a loop over all ticks.

  Args:
    plan: what is run.
    stage: whose device is meant.
    name: of `instructions.LOOPS`.
    t: the tower.
    member: a layer's place in its unit; of the last unit there may be fewer.
  """
  runs = int(_runs(plan, name, t)[:, stage].sum())
  tower = plan.place.towers[t]
  full = tower.num_layers % tower.group or tower.group
  if member < full:
    return runs
  return runs * _share(plan, stage, name, t, member)


def _runs(plan: plan_lib.Plan, name: str, t: int) -> np.ndarray:
  """Returns how often each stage runs a loop in each tick: runs_TS."""
  runs_TS = instructions.trips(name, t, plan.told.columns)
  if plan.config.uniform:  # As often as any of them.
    runs_TS = np.broadcast_to(runs_TS.max(1, keepdims=True), runs_TS.shape)
  return runs_TS


def _mean(plan: plan_lib.Plan, stage: int, name: str, t: int):
  runs_T = _runs(plan, name, t)[:, stage]
  return fractions.Fraction(int(runs_T.sum()), len(runs_T))


def _share(plan: plan_lib.Plan, stage: int, name: str, t: int, i: int):
  """Returns the share of the units run that have a layer i."""
  columns, tower = plan.told.columns, plan.place.towers[t]
  visited = held = 0
  for tick, num in enumerate(_runs(plan, name, t)[:, stage]):
    for done in range(num):
      unit_S = columns['unit'][tick] + done
      if name == 'backward':
        unit_S += columns['units'][tick] - 1 - 2 * done
      there_S = unit_S * tower.group + i
      there_S = there_S < tower.num_layers
      visited += 1
      held += bool(there_S.any() if plan.config.uniform else there_S[stage])
  return fractions.Fraction(held, max(visited, 1))
