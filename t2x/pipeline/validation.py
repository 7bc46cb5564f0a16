"""Checks that a table can run; errors give the tick, stage and microbatch.

Shape suffixes: T ticks, S stages, N operations of the table in order of ticks,
O kinds of operation, M microbatches, P parts.
"""

from collections.abc import Sequence

import numpy as np

from t2x.pipeline import operations as ops
from t2x.pipeline import table as table_lib


def check_fields(schedule: table_lib.Table) -> None:
  """Checks the sizes and types of a table, and the range of every entry.

  Raises:
    ValueError: one of them is wrong. For an entry out of range the message
      gives the first such tick and its stage.
  """
  for name in ('num_microbatches', 'num_chunks'):
    value = getattr(schedule, name)
    if value < 1:
      raise ValueError(f'{name}={value}; the nearest that works is 1.')
  if schedule.placement not in ops.PLACEMENTS:
    raise ValueError(
      f'placement={schedule.placement!r}; it is one of {ops.PLACEMENTS}.'
    )
  if schedule.recompute and not schedule.training:
    raise ValueError('A table of forwards only has nothing to recompute for.')
  shape = np.shape(schedule.operation_TS)
  highest = {
    'operation_TS': len(ops.LETTERS) - 1,
    'microbatch_TS': schedule.num_microbatches - 1,
    'chunk_TS': schedule.num_chunks - 1,
  }
  for name, most in highest.items():
    array_TS = np.asarray(getattr(schedule, name))
    if array_TS.ndim != 2 or array_TS.shape != shape or not array_TS.size:
      raise ValueError(
        f'{name} has shape {array_TS.shape} and operation_TS {shape}; all '
        'three tables are (ticks, stages), each at least 1.'
      )
    if not np.issubdtype(array_TS.dtype, np.integer):
      raise ValueError(f'{name} is of {array_TS.dtype}; integers are needed.')
    bad = np.argwhere((array_TS < 0) | (array_TS > most))
    if len(bad):
      tick, stage = bad[0]
      raise ValueError(
        f'tick {tick}, stage {stage}: {name} is {array_TS[tick, stage]}; it '
        f'goes from 0 to {most}.'
      )


def check_table(schedule: table_lib.Table) -> np.ndarray:
  """Checks that each operation is done once, after those it depends on.

  Returns:
    The tick of each operation, tick_OMP; -1 for kinds that are not used.

  Raises:
    ValueError: an operation is missing, is done twice, is of a kind that the
      schedule does not use, or comes before one that it depends on.
  """
  op_N, micro_N, part_N, tick_N = as_lists(schedule)
  shape = (len(ops.LETTERS), schedule.num_microbatches, schedule.num_parts)
  kinds = ops.kinds(training=schedule.training, recompute=schedule.recompute)
  foreign = np.flatnonzero(~np.isin(op_N, kinds))
  if len(foreign):
    i = int(foreign[0])
    used = ', '.join(ops.LETTERS[kind] for kind in kinds)
    raise ValueError(
      f'{_place(schedule, tick_N[i], op_N[i], micro_N[i], part_N[i])} is not '
      f'used with training={schedule.training} and '
      f'recompute={schedule.recompute}: only {used}.'
    )
  key_N = np.ravel_multi_index((op_N, micro_N, part_N), shape)
  tick_K = np.full(np.prod(shape), -1)
  # In reverse, so that the first of two entries remains.
  tick_K[key_N[::-1]] = tick_N[::-1]
  again = np.flatnonzero(tick_K[key_N] != tick_N)
  if len(again):
    i = int(again[0])
    raise ValueError(
      f'{_place(schedule, tick_N[i], op_N[i], micro_N[i], part_N[i])} is done '
      f'a second time; the first was in tick {tick_K[key_N[i]]}.'
    )
  tick_OMP = tick_K.reshape(shape)
  _check_none_lost(schedule, kinds, tick_OMP)
  _check_order(schedule, kinds, tick_OMP)
  return tick_OMP


def as_lists(schedule: table_lib.Table) -> tuple[np.ndarray, ...]:
  """Returns all operations of a table: op_N, micro_N, part_N, tick_N."""
  tick_N, stage_N = np.nonzero(schedule.operation_TS)
  entries = (tick_N, stage_N)
  part_N = schedule.part(stage_N, schedule.chunk_TS[entries])
  return (
    schedule.operation_TS[entries],
    schedule.microbatch_TS[entries],
    part_N,
    tick_N,
  )


def _check_none_lost(
  schedule: table_lib.Table, kinds: Sequence[int], tick_OMP: np.ndarray
) -> None:
  for kind in kinds:
    lost = np.argwhere(tick_OMP[kind] < 0)
    if len(lost):
      micro, part = lost[0]
      others = f', and {len(lost) - 1} more' if len(lost) > 1 else ''
      raise ValueError(
        f'{_name(schedule, kind, micro, part)} on stage '
        f'{schedule.stage_of(part)} is lost{others}: none of the '
        f'{schedule.num_ticks} ticks has it. Every stage does each operation '
        'of each microbatch once.'
      )


def _check_order(
  schedule: table_lib.Table, kinds: Sequence[int], tick_OMP: np.ndarray
) -> None:
  """Raises for the first operation that comes before one it depends on."""
  violations = []
  for kind in kinds:
    for part in range(schedule.num_parts):
      for other, where in ops.needs(
        kind, part, schedule.num_parts, recompute=schedule.recompute
      ):
        tick_M, need_M = tick_OMP[kind, :, part], tick_OMP[other, :, where]
        for m in np.flatnonzero(need_M >= tick_M)[:1]:
          violations.append((tick_M[m], kind, m, part, other, where, need_M[m]))
  if violations:
    tick, kind, m, part, other, where, need = min(violations)
    what = {
      ops.FORWARD: 'the output',
      ops.BACKWARD: 'the gradient',
      ops.RECOMPUTE: 'the activations',
    }[other]
    raise ValueError(
      f'{_place(schedule, tick, kind, m, part)} needs {what} that stage '
      f'{schedule.stage_of(where)} makes in tick {need} '
      f'({_name(schedule, other, m, where)}): move it to tick {need + 1} or '
      'later.'
    )


def _place(
  schedule: table_lib.Table, tick: int, kind: int, micro: int, part: int
) -> str:
  stage = schedule.stage_of(part)
  return f'tick {tick}, stage {stage}: {_name(schedule, kind, micro, part)}'


def _name(schedule: table_lib.Table, kind: int, micro: int, part: int) -> str:
  chunk = f', chunk {schedule.chunk_of(part)}'
  return (
    f'{ops.LETTERS[kind]} of microbatch {micro}'
    f'{chunk if schedule.num_chunks > 1 else ""}'
  )
