"""When each operation of a schedule runs, how long stages wait, what they hold.

Two time lines. By dependencies only: each stage does its operations in the
table's order, each as soon as the stage is free and what it needs is there;
sending takes no time. As executed: ticks are lock-step, so each lasts as long
as its dearest operation.

Shape suffixes: T ticks, S stages, O kinds of operation, M microbatches, P
parts.
"""

from collections.abc import Sequence
import dataclasses

import numpy as np

from t2x.pipeline import operations as ops
from t2x.pipeline import table as table_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
  """How long operations take, in any unit: of every part, or one for each.

  Attributes:
    forward: of F.
    backward: of B, the gradient of a part's input.
    weight: of W, the gradients of its weights.
    recompute: of R; None for as long as F.
  """

  forward: float | Sequence[float] = 1.0
  backward: float | Sequence[float] = 1.0
  weight: float | Sequence[float] = 1.0
  recompute: float | Sequence[float] | None = None

  def table(self, num_parts: int) -> np.ndarray:
    """Returns cost_OP.

    Raises:
      ValueError: a cost is not positive, or there is not one for each part.
    """
    again = self.forward if self.recompute is None else self.recompute
    fields = {
      'forward': self.forward,
      'backward': self.backward,
      'weight': self.weight,
      'recompute': again,
    }
    rows = [np.zeros(num_parts)]
    for name, value in fields.items():
      row = np.asarray(value, float)
      if row.ndim and row.shape != (num_parts,):
        raise ValueError(
          f'Costs({name}=...) has {row.size} values; one, or one for each of '
          f'the {num_parts} parts (stages x chunks) is needed.'
        )
      if not np.all(np.isfinite(row) & (row > 0)):
        raise ValueError(f'Costs({name}={value}): a cost is greater than 0.')
      rows.append(np.broadcast_to(row, num_parts))
    return np.stack(rows)


def parse_costs(text: str) -> Costs:
  """Reads 'F,B,W' or 'F,B,W,R', as in '1,1,1'.

  Raises:
    ValueError: it is not of that form.
  """
  try:
    numbers = [float(word) for word in text.split(',')]
  except ValueError:
    numbers = []
  if len(numbers) not in (3, 4):
    raise ValueError(
      f'Costs {text!r}: three numbers are needed, of F, B and W, as in 1,1,1, '
      'or four with that of R.'
    )
  names = ('forward', 'backward', 'weight', 'recompute')
  return Costs(**dict(zip(names, numbers)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """What a stage holds for one microbatch of one part, in any unit.

  The defaults count microbatches of parts, each the same until its W is done.

  Attributes:
    inputs: where the forward is recomputed, from F until R: the part's input.
    activations: from F, or R, until B is done.
    weight: from B until W is done: what the weights' gradients need.
  """

  inputs: float = 1.0
  activations: float = 1.0
  weight: float = 1.0

  def __post_init__(self):
    for name, value in dataclasses.asdict(self).items():
      if not 0 <= value < np.inf:
        raise ValueError(f'Memory({name}={value}): it is at least 0.')


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Simulation:
  """A schedule with times.

  Attributes:
    schedule: what was simulated.
    costs: of its operations.
    start_TS: when each entry of the table starts, by dependencies only; NaN
      where idle.
    finish_TS: when it ends.
    executed_start_TS: when it starts as executed, which is when its tick does.
    executed_finish_TS: when it ends as executed; its tick may go on.
    tick_T: how long each tick lasts as executed.
    span: from the first start to the last end, by dependencies only.
    span_executed: as executed.
    bubble: 1 - work / (stages x span).
    bubble_executed: the same share of `span_executed`.
    bubble_per_stage: idle share between a stage's own first and last
      operation, by dependencies only.
    peak_in_flight: for each stage, the microbatches of its parts that are at
      most between F and W (with v chunks a part is 1 / v of the stage).
    peak_memory: for each stage, in the unit of `Memory`.
    uniform: work of a device where all stages do whatever one of them does in
      a tick (`PipelineConfig.uniform`), over the mean of their own work.
  """

  schedule: table_lib.Table
  costs: Costs
  start_TS: np.ndarray
  finish_TS: np.ndarray
  executed_start_TS: np.ndarray
  executed_finish_TS: np.ndarray
  tick_T: np.ndarray
  span: float
  span_executed: float
  bubble: float
  bubble_executed: float
  bubble_per_stage: tuple[float, ...]
  peak_in_flight: tuple[int, ...]
  peak_memory: tuple[float, ...]
  uniform: float


def simulate(
  schedule: table_lib.Table,
  costs: Costs = Costs(),
  memory: Memory = Memory(),
) -> Simulation:
  """Returns times, idle shares and memory of a schedule.

  Raises:
    ValueError: the costs do not fit its parts.
  """
  used_TS = schedule.operation_TS != ops.IDLE
  part_TS = schedule.part(np.arange(schedule.num_stages), schedule.chunk_TS)
  cost_TS = costs.table(schedule.num_parts)[schedule.operation_TS, part_TS]
  finish_TS = np.where(used_TS, _finish(schedule, part_TS, cost_TS), np.nan)
  start_TS = finish_TS - cost_TS
  tick_T = cost_TS.max(axis=1)
  executed_TS = np.where(used_TS, (np.cumsum(tick_T) - tick_T)[:, None], np.nan)
  work_S = cost_TS.sum(axis=0)
  span, span_executed = np.nanmax(finish_TS), tick_T.sum()
  own_S = np.nanmax(finish_TS, axis=0) - np.nanmin(start_TS, axis=0)
  # Sums in another order differ in the last bits.
  share = lambda whole: float(max(0.0, 1 - work_S.sum() / whole))
  stages = schedule.num_stages
  held_S = _peak(schedule, Memory())
  return Simulation(
    schedule=schedule,
    costs=costs,
    start_TS=start_TS,
    finish_TS=finish_TS,
    executed_start_TS=executed_TS,
    executed_finish_TS=executed_TS + cost_TS,
    tick_T=tick_T,
    span=float(span),
    span_executed=float(span_executed),
    bubble=share(stages * span),
    bubble_executed=share(stages * span_executed),
    bubble_per_stage=tuple(np.maximum(0.0, 1 - work_S / own_S).tolist()),
    peak_in_flight=tuple(int(held) for held in held_S),
    peak_memory=tuple(_peak(schedule, memory).tolist()),
    uniform=_of_any(schedule, cost_TS) / float(work_S.mean()),
  )


def _of_any(schedule: table_lib.Table, cost_TS: np.ndarray) -> float:
  """The work of all kinds of operations that any stage does, by tick."""
  kinds = ops.kinds(training=schedule.training, recompute=schedule.recompute)
  of = lambda kind: np.where(schedule.operation_TS == kind, cost_TS, 0)
  return float(sum(of(kind).max(axis=1).sum() for kind in kinds))


def _finish(schedule, part_TS, cost_TS) -> np.ndarray:
  """When each entry ends, by dependencies only."""
  num_parts = schedule.num_parts
  shape = (len(ops.LETTERS), schedule.num_microbatches, num_parts)
  end_OMP = np.zeros(shape)
  free_S = np.zeros(schedule.num_stages)
  finish_TS = np.zeros(cost_TS.shape)
  for tick in range(schedule.num_ticks):
    kinds_S = schedule.operation_TS[tick]
    begin_S = free_S.copy()
    for kind in ops.kinds(
      training=schedule.training, recompute=schedule.recompute
    ):
      (s_N,) = np.nonzero(kinds_S == kind)
      part_N, micro_N = part_TS[tick, s_N], schedule.microbatch_TS[tick, s_N]
      for other, step in ops.steps(kind, recompute=schedule.recompute):
        where_N = part_N + step
        # What precedes the first part or follows the last is there at once.
        there_N = (where_N >= 0) & (where_N < num_parts)
        end_N = end_OMP[other, micro_N, where_N.clip(0, num_parts - 1)]
        begin_S[s_N] = np.maximum(begin_S[s_N], np.where(there_N, end_N, 0))
    used_S = kinds_S != ops.IDLE
    free_S = np.where(used_S, begin_S + cost_TS[tick], free_S)
    finish_TS[tick] = free_S
    micro_S = schedule.microbatch_TS[tick]
    end_OMP[kinds_S, micro_S, part_TS[tick]] = free_S
  return finish_TS


def _peak(schedule: table_lib.Table, memory: Memory) -> np.ndarray:
  """The most that each stage holds at once: peak_S."""
  if not schedule.training:  # Nothing outlives its own tick.
    return np.full(schedule.num_stages, memory.activations)
  after = {ops.FORWARD: memory.activations, ops.BACKWARD: memory.weight}
  if schedule.recompute:
    after[ops.FORWARD] = memory.inputs
    after[ops.RECOMPUTE] = memory.activations
  more_O, before = np.zeros(len(ops.LETTERS)), 0.0
  for kind in ops.kinds(training=True, recompute=schedule.recompute):
    more_O[kind] = after.get(kind, 0.0) - before
    before = after.get(kind, 0.0)
  # An operation holds what is there before it or after it, whichever is more,
  # and what was there before it is there after the one before.
  return np.cumsum(more_O[schedule.operation_TS], axis=0).max(axis=0)
