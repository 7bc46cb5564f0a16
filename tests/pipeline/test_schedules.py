"""Every schedule against the formulas of the literature."""

import itertools

import pytest

from t2x.pipeline import operations as ops
from t2x.pipeline import schedules

_STAGES = (1, 2, 3, 4, 7, 8)


def _microbatches(stages):
  s = stages
  return sorted({1, 2, s, s + 1, 2 * s - 1, 2 * s, 3 * s + 2, 4 * s, 33})


_SIZES = [(s, m) for s in _STAGES for m in _microbatches(s)]
_CHUNKED = [(s, m, v) for s, m in _SIZES for v in (1, 2, 3)]


def _simulated(name, stages, microbatches, chunks=None, **kwargs):
  table = schedules.make(
    name,
    num_stages=stages,
    num_microbatches=microbatches,
    num_chunks=chunks,
    **kwargs,
  )
  assert (table.name, table.num_stages) == (name, stages)
  assert table.num_microbatches == microbatches
  return table.simulate()


def _share(idle, work):
  return idle / (work + idle) + 1e-9


@pytest.mark.parametrize('name', ['gpipe', 'one_f_one_b'])
def test_gpipe_and_1f1b_wait_less_than_published(name):
  for s, m in _SIZES:
    found = _simulated(name, s, m)
    assert found.bubble <= _share(s - 1, m), (s, m)
    assert found.bubble <= _share(2 * (s - 1), 3 * m), (s, m)
    assert found.span <= 3 * m + 2 * (s - 1)


def test_gpipe_is_exactly_its_formula_and_holds_all():
  for s, m in _SIZES:
    found = _simulated('gpipe', s, m)
    assert found.span == 3 * m + 2 * (s - 1)
    assert found.peak_in_flight == (m,) * s


def test_1f1b_holds_as_many_as_stages_follow():
  for s, m in _SIZES:
    found = _simulated('one_f_one_b', s, m)
    assert found.peak_in_flight == tuple(min(m, s - i) for i in range(s))


@pytest.mark.parametrize(
  'name', ['interleaved', 'breadth_first', 'one_f_one_b', 'gpipe']
)
def test_chunks_divide_the_bubble(name):
  for s, m, v in _CHUNKED:
    found = _simulated(name, s, m, v)
    if m >= s:
      assert found.bubble <= _share(2 * (s - 1), 3 * v * m), (s, m, v)
    if name in ('breadth_first', 'gpipe'):
      assert found.peak_in_flight == (v * m,) * s


def test_interleaved_holds_at_most_what_its_warm_up_lets_in():
  for s, m, v in _CHUNKED:
    if m % s == 0 and v > 1:
      most = [2 * (s - i) - 1 + (v - 1) * s for i in range(s)]
      found = _simulated('interleaved', s, m, v)
      limits = tuple(min(v * m, n) for n in most)
      assert all(a <= b for a, b in zip(found.peak_in_flight, limits))


def test_zb_h1_fills_the_tail_within_the_memory_of_1f1b():
  for s, m, v in _CHUNKED:
    found = _simulated('zb_h1', s, m, v)
    if m >= s:
      assert found.bubble <= _share(s - 1, 3 * v * m), (s, m, v)
      assert found.span == 3 * v * m + s - 1
    if v == 1:
      assert max(found.peak_in_flight) <= s


def test_zb_h2_leaves_no_idle_tick_within_a_stage():
  for s, m, v in _CHUNKED:
    found = _simulated('zb_h2', s, m, v)
    if m >= s:
      assert found.span == 3 * v * m + s - 1, (s, m, v)
    if m >= 2 * s - 1 and (v == 1 or m % s == 0):
      assert found.bubble_per_stage == (0,) * s, (s, m, v)
    if v == 1:
      assert max(found.peak_in_flight) <= 2 * s - 1
    if m % s == 0:
      assert max(found.peak_in_flight) <= 2 * s - 1 + (v - 1) * s


def test_zb_v_leaves_no_idle_tick_within_the_memory_of_1f1b():
  for s, m in _SIZES:
    found = _simulated('zb_v', s, m)
    assert found.schedule.placement == 'v'
    assert max(found.peak_in_flight) <= 2 * s
    if m >= 2 * s - 1:
      assert found.span == 6 * m + s - 1, (s, m)
      assert found.bubble_per_stage == (0,) * s, (s, m)


def test_the_path_through_few_microbatches_bounds_every_span():
  # The last stage does F and B of all, and the last B goes all the way back.
  for s, m in _SIZES:
    for name in ('zb_h1', 'zb_h2'):
      if m < s:
        assert _simulated(name, s, m).span == 2 * (s + m) - 1


@pytest.mark.parametrize('name', schedules.NAMES)
def test_lock_step_costs_nothing_where_operations_are_alike(name):
  for s, m in _SIZES:
    for recompute in (False, True):
      found = _simulated(name, s, m, recompute=recompute)
      assert abs(found.bubble_executed - found.bubble) < 1e-9
      assert found.span_executed == found.schedule.num_ticks


@pytest.mark.parametrize('name', schedules.NAMES)
def test_recomputing_costs_one_tick_a_part(name):
  for s, m in _SIZES:
    if m >= s:
      found = _simulated(name, s, m, recompute=True)
      v = found.schedule.num_chunks
      assert found.bubble <= _share(s - 1, v * m), (s, m)


@pytest.mark.parametrize('name', schedules.NAMES)
def test_large_tables_build(name):
  found = _simulated(name, 64, 512)
  v = found.schedule.num_chunks
  assert found.span <= 3 * v * 512 + 2 * 63


@pytest.mark.parametrize('placement', ops.PLACEMENTS)
def test_evaluation_needs_a_tick_a_forward(placement):
  for (s, m), v in itertools.product(_SIZES, (1, 2, 3)):
    table = schedules.forward_only(s, m, v, placement)
    assert not table.training and set(table.operation_TS.flat) <= {0, 1}
    if m >= s:
      turns = 1 if placement == 'loop' else v
      assert table.num_ticks == v * m + turns * (s - 1), (s, m, v)


def test_an_unknown_name_is_answered_with_the_closest():
  with pytest.raises(ValueError, match="'zbh1'. Did you mean 'zb_h1'"):
    schedules.make('zbh1', num_stages=2, num_microbatches=2)


@pytest.mark.parametrize('name', schedules.NAMES)
def test_numbers_that_cannot_be_are_answered_with_the_nearest(name):
  with pytest.raises(ValueError, match='^microbatches=0; the nearest'):
    schedules.make(name, num_stages=2, num_microbatches=0)
  with pytest.raises(ValueError, match='stages=-1; the nearest'):
    schedules.make(name, num_stages=-1, num_microbatches=4)
  with pytest.raises(ValueError, match='^chunks=0; the nearest'):
    schedules.make(name, num_stages=2, num_microbatches=4, num_chunks=0)


def test_zb_v_has_two_chunks():
  with pytest.raises(ValueError, match='chunks=3; the nearest .* 2'):
    schedules.zb_v(4, 8, 3)
