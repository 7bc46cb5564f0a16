"""What devices are told, against an interpreter that follows every message."""

import numpy as np
import pytest

from t2x.pipeline import instructions
from t2x.pipeline import operations as ops
from t2x.pipeline import placement
from t2x.pipeline import schedules

_TOWER = [placement.TowerLayers('tower', 48)]
_TWO = [
  placement.TowerLayers('encoder', 24),
  placement.TowerLayers('decoder', 24),
]
_CASES = [
  (name, stages, micro, recompute)
  for name in schedules.NAMES
  for stages, micro in ((1, 2), (2, 5), (4, 8))
  for recompute in (False, True)
]


def make(name, stages, micro, recompute=False, towers=_TOWER):
  table = schedules.make(
    name, num_stages=stages, num_microbatches=micro, recompute=recompute
  )
  units = placement.even(towers, table.num_parts)
  place = placement.place(towers, units, table)
  return table, place, instructions.make(table, place)


class Device:
  """Buffers that hold names of what is in them."""

  def __init__(self, told, towers):
    num = len(towers)
    self.inbox = [None] * (told.inbox + 1)
    self.until_backward = [[None] * told.stored[t][0] for t in range(num)]
    self.until_weight = [[None] * told.stored[t][1] for t in range(num)]
    self.crossing = [[None] * told.crossing[t] for t in range(num)]


def run(table, place, told):
  """Runs a table; returns how often each (operation, m, part) was done."""
  S, last = table.num_stages, table.num_parts - 1
  devices = [Device(told, place.towers) for _ in range(S)]
  done = np.zeros((5, table.num_microbatches, table.num_parts), int)
  stores = ops.RECOMPUTE if table.recompute else ops.FORWARD
  for row_SC, down, up in zip(
    told.rows_TSC, told.sends_down_T, told.sends_up_T
  ):
    out = [None] * S
    for s, (device, row_C) in enumerate(zip(devices, row_SC)):
      c = dict(zip(instructions.COLUMNS, row_C.tolist()))
      op, m, t = c['operation'], c['microbatch'], c['tower']
      if op == ops.IDLE:
        continue
      first = place.first_P == c['unit']
      (p,) = np.flatnonzero(first & (place.tower_P == t))
      assert table.stage_of(p) == s
      assert c['units'] == place.units_P[p]
      assert c['ends'] == (p == last)
      done[op, m, p] += 1
      key = (m, int(p))
      if op in (ops.FORWARD, ops.RECOMPUTE):
        if p:
          assert device.inbox[c['input']] == ('y', m, p - 1)
        if op == stores and table.training:
          device.until_backward[t][c['until_backward']] = key
          device.until_weight[t][c['until_weight']] = key
        if op == ops.FORWARD:
          out[s] = ('y', *key)
      elif op == ops.BACKWARD:
        want = ('y', m, last) if p == last else ('dx', m, p + 1)
        assert device.inbox[c['gradient']] == want
        assert device.until_backward[t][c['until_backward']] == key
        assert device.until_weight[t][c['until_weight']] == key
        device.crossing[t][c['crossing']] = key
        out[s] = ('dx', *key)
      else:
        assert device.until_weight[t][c['until_weight']] == key
        assert device.crossing[t][c['crossing']] == key
      if t and table.training:  # What cross-attention looks at is there.
        assert device.inbox[c['input']] == ('y', m, p - 1)
    for s, (device, row_C) in enumerate(zip(devices, row_SC)):
      c = dict(zip(instructions.COLUMNS, row_C.tolist()))
      device.inbox[c['from_self']] = out[s]
      if down:
        device.inbox[c['from_previous']] = out[(s - 1) % S]
      else:
        assert c['from_previous'] == told.inbox
      if up:
        device.inbox[c['from_next']] = out[(s + 1) % S]
      else:
        assert c['from_next'] == told.inbox
  return done


@pytest.mark.parametrize('name, stages, micro, recompute', _CASES)
def test_every_value_is_where_it_is_looked_for(name, stages, micro, recompute):
  table, place, told = make(name, stages, micro, recompute)
  done = run(table, place, told)
  kinds = [ops.FORWARD, ops.BACKWARD, ops.WEIGHT]
  assert (done[kinds] == 1).all()
  assert (done[ops.RECOMPUTE] == recompute).all()


@pytest.mark.parametrize('name', schedules.NAMES)
def test_two_towers(name):
  table, place, told = make(name, 4, 6, towers=_TWO)
  assert place.tower_P.tolist() == sorted(place.tower_P)
  assert (run(table, place, told)[1:4] == 1).all()


def test_forwards_alone():
  table = schedules.forward_only(4, 6, 2)
  units = placement.even(_TOWER, table.num_parts)
  place = placement.place(_TOWER, units, table)
  told = instructions.make(table, place)
  assert (run(table, place, told)[1] == 1).all()
  assert told.crossing == (0,)


def test_buffers_are_no_larger_than_the_schedule_needs():
  """1F1B holds S microbatches at most, GPipe all, ZB-H1 S until W."""
  for micro in (8, 32):
    assert make('one_f_one_b', 4, micro)[2].stored == ((4, 4),)
    assert make('zb_h1', 4, micro)[2].stored[0][1] == 4
    assert make('gpipe', 4, micro)[2].stored == ((micro, micro),)
  assert make('one_f_one_b', 4, 8)[2].crossing == (1,)
  # With recomputation the activations live for three ticks.
  assert make('gpipe', 4, 8, recompute=True)[2].stored == ((1, 1),)


def test_a_slot_given_twice_is_seen():
  table, place, told = make('one_f_one_b', 4, 8)
  rows_TSC = told.rows_TSC.copy()
  column = instructions.COLUMNS.index('until_weight')
  rows_TSC[..., column] = 0
  told = instructions.Instructions(
    rows_TSC,
    told.sends_down_T,
    told.sends_up_T,
    told.inbox,
    told.stored,
    told.crossing,
  )
  with pytest.raises(AssertionError):
    run(table, place, told)


def test_trips_are_those_of_the_table():
  table, place, told = make('one_f_one_b', 4, 8)
  per_stage = table.num_microbatches * 12
  for loop in ('forward', 'backward', 'weight'):
    assert told.trips(loop, 0).tolist() == [per_stage] * 4
  assert told.trips('recompute', 0).tolist() == [0] * 4
  assert told.trips('enter', 0).tolist() == [8, 0, 0, 0]
  assert told.trips('leave', -1).tolist() == [0, 0, 0, 8]
