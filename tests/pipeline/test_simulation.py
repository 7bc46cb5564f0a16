"""Times, memory and generated tables, each against a plain count."""

import itertools

import numpy as np
import pytest

from t2x.pipeline import operations as ops
from t2x.pipeline import schedules
from t2x.pipeline import simulation
from t2x.pipeline import table_search

_UNLIKE = simulation.Costs(forward=1, backward=1.5, weight=0.75)
_TABLES = [
  schedules.make(name, num_stages=s, num_microbatches=m, recompute=recompute)
  for name in schedules.NAMES
  for s, m in ((1, 2), (3, 7), (4, 8))
  for recompute in (False, True)
]
_IDS = [
  f'{t.name}-{t.num_stages}-{t.num_microbatches}-{t.recompute:d}'
  for t in _TABLES
]
all_tables = pytest.mark.parametrize('table', _TABLES, ids=_IDS)


def _entries(table):
  """Yields (tick, stage, operation, microbatch, part) in order of ticks."""
  for tick, stage in np.argwhere(table.operation_TS):
    at = tick, stage
    yield (
      *at,
      int(table.operation_TS[at]),
      int(table.microbatch_TS[at]),
      int(table.part(stage, table.chunk_TS[at])),
    )


@all_tables
def test_times_are_the_earliest_that_dependencies_allow(table):
  found = table.simulate(_UNLIKE)
  cost = dict(zip(range(5), (0, 1, 1.5, 0.75, 1)))
  ends, free = {}, [0.0] * table.num_stages
  for tick, stage, kind, m, part in _entries(table):
    needed = ops.needs(kind, part, table.num_parts, recompute=table.recompute)
    start = max([free[stage], *(ends[k, m, p] for k, p in needed)])
    ends[kind, m, part] = free[stage] = start + cost[kind]
    assert found.start_TS[tick, stage] == start
    assert found.finish_TS[tick, stage] == free[stage]
  assert found.span == max(free)
  work = sum(cost[entry[2]] for entry in _entries(table))
  assert found.bubble == pytest.approx(1 - work / table.num_stages / found.span)


@all_tables
def test_uniform_stages_do_all_that_one_of_them_does(table):
  cost = (0, 1, 1.5, 0.75, 1)
  done = {(entry[0], entry[2]) for entry in _entries(table)}
  work = sum(cost[entry[2]] for entry in _entries(table)) / table.num_stages
  want = sum(cost[kind] for _, kind in done) / work
  assert table.simulate(_UNLIKE).uniform == pytest.approx(want)


@all_tables
def test_a_tick_lasts_as_long_as_its_dearest_operation(table):
  found = table.simulate(_UNLIKE)
  cost = np.array((0, 1, 1.5, 0.75, 1))
  tick_T = [max(cost[row]) for row in table.operation_TS]
  np.testing.assert_array_equal(found.tick_T, tick_T)
  assert found.span_executed == pytest.approx(sum(tick_T))
  for tick, stage, *_ in _entries(table):
    begin = sum(tick_T[:tick])
    assert found.executed_start_TS[tick, stage] == pytest.approx(begin)
  assert found.bubble_executed >= found.bubble - 1e-12


def test_a_stage_of_its_own_cost():
  table = schedules.gpipe(2, 1)
  costs = simulation.Costs(forward=(1, 10), backward=(2, 20), weight=(3, 30))
  found = table.simulate(costs)
  # F0 F1 B1, then W1 beside B0 and W0.
  assert found.span == 1 + 10 + 20 + 30
  assert found.span_executed == 1 + 10 + 20 + 30 + 3
  assert found.bubble_per_stage == pytest.approx((1 - 6 / 36, 0))


@all_tables
def test_memory_is_what_is_held_at_once(table):
  memory = simulation.MicrobatchMemory(inputs=1, activations=10, weight=4)
  peaks = [0] * table.num_stages
  held = [{} for _ in peaks]
  flight = [0] * table.num_stages
  counts = [set() for _ in peaks]
  for _, stage, kind, m, part in _entries(table):
    size = {ops.FORWARD: 10, ops.RECOMPUTE: 10, ops.BACKWARD: 4, ops.WEIGHT: 0}
    if table.recompute:
      size[ops.FORWARD] = 1
    before = held[stage].get((m, part), 0)
    now = held[stage] | {(m, part): max(before, size[kind])}
    peaks[stage] = max(peaks[stage], sum(now.values()))
    held[stage][m, part] = size[kind]
    if kind == ops.FORWARD:
      counts[stage].add((m, part))
    flight[stage] = max(flight[stage], len(counts[stage]))
    if kind == ops.WEIGHT:
      counts[stage].remove((m, part))
  found = table.simulate(memory=memory)
  assert found.peak_memory == pytest.approx(peaks)
  assert found.peak_in_flight == tuple(flight)


def test_evaluation_holds_one_at_a_time():
  found = schedules.forward_only(3, 5).simulate()
  assert found.peak_in_flight == (1, 1, 1)


@pytest.mark.parametrize(
  'costs, message',
  [
    ({'forward': 0}, r'forward=0\): a cost is greater'),
    ({'weight': float('nan')}, 'weight=nan'),
    ({'backward': (1, 2, 3)}, '3 values; one, or one for each of the 2 parts'),
  ],
)
def test_costs_that_cannot_be_are_refused(costs, message):
  with pytest.raises(ValueError, match=message):
    schedules.gpipe(2, 2).simulate(simulation.Costs(**costs))


def test_costs_are_read_from_text():
  costs = simulation.parse_costs('1,2,0.5')
  assert costs == simulation.Costs(forward=1, backward=2, weight=0.5)
  for text in ('1,2', '1,2,x', '', '1,2,3,4,5'):
    with pytest.raises(ValueError, match='three numbers'):
      simulation.parse_costs(text)


# --- Buffers. ---


# --- Generated tables. ---

_FORMS = [(1, 'loop'), (2, 'loop'), (2, 'v'), (3, 'v'), (3, 'loop')]


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('chunks, placement', _FORMS)
def test_generated_tables_keep_to_the_limit(chunks, placement, recompute):
  memory = simulation.MicrobatchMemory(inputs=0.25, activations=1, weight=0.5)
  least = chunks if not recompute else 0.25 * (chunks - 1) + 1
  for (s, m), more in itertools.product([(1, 3), (3, 2), (4, 9)], (0, 0.5, 6)):
    limit = least + more
    table = table_search.search(
      s,
      m,
      limit=limit,
      costs=_UNLIKE,
      memory=memory,
      num_chunks=chunks,
      placement=placement,
      recompute=recompute,
    )
    found = table.simulate(memory=memory)
    assert max(found.peak_memory) <= limit + 1e-6
    assert (table.num_chunks, table.placement) == (chunks, placement)
    assert (table.recompute, table.name) == (recompute, 'generated')


def test_more_memory_makes_a_generated_table_shorter():
  spans = [
    table_search.search(4, 12, limit=limit).simulate().span
    for limit in (1, 2, 4)
  ]
  assert spans[0] > spans[1] > spans[2] == 3 * 12 + 3


@pytest.mark.parametrize('costs', [simulation.Costs(), _UNLIKE])
def test_generated_tables_are_no_slower_than_those_that_fit(costs):
  for name, limit in (('one_f_one_b', 4), ('zb_h1', 4), ('zb_h2', 7)):
    known = schedules.make(name, num_stages=4, num_microbatches=12)
    table = table_search.search(4, 12, limit=limit, costs=costs)
    span = table.simulate(costs).span_executed
    assert span <= known.simulate(costs).span_executed + 1e-9


def test_ticks_of_one_kind_fill_unlike_costs():
  costs = simulation.Costs(backward=2, weight=1)
  table = table_search.search(4, 64, limit=8, costs=costs)
  # With B beside F half of the F ticks would be idle.
  assert table.simulate(costs).bubble_executed < 0.05
  assert schedules.zb_h2(4, 64).simulate(costs).bubble_executed > 0.25


def test_stages_can_have_limits_of_their_own():
  table = table_search.search(3, 6, limit=(5, 2, 1))
  peaks = table.simulate().peak_memory
  assert all(peak <= limit for peak, limit in zip(peaks, (5, 2, 1)))


def test_a_limit_below_one_microbatch_is_answered_with_the_least():
  with pytest.raises(ValueError, match='stage 1: .* 1.5 .* the least .* is 2'):
    table_search.search(2, 4, limit=(2, 1.5), num_chunks=2)
  assert table_search.search(2, 4, limit=2, num_chunks=2)
  with pytest.raises(ValueError, match='2 limits for 3 stages'):
    table_search.search(3, 4, limit=(2, 2))
