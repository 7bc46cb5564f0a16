"""Simulates a schedule: times of operations, idle time and memory of stages.

There are two time lines. "By dependencies only" each stage does its operations
in the order of the table, each as soon as the stage is free and the operations
it depends on have ended; sending takes no time. "As executed" ticks are
lock-step, and each tick lasts as long as its slowest operation.

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
  """Durations of operations in any unit: one for all parts, or one for each.

  Attributes:
    forward: duration of F.
    backward: duration of B, the gradient of a part's input.
    weight: duration of W, the gradients of a part's weights.
    recompute: duration of R; None for that of F.
  """

  forward: float | Sequence[float] = 1.0
  backward: float | Sequence[float] = 1.0
  weight: float | Sequence[float] = 1.0
  recompute: float | Sequence[float] | None = None

  def table(self, num_parts: int) -> np.ndarray:
    """Returns the duration of each operation on each part, cost_OP.

    Raises:
      ValueError: a cost is not positive, or the number of costs is neither one
        nor that of the parts.
    """
    recompute = self.forward if self.recompute is None else self.recompute
    fields = {
      'forward': self.forward,
      'backward': self.backward,
      'weight': self.weight,
      'recompute': recompute,
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
  """Parses costs of the form 'F,B,W' or 'F,B,W,R', for example '1,1,1'.

  Raises:
    ValueError: the text has another form.
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
class MicrobatchMemory:
  """Memory of one microbatch of one part, in any unit.

  The defaults count the microbatches of parts from F until W is done.

  Attributes:
    inputs: memory from F until R, where the forward is recomputed: that of the
      part's input.
    activations: memory from F, or R, until B is done.
    weight: memory from B until W is done: that of the values which the
      gradients of the weights need.
  """

  inputs: float = 1.0
  activations: float = 1.0
  weight: float = 1.0

  def __post_init__(self) -> None:
    for name, value in dataclasses.asdict(self).items():
      if not 0 <= value < np.inf:
        raise ValueError(f'MicrobatchMemory({name}={value}): it is at least 0.')


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Simulation:
  """A schedule with the times of its operations.

  Times are in the unit of `Costs`.

  Attributes:
    schedule: schedule that was simulated.
    costs: durations of its operations.
    start_TS: start of each entry of the table, by dependencies only; NaN where
      idle.
    finish_TS: end of each entry, by dependencies only; NaN where idle.
    executed_start_TS: start of each entry as executed, which is the start of
      its tick; NaN where idle.
    executed_finish_TS: end of each entry as executed; its tick may last longer.
      NaN where idle.
    tick_T: duration of each tick as executed.
    span: time from the first start to the last end, by dependencies only.
    span_executed: time from the first start to the last end, as executed.
    bubble: idle share by dependencies only, 1 - work / (stages x span).
    bubble_executed: idle share as executed, the same with `span_executed`.
    bubble_per_stage: idle share of each stage between its own first and last
      operation, by dependencies only.
    peak_in_flight: most microbatches of parts that are between F and W at once,
      for each stage (with v chunks a part is 1 / v of the stage).
    peak_memory: most memory at once, for each stage, in the unit of
      `MicrobatchMemory`.
    uniform: work of a device where all stages do every kind of operation that
      any of them does in a tick (`PipelineConfig.uniform`), divided by the mean
      work of a stage.
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
  memory: MicrobatchMemory = MicrobatchMemory(),
) -> Simulation:
  """Returns the times, idle shares and memory of a schedule.

  Args:
    schedule: schedule to be simulated.
    costs: durations of its operations.
    memory: memory of a microbatch of a part.

  Raises:
    ValueError: the number of costs is neither one nor that of the parts.
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
  # Rounding can make the share slightly negative.
  share = lambda total: float(max(0.0, 1 - work_S.sum() / total))
  stages = schedule.num_stages
  in_flight_S = _peak(schedule, MicrobatchMemory())
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
    peak_in_flight=tuple(int(num) for num in in_flight_S),
    peak_memory=tuple(_peak(schedule, memory).tolist()),
    uniform=_uniform_work(schedule, cost_TS) / float(work_S.mean()),
  )


def _uniform_work(schedule: table_lib.Table, cost_TS: np.ndarray) -> float:
  """Returns the work of every kind of operation that any stage does in a tick.

  It is summed over all ticks.
  """
  kinds = ops.kinds(training=schedule.training, recompute=schedule.recompute)
  of = lambda kind: np.where(schedule.operation_TS == kind, cost_TS, 0)
  return float(sum(of(kind).max(axis=1).sum() for kind in kinds))


def _finish(
  schedule: table_lib.Table, part_TS: np.ndarray, cost_TS: np.ndarray
) -> np.ndarray:
  """Returns the end of each entry, by dependencies only."""
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
        # The first part waits for no part before it, the last for none after.
        there_N = (where_N >= 0) & (where_N < num_parts)
        end_N = end_OMP[other, micro_N, where_N.clip(0, num_parts - 1)]
        begin_S[s_N] = np.maximum(begin_S[s_N], np.where(there_N, end_N, 0))
    used_S = kinds_S != ops.IDLE
    free_S = np.where(used_S, begin_S + cost_TS[tick], free_S)
    finish_TS[tick] = free_S
    micro_S = schedule.microbatch_TS[tick]
    end_OMP[kinds_S, micro_S, part_TS[tick]] = free_S
  return finish_TS


def _peak(schedule: table_lib.Table, memory: MicrobatchMemory) -> np.ndarray:
  """Returns the most memory that each stage needs at once, peak_S."""
  if not schedule.training:  # Activations are used within their tick alone.
    return np.full(schedule.num_stages, memory.activations)
  after = {ops.FORWARD: memory.activations, ops.BACKWARD: memory.weight}
  if schedule.recompute:
    after[ops.FORWARD] = memory.inputs
    after[ops.RECOMPUTE] = memory.activations
  more_O, before = np.zeros(len(ops.LETTERS)), 0.0
  for kind in ops.kinds(training=True, recompute=schedule.recompute):
    more_O[kind] = after.get(kind, 0.0) - before
    before = after.get(kind, 0.0)
  # An operation needs the memory before it or after it, whichever is more. The
  # memory before it is the memory after the previous operation.
  return np.cumsum(more_O[schedule.operation_TS], axis=0).max(axis=0)
