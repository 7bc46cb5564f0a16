"""Layers are placed so that the slowest stage is as fast as it can be."""

import dataclasses
import itertools
import random

import jax
import numpy as np
import pytest
import tiny

from t2x.compilation import program as program_lib
from t2x.config import consistency
from t2x.config import overrides
from t2x.config import partitioning
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.pipeline import balancer
from t2x.pipeline import config as pipeline_config
from t2x.pipeline import placement
from t2x.pipeline import schedules


def stack(*costs, name='tower', **settings):
  tower = placement.TowerLayers(name, len(costs))
  return balancer.Stack(tower=tower, costs=costs, **settings)


def table_of(name, stages, microbatches=4, **settings):
  return schedules.make(
    name, num_stages=stages, num_microbatches=microbatches, **settings
  )


def loads(stacks, table, units):
  """The load of each stage, added up one unit at a time."""
  result, part = [0] * table.num_stages, 0
  for one in stacks:
    costs = list(one.costs)
    costs[0] += one.first
    costs[-1] += one.last
    while costs:
      share, costs = costs[: units[part]], costs[units[part] :]
      assert len(share) == units[part] >= 1, 'a part lies in one tower'
      result[table.stage_of(part)] += sum(share)
      part += 1
  assert part == len(units) == table.num_parts
  return result


def merit(stacks, table, units):
  each = loads(stacks, table, units)
  return max(each), sum(load**2 for load in each)


def all_placements(stacks, table):
  def cuts(size, parts):
    for ends in itertools.combinations(range(1, size), parts - 1):
      yield [b - a for a, b in zip((0, *ends), (*ends, size))]

  sizes = [len(one.costs) for one in stacks]
  for shares in itertools.product(*(range(1, size + 1) for size in sizes)):
    if sum(shares) == table.num_parts:
      for rows in itertools.product(*map(cuts, sizes, shares)):
        yield sum(rows, [])


def needed(stacks, table, units):
  """What the fullest device needs, in the terms of the schedule's table."""
  total, part = 0, 0
  for one in stacks:
    mine, rest = [], len(one.costs)
    while rest:
      mine.append(part)
      rest -= units[part]
      part += 1
    stages = range(table.num_stages)
    here = lambda s, mine=mine: [p for p in mine if table.stage_of(p) == s]
    held = max(sum(units[p] for p in here(s)) for s in stages)
    total += one.unit_bytes * held
    made, back, last = table.tick_OMP[1], table.tick_OMP[2], table.tick_OMP[3]
    most = max(units[p] for p in mine)
    for price, start in ((one.kept_bytes, made), (one.left_bytes, back)):
      total += (
        price
        * most
        * max(
          ((start[:, here(s)] <= t) & (t <= last[:, here(s)])).sum()
          for s in stages
          for t in range(table.num_ticks)
        )
      )
  return total


def random_stacks(rng, table, towers, **settings):
  sizes = [table.num_parts // towers + rng.randint(1, 3) for _ in range(towers)]
  cost = lambda: rng.randint(1, 9)
  return [
    stack(
      *(cost() for _ in range(size)),
      name=str(t),
      first=rng.randint(0, 4),
      last=rng.randint(0, 9),
      **settings,
    )
    for t, size in enumerate(sizes)
  ]


@pytest.mark.parametrize('towers', [1, 2])
@pytest.mark.parametrize(
  'name, stages', [('one_f_one_b', 4), ('interleaved', 2), ('zb_v', 3)]
)
def test_no_placement_is_better(name, stages, towers):
  """One part to a stage, and several, on either placement."""
  rng, table = random.Random(0), table_of(name, stages)
  for _ in range(12):
    stacks = random_stacks(rng, table, towers)
    got = balancer.balance(stacks, table)
    best = min(merit(stacks, table, p) for p in all_placements(stacks, table))
    assert merit(stacks, table, got) == best


@pytest.mark.parametrize('towers', [1, 2])
@pytest.mark.parametrize('name', ['one_f_one_b', 'interleaved', 'zb_h2'])
def test_no_placement_within_the_limit_is_better(name, towers):
  rng, table = random.Random(1), table_of(name, 3)
  price = {'unit_bytes': 7, 'kept_bytes': 3, 'left_bytes': 2}
  refused = 0
  for _ in range(4):
    stacks = random_stacks(rng, table, towers, **price)
    placements = list(all_placements(stacks, table))
    bytes_of = [needed(stacks, table, p) for p in placements]
    free = needed(stacks, table, balancer.balance(stacks, table))
    for limit in (free - 1, min(bytes_of), min(bytes_of) - 1):
      fit = [p for p, b in zip(placements, bytes_of) if b <= limit]
      if not fit:
        refused += 1
        with pytest.raises(ValueError, match='a device needs'):
          balancer.balance(stacks, table, limit=limit)
        continue
      got = balancer.balance(stacks, table, limit=limit)
      assert needed(stacks, table, got) <= limit
      best = min(merit(stacks, table, p) for p in fit)
      assert merit(stacks, table, got) == best
  assert refused >= 4


def test_local_search(monkeypatch):
  """Equal units are placed best; others within a few percent in the mean."""
  monkeypatch.setattr(balancer, '_MAX_EXHAUSTIVE', 0)
  rng, ratios = random.Random(2), []
  for name, stages in [('interleaved', 3), ('zb_v', 4), ('zb_v', 2)] * 8:
    table = table_of(name, stages)
    size, last = table.num_parts + rng.randint(1, 3), rng.randint(0, 20)
    stacks = [stack(*[5] * size, last=last)]
    best = min(merit(stacks, table, p) for p in all_placements(stacks, table))
    assert merit(stacks, table, balancer.balance(stacks, table)) == best
    stacks = [stack(*(rng.randint(10, 15) for _ in range(size)), last=last)]
    best = min(merit(stacks, table, p) for p in all_placements(stacks, table))
    got = merit(stacks, table, balancer.balance(stacks, table))
    ratios.append(got[0] / best[0])
  assert max(ratios) < 1.15 and np.mean(ratios) < 1.02


def test_local_search_within_a_limit(monkeypatch):
  monkeypatch.setattr(balancer, '_MAX_EXHAUSTIVE', 0)
  bounded = 0
  for name, stages, extra in itertools.product(
    ('interleaved', 'zb_v'), (2, 3), (1, 2, 4)
  ):
    table = table_of(name, stages)
    costs = [5] * (table.num_parts + extra)
    stacks = [stack(*costs, last=18, unit_bytes=7, kept_bytes=2)]
    free = balancer.balance(stacks, table)
    limit = needed(stacks, table, free) - 1
    fit = [
      units
      for units in all_placements(stacks, table)
      if needed(stacks, table, units) <= limit
    ]
    if fit:
      bounded += 1
      got = balancer.balance(stacks, table, limit=limit)
      assert needed(stacks, table, got) <= limit
      best = min(merit(stacks, table, units) for units in fit)
      assert merit(stacks, table, got) == best
  assert bounded >= 3


def test_head_makes_the_last_stage_lighter():
  table = table_of('one_f_one_b', 4)
  assert balancer.balance([stack(*[1] * 12)], table) == [3, 3, 3, 3]
  heavy = [stack(*[1] * 13, last=3)]
  assert balancer.balance(heavy, table) == [4, 4, 4, 1]
  first = [stack(*[1] * 13, first=3)]
  assert balancer.balance(first, table) == [1, 4, 4, 4]


def test_of_equal_placements_the_even_one():
  """What need not move stays: [2, 2] and not [1, 3] or [3, 1]."""
  table = table_of('one_f_one_b', 2)
  assert balancer.balance([stack(0, 0, 0, 0)], table) == [2, 2]
  assert balancer.balance([stack(1, 0, 0, 1)], table) == [2, 2]
  # Twice the even shares are as even as can be: later parts have one less.
  table = table_of('one_f_one_b', 3)
  assert balancer.balance([stack(*[1] * 5)], table) == [2, 2, 1]


def test_of_equal_placements_the_one_next_to_the_even_one():
  """The even one is [3, 2, 2, 2], and too much for the last."""
  stacks = [stack(*[1] * 9, last=3)]
  for table in (table_of('one_f_one_b', 4), table_of('interleaved', 2)):
    units = balancer.balance(stacks, table)
    assert sum(abs(u - e) for u, e in zip(units, (3, 2, 2, 2))) == 2, units


def test_parts_lie_within_towers():
  table = table_of('one_f_one_b', 4)
  stacks = [stack(*[1] * 6, name='encoder'), stack(*[3] * 6, name='decoder')]
  assert balancer.balance(stacks, table) == [6, 2, 2, 2]
  cheap = dataclasses.replace(stacks[1], costs=(1,) * 6)
  assert balancer.balance([stacks[0], cheap], table) == [3, 3, 3, 3]


def test_every_second_layer_of_experts():
  """Which layers are dear decides, not how many there are."""
  table = table_of('one_f_one_b', 3)
  stacks = [stack(*[1, 4] * 4)]
  units = balancer.balance(stacks, table)
  assert units == [3, 3, 2] or units == [2, 3, 3], units
  assert max(loads(stacks, table, units)) == 9
  tail = [stack(1, 1, 1, 1, 8)]
  assert balancer.balance(tail, table_of('one_f_one_b', 2)) == [4, 1]


def test_same_answer_each_time():
  rng, table = random.Random(3), table_of('zb_v', 4)
  stacks = random_stacks(rng, table, 2)
  first = balancer.balance(stacks, table)
  assert all(balancer.balance(stacks, table) == first for _ in range(3))
  # The unit of costs is no matter, beyond what rounds.
  times = lambda one, by: dataclasses.replace(
    one,
    costs=tuple(c * by for c in one.costs),
    first=one.first * by,
    last=one.last * by,
  )
  large = [times(one, 3 * 10**14) for one in stacks]
  assert merit(stacks, table, balancer.balance(large, table)) == merit(
    stacks, table, first
  )


def test_what_moves_needs_more():
  """The even placement fits where no other does, and no one else is told."""
  table = table_of('one_f_one_b', 2)
  stacks = [stack(*[1] * 6, last=3, unit_bytes=10)]
  best = lambda **s: balancer.balance(stacks, table, **s)
  assert best() == [4, 2]
  assert best(limit=40) == [4, 2]
  assert best(limit=39) == [3, 3]
  assert best(limit=45, moved_bytes=6) == [3, 3]
  assert best(limit=35, moved_bytes=6) == [3, 3]
  # What is left beside the layers that move decides how many fit.
  wide = [stack(*[1] * 8, last=6, unit_bytes=10)]
  at = lambda limit: balancer.balance(wide, table, limit=limit, moved_bytes=4)
  assert [at(limit) for limit in (74, 72)] == [[7, 1], [6, 2]]
  with pytest.raises(ValueError, match='a device needs 2.794e-08 GiB at least'):
    best(limit=29)


def test_fewer_units_than_parts():
  with pytest.raises(ValueError, match='each part needs one of its own'):
    balancer.balance([stack(1, 1, 1)], table_of('one_f_one_b', 4))


PIPE = {'mesh__data': 4, 'mesh__fsdp': 1, 'mesh__tensor': 1, 'mesh__pipe': 2}
BALANCED = {
  'model__num_layers': 6,
  'pipeline__layers': 'balanced',
  'pipeline__microbatches': 2,
}


def plan_of(directory, **settings):
  config = tiny.experiment_of(directory, **PIPE | BALANCED | settings)
  sizes = mesh_lib.sizes(config.mesh, 8)
  consistency.check(config, 8)
  return partitioning.of(config, sizes).pipeline


def test_a_large_vocabulary_takes_layers_from_the_last_stage(tmp_path):
  layers = lambda **s: plan_of(tmp_path, **s).placement.units_P.tolist()
  small = layers(model__vocab_size=384)
  large = layers(model__vocab_size=1600)
  assert layers(pipeline__layers='even') == [3, 3]
  assert layers(pipeline__layers='4,2') == [4, 2]
  assert small == [4, 2] and large == [5, 1]
  # Layers that are run again weigh more beside the head, which is not.
  assert layers(model__vocab_size=560) == [5, 1]
  assert layers(model__vocab_size=560, train__remat='full') == [4, 2]


def test_memory_is_refused_before_anything_is_built(tmp_path):
  enough = plan_of(tmp_path, pipeline__memory_limit=1)
  assert enough.placement.units_P.tolist() == [4, 2]
  with pytest.raises(ValueError, match='pipeline.memory_limit=0.0001 GiB. Ta'):
    plan_of(tmp_path, pipeline__memory_limit=1e-4)
  with pytest.raises(ValueError, match='is for pipeline.layers=balanced'):
    plan_of(tmp_path, pipeline__layers='even', pipeline__memory_limit=1)


def test_layers_in_words_and_in_numbers():
  config = pipeline_config.PipelineConfig()
  read = lambda text: overrides.override(config, {'layers': text}).layers
  assert [read(t) for t in ('even', 'balanced', '3,2', '(4,)')] == [
    'even',
    'balanced',
    (3, 2),
    (4,),
  ]
  for text in ('balanced', '3,2'):
    changed = overrides.override(config, {'layers': text})
    data = overrides.to_json(changed)
    assert overrides.from_json(type(config), data) == changed
  with pytest.raises(ValueError, match="'layers': 'evn' does not fit"):
    read('evn')


def gradients_of(config, devices):
  mesh = mesh_lib.make(config.mesh, jax.devices()[:devices])
  program = program_lib.Program(config, mesh, num_steps=2)
  rng = np.random.default_rng(0)
  rows, length = config.data.batch_size, config.data.length
  tokens = lambda: rng.integers(0, 384, (rows, length)).astype(np.int32)
  batch = {
    'inputs': tokens(),
    'targets': tokens(),
    'weights': rng.uniform(0, 2, (rows, length)).astype(np.float32),
    'segments': np.ones((rows, length), np.int32),
    'positions': np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
  }
  with sharding.use(mesh, config.rules):
    state = program.init_state()
    return jax.device_get(program.gradients(state, program.place(batch)))


def test_gradients_of_a_balanced_pipeline(tmp_path):
  """Stages of four and of two layers compute what one device does."""
  alone = {'mesh__data': 1, 'mesh__fsdp': 1, 'mesh__tensor': 1}
  staged = {'mesh__pipe': 2, 'pipeline__schedule': 'zb_h1'}
  config = tiny.experiment_of(tmp_path, **BALANCED | alone | staged)
  sizes = mesh_lib.sizes(config.mesh, 2)
  plan = partitioning.of(config, sizes).pipeline
  assert plan is not None and plan.placement.units_P.tolist() == [4, 2]
  grads, sums = gradients_of(config, 2)
  single = tiny.experiment_of(tmp_path, model__num_layers=6, **alone)
  want, want_sums = gradients_of(single, 1)
  np.testing.assert_allclose(sums['loss'], want_sums['loss'], rtol=3e-6)
  leaves = jax.tree.leaves(want)
  scale = max(np.abs(leaf).max() for leaf in leaves)
  assert scale > 1e-3
  for a, b in zip(leaves, jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(b, a, atol=2e-5 * scale, rtol=0)
