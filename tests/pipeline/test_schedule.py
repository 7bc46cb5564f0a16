"""Tables that cannot run are refused, and the others kept as they are."""

import dataclasses

import numpy as np
import pytest

from t2x.pipeline import from_orders
from t2x.pipeline import operations as ops
from t2x.pipeline import schedule as schedule_lib
from t2x.pipeline import schedules

F, B, W, R = ops.FORWARD, ops.BACKWARD, ops.WEIGHT, ops.RECOMPUTE


def _changed(table, changes):
  """The table with entries {(tick, stage): (operation, microbatch, chunk)}."""
  names = ('operation_TS', 'microbatch_TS', 'chunk_TS')
  arrays = {name: getattr(table, name).copy() for name in names}
  for at, values in changes.items():
    for name, value in zip(names, values):
      arrays[name][at] = value
  fields = {
    f.name: getattr(table, f.name) for f in dataclasses.fields(table) if f.init
  }
  return schedule_lib.Schedule(**(fields | arrays))


def _where(table, kind, micro, part):
  return int(table.tick_OMP[kind, micro, part]), int(table.stage_of(part))


def _entry(table, at):
  return tuple(
    int(a[at])
    for a in (table.operation_TS, table.microbatch_TS, table.chunk_TS)
  )


def _swapped(table, one, other):
  return _changed(table, {one: _entry(table, other), other: _entry(table, one)})


TABLE = schedules.gpipe(3, 4)
IDLE = (ops.IDLE, 0, 0)


def test_parts_go_round_or_down_and_up():
  loop = schedules.interleaved(3, 3, 2)
  assert [[loop.part(s, c) for s in range(3)] for c in (0, 1)] == [
    [0, 1, 2],
    [3, 4, 5],
  ]
  v = schedules.zb_v(3, 3)
  assert [[v.part(s, c) for s in range(3)] for c in (0, 1)] == [
    [0, 1, 2],
    [5, 4, 3],
  ]


@pytest.mark.parametrize('placement', ops.PLACEMENTS)
@pytest.mark.parametrize('stages', [1, 2, 3, 5])
def test_consecutive_parts_are_on_neighbours(placement, stages):
  table = schedules.forward_only(stages, 2, 4, placement)
  parts = np.arange(table.num_parts)
  stage_P, chunk_P = table.stage_of(parts), table.chunk_of(parts)
  np.testing.assert_array_equal(table.part(stage_P, chunk_P), parts)
  steps = set(((stage_P[1:] - stage_P[:-1]) % stages).tolist())
  assert steps <= {0, 1 % stages, -1 % stages}
  if placement == 'loop':
    assert steps == {1 % stages}


def test_a_lost_operation_is_named():
  at = _where(TABLE, B, 2, 1)
  with pytest.raises(ValueError, match='B of microbatch 2 on stage 1 is lost'):
    _changed(TABLE, {at: IDLE})


def test_an_operation_done_twice_is_named():
  tick, stage = _where(TABLE, F, 3, 2)
  first, _ = _where(TABLE, F, 2, 2)
  message = (
    f'tick {tick}, stage {stage}: F of microbatch 2 is done a second time; '
    f'the first was in tick {first}'
  )
  with pytest.raises(ValueError, match=message):
    _changed(TABLE, {(tick, stage): (F, 2, 0)})


@pytest.mark.parametrize(
  'early, late, what',
  [
    ((F, 0), (F, 1), 'the output that stage 0 makes'),
    ((B, 0), (W, 0), 'the gradient that stage 1 makes'),
  ],
)
def test_an_operation_before_what_it_needs_is_named(early, late, what):
  one = _where(TABLE, *early, 1)
  other = _where(TABLE, *late, 1)
  with pytest.raises(ValueError, match=what) as error:
    _swapped(TABLE, one, other)
  tick, stage = one
  assert str(error.value).startswith(f'tick {tick}, stage {stage}: ')
  assert 'microbatch' in str(error.value)


def test_a_message_is_there_one_tick_after_it_was_sent():
  # F of microbatch 0 on both stages in one tick.
  with pytest.raises(ValueError) as error:
    schedule_lib.Schedule(
      name='x',
      operation_TS=np.array([[F, F]]),
      microbatch_TS=np.zeros((1, 2), int),
      chunk_TS=np.zeros((1, 2), int),
      num_microbatches=1,
      training=False,
    )
  assert str(error.value) == (
    'tick 0, stage 1: F of microbatch 0 needs the output that stage 0 makes '
    'in tick 0 (F of microbatch 0): move it to tick 1 or later.'
  )


def test_recomputation_stands_between_forward_and_backward():
  table = schedules.one_f_one_b(2, 3, recompute=True)
  r, b = _where(table, R, 1, 1), _where(table, B, 1, 1)
  with pytest.raises(ValueError, match='needs the activations that stage 1'):
    _swapped(table, r, b)
  f = _where(table, F, 1, 1)
  with pytest.raises(ValueError, match='R of microbatch 1 needs the output'):
    _swapped(table, f, _where(table, R, 1, 1))


def test_operations_of_another_mode_are_refused():
  at = _where(TABLE, W, 0, 0)
  with pytest.raises(ValueError, match='R of microbatch 0 is not used with'):
    _changed(TABLE, {at: (R, 0, 0)})
  with pytest.raises(ValueError, match='nothing to recompute'):
    dataclasses.replace(TABLE, recompute=True, training=False)


@pytest.mark.parametrize(
  'entry, message',
  [
    ((7, 0, 0), 'tick 2, stage 1: operation_TS is 7'),
    ((F, 4, 0), 'tick 2, stage 1: microbatch_TS is 4; .* 0 to 3'),
    ((F, 0, 1), 'tick 2, stage 1: chunk_TS is 1; .* 0 to 0'),
  ],
)
def test_entries_out_of_range_are_named(entry, message):
  with pytest.raises(ValueError, match=message):
    _changed(TABLE, {(2, 1): entry})


def test_tables_of_other_shapes_or_types_are_refused():
  with pytest.raises(ValueError, match='chunk_TS has shape'):
    dataclasses.replace(TABLE, chunk_TS=TABLE.chunk_TS[1:])
  with pytest.raises(ValueError, match='integers are needed'):
    dataclasses.replace(TABLE, microbatch_TS=TABLE.microbatch_TS * 1.0)


def test_a_table_cannot_be_changed():
  with pytest.raises(ValueError, match='read-only'):
    TABLE.operation_TS[0, 0] = 0


# --- Orders. ---


def _orders(*stages):
  letters = ops.LETTERS.index
  return [
    [(letters(word[0]), int(word[1:]), 0) for word in stage.split()]
    for stage in stages
  ]


def _from_orders(*stages, num_microbatches=2):
  return from_orders.from_orders(
    _orders(*stages), name='x', num_microbatches=num_microbatches
  )


def test_operations_come_as_early_as_they_can():
  table = _from_orders('F0 F1 B0 W0 B1 W1', 'F0 F1 B0 B1 W0 W1')
  assert table.text() == (
    'stage 0  F0 F1 .  .  B0 W0 B1 W1\nstage 1  .  F0 F1 B0 B1 W0 W1 .'
  )


def test_a_cycle_of_orders_is_told_step_by_step():
  with pytest.raises(ValueError, match='A cycle') as error:
    _from_orders('F0 B0 F1 W0 B1 W1', 'F1 F0 B0 B1 W0 W1')
  message = str(error.value)
  assert (
    'stage 0, at place 1 of its order, waits with B of microbatch 0, chunk 0 '
    'for B of microbatch 0, chunk 0 of stage 1; stage 1, at place 0 of its '
    'order, waits with F of microbatch 1'
  ) in message


def test_a_stage_can_wait_for_itself():
  with pytest.raises(ValueError, match='A cycle, .* stage 0, .* of stage 0'):
    _from_orders('B0 F0 W0', num_microbatches=1)


def test_an_order_without_what_another_needs_is_named():
  with pytest.raises(ValueError, match='Lost: stage 1, .* F of microbatch 1'):
    _from_orders('F0 B0 W0', 'F0 B0 W0 F1 B1 W1')


def test_an_order_with_an_operation_twice_is_named():
  with pytest.raises(
    ValueError, match='stage 0 does F of microbatch 0,.*second'
  ):
    _from_orders('F0 F0 B0 W0', num_microbatches=1)
