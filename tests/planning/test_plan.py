"""Plans of runs on devices that are not here, and the search for layouts."""

import dataclasses
import functools
import json
import os
import sys

import commands
import extras
import pytest
import tpu

from t2x.config import overrides
from t2x.cost_model import estimate
from t2x.cost_model import links
from t2x.hardware import machines
from t2x.parallel import mesh
from t2x.planning import advice as advice_lib
from t2x.planning import memory
from t2x.planning import page as page_lib
from t2x.planning import plan as plan_lib
from t2x.planning import search
from t2x.planning import sharding_table
from t2x.planning import text as text_lib
from t2x.planning import trials

_SCRIPT = os.path.join(
  os.path.dirname(__file__), '..', '..', 'scripts', 'plan.py'
)


@functools.cache
def planned():
  """Returns a config on four chips, and its plan."""
  tpu.devices('v5e:2x2')
  config = tpu.config_of(
    *tpu.TINY, 'mesh.fsdp=2', 'mesh.data=1', 'mesh.tensor=2'
  )
  return config, plan_lib.make(config, 'v5e:2x2')


@pytest.mark.slow
def test_figures_are_those_of_the_program():
  config, plan = planned()
  table = sharding_table.make(config, 4)
  state = sharding_table.total(table).bytes_per_device
  batch = 5 * 4 * 8 * 128 / 2  # Five arrays of four bytes, over fsdp.
  # A TPU pads small arrays to whole tiles.
  assert plan.memory.arguments == pytest.approx(state + batch, rel=0.25)
  assert plan.memory.arguments >= state + batch
  groups = plan.memory.state
  assert sum(sum(g.values()) for g in groups.values()) == state
  assert plan.fits and plan.memory.limit == 15.75 * 2**30
  found = estimate.step(config, 4)
  assert plan.flops.executed == pytest.approx(found.executed_flops, rel=0.01)
  sent = sum(row.bytes for row in plan.collectives)
  assert sent == pytest.approx(found.sent_bytes(), rel=0.1)
  assert {axis for row in plan.collectives for axis in row.axes} == {
    'fsdp',
    'tensor',
  }
  r = plan.roofline
  assert r.compute == pytest.approx(plan.flops.executed / 197e12)
  assert 0 < r.exposed <= r.network and r.seconds >= r.compute
  limit = plan.flops.model / r.seconds / 197e12
  assert plan.mfu_limit == pytest.approx(limit)


@pytest.mark.slow
def test_a_plan_as_text_json_and_page():
  config, plan = planned()
  advice = advice_lib.of(config, plan)
  assert any('head_dim=32 fills 25.0% of the 128 lanes' in a for a in advice)
  text = text_lib.text('gpt2_tiny', plan, advice)
  assert text.startswith('gpt2_tiny on v5e:2x2 (4 devices), fsdp=2, tensor=2')
  assert 'fits: a device has 15.75 GiB' in text
  assert '(a model by published figures of the chip, not a measurement)' in text
  found = json.loads(json.dumps(text_lib.to_json(plan, advice)))
  assert found['fits'] is True and found['warnings'] == advice
  assert {
    'arguments_bytes',
    'temporaries_bytes',
    'peak_bytes',
  } <= found['memory'].keys()
  assert found['flops']['executed_matmul'] == plan.flops.executed_matmul
  kinds = found['collectives']['by_kind']
  assert sum(kinds.values()) == found['collectives']['total_bytes']
  page = page_lib.page('gpt2_tiny', plan, advice)
  assert 'Plan of gpt2_tiny' in page and 'tower mlp' in page
  assert page.count('<p class="warn">') == len(advice)


@pytest.mark.slow
def test_what_does_not_fit_is_told_with_what_would():
  tpu.devices('v5e:4x4')
  config = tpu.config_of(
    'train.remat=none', 'data.batch_size=64', experiment='llama2_7b'
  )
  plan = plan_lib.make(config, 'v5e:4x4')
  assert plan.fits is False and 'Ran out of memory' in plan.refused
  assert plan.memory.peak > plan.memory.limit
  first, *_ = advice_lib.of(config, plan)
  assert first.startswith('it should fit with --set train.remat=full: by')
  assert 'does not fit: the compiler says' in text_lib.text('7b', plan)


@pytest.mark.slow
def test_what_fits_in_no_layout_is_told_how_many_chips_it_needs():
  tpu.devices('v5e:2x2')
  config = tpu.config_of('data.batch_size=4', experiment='llama2_7b')
  plan = plan_lib.make(config, 'v5e:2x2')
  first, *_ = advice_lib.of(config, plan)
  assert 'in no layout' in first and 'it needs 8 of them' in first
  fits = lambda where: any(c.fits for c in search.candidates(config, where))
  assert fits('v5e:2x4') and not fits('v5e:2x2')


@pytest.mark.slow
@pytest.mark.parametrize(('data', 'told'), [(1, True), (2, False)])
def test_gathers_that_the_compiler_makes_sums_are_told(data, told):
  """Along all three sides of a torus; half of it is gathered as it should."""
  tpu.devices('v4:4x4x4')
  sizes = f'mesh.data={data}', f'mesh.fsdp={64 // data}'
  config = tpu.config_of(*tpu.TINY, 'data.batch_size=64', *sizes)
  advice = advice_lib.of(config, plan_lib.make(config, 'v4:4x4x4'))
  found = [a for a in advice if 'by all-reduces of whole arrays' in a]
  assert len(found) == told
  assert not told or 'With mesh.data=2 mesh.fsdp=32 it may' in found[0]


@pytest.mark.slow
def test_a_pipelines_plan_tells_what_each_stage_does():
  tpu.devices('v5e:2x2')
  config = tpu.config_of(
    *tpu.TINY,
    'mesh.data=1',
    'mesh.pipe=2',
    'mesh.fsdp=2',
    'pipeline.microbatches=4',
  )
  plan = plan_lib.make(config, 'v5e:2x2')
  first, last = plan.stages
  # The head is computed by the last alone, and all else by both.
  assert last.executed == plan.flops.executed > 1.2 * first.executed
  sent = sum(row.bytes for row in plan.collectives)
  assert max(first.sent, last.sent) == pytest.approx(sent)
  text = text_lib.text('gpt2_tiny', plan).splitlines()
  start = next(i for i, line in enumerate(text) if '2 stages x 4 micro' in line)
  assert text[start].startswith('one_f_one_b')
  assert text[start + 3].split()[:2] == ['1', f'{last.executed / 1e9:,.4g}']
  found = text_lib.to_json(plan)['pipeline']
  assert found['stages'][1] == {'executed': last.executed, 'sent': last.sent}
  assert '2 stages x 4 microbatches' in page_lib.page('gpt2_tiny', plan)


def test_simulated_devices_have_no_limit():
  config = tpu.config_of(*tpu.TINY, 'mesh.fsdp=8', 'mesh.data=1')
  plan = plan_lib.make(config, 'cpu:8')
  assert plan.fits is None and plan.roofline is None and plan.chip is None
  assert plan.flops.executed_matmul > plan.flops.model
  assert 'of a memory whose size is not known' in text_lib.text('x', plan)


# --- The search. ---


def test_candidates_can_all_run():
  tpu.devices('v5e:2x4')
  config = tpu.config_of(*tpu.TINY)
  found = search.candidates(config, 'v5e:2x4')
  assert len(found) > 20
  assert len({c.settings for c in found}) == len(found)
  fitting = [c.seconds for c in found if c.fits]
  assert fitting == sorted(fitting)
  pipes = [c for c in found if 'mesh.pipe=2' in c.settings]
  assert {'pipeline.schedule=zb_h1', 'pipeline.microbatches=4'} <= {
    s for c in pipes for s in c.settings
  }
  for c in found[:: len(found) // 8]:
    again = overrides.override(config, overrides.parse_settings([*c.settings]))
    assert again == c.config
    assert c.peak == estimate.step(again, 8).peak_bytes


def test_nothing_to_rank_simulated_devices_by():
  with pytest.raises(ValueError, match='no memory and speed are known'):
    search.candidates(tpu.config_of(*tpu.TINY), 'cpu:8')


def test_what_cannot_fit_is_not_compiled():
  tpu.devices('v5e:2x4')
  found = search.candidates(tpu.config_of(*tpu.TINY), 'v5e:2x4')
  trials.check('tiny', found, 'v5e:2x4', 8)
  small = [dataclasses.replace(c, limit=1e4, fits=False) for c in found]
  message = (
    'tiny on v5e:2x4: it fits on 8 of these devices in no layout.*many more'
  )
  with pytest.raises(ValueError, match=message):
    trials.check('tiny', small, 'v5e:2x4', 8)


@pytest.mark.slow
def test_the_best_are_compiled_once(tmp_path):
  tpu.devices('v5e:2x2')
  config = tpu.config_of(*tpu.TINY)
  found = search.candidates(config, 'v5e:2x2')
  compile_best = functools.partial(
    trials.compile_best,
    found,
    'v5e:2x2',
    1,
    command=[sys.executable, os.path.abspath(_SCRIPT)],
    cache=tmp_path,
    most=1,
    processes=1,
    seconds=300,
  )
  said = []
  (result,) = compile_best(say=said.append)
  assert result.plan and result.plan['fits'], result.note
  assert len(list(tmp_path.glob('*.json'))) == 1
  (again,) = compile_best(say=said.append)
  assert again.plan == result.plan
  assert 'known' in said[1] and 'known' not in said[0]
  header, row = trials.table([again])
  assert len(header) == len(row) and row[2] != '-'
  (late,) = trials.compile_best(
    found[1:2],
    'v5e:2x2',
    1,
    command=['false'],
    cache=tmp_path,
    most=1,
    processes=1,
    seconds=-1,
    say=said.append,
  )
  assert late.plan is None and late.note == 'time was up'


# --- Links. ---

_V5E = dataclasses.replace(machines.CHIPS['v5e'], link=1.0, network=0.1)


@pytest.mark.parametrize(
  ('kind', 'axis', 'want'),
  [
    # A line of four: three quarters of the result over one link.
    ('all-gather', links.Axis(size=4, sides=((4, False),)), 0.75),
    # A ring has two directions.
    ('all-gather', links.Axis(size=16, sides=((16, True),)), 15 / 32),
    ('all-reduce', links.Axis(size=4, sides=((4, False),)), 1.5),
    ('reduce-scatter', links.Axis(size=16, sides=((4, False),) * 2), 15 / 32),
    ('collective-permute', links.Axis(size=4, sides=((4, False),)), 1.0),
    # On a ring of 16 a byte goes four links on average, of two that there are.
    ('all-to-all', links.Axis(size=16, sides=((16, True),)), 2.0),
    # A switch.
    ('all-gather', links.Axis(size=8), 7 / 8),
    # Between two slices, of which each device has a quarter to send.
    ('all-reduce', links.Axis(size=8, slices=2, sides=((4, False),)), 4.0),
  ],
)
def test_seconds_of_an_exchange(kind, axis, want):
  assert links.seconds(kind, 1.0, [axis], _V5E) == pytest.approx(want)


def test_axes_lie_along_the_torus():
  devices = tpu.devices('v5e:4x4')
  made = mesh.make(mesh.MeshConfig(data=1, fsdp=4, tensor=4), devices)
  axes = links.axes_of(made)
  assert axes['fsdp'].sides == axes['tensor'].sides == ((4, False),)
  one = links.axes_of(mesh.make(mesh.MeshConfig(data=1, fsdp=16), devices))
  assert one['fsdp'].sides == ((4, False), (4, False))
  cube = tpu.devices('v5p:4x4x4')
  made = mesh.make(mesh.MeshConfig(data=1, fsdp=16, tensor=4), cube)
  assert links.axes_of(made)['tensor'].sides == ((4, True),)
  two = tpu.devices('v5e:2x2', 2)
  parts = mesh.MeshConfig(data=2, fsdp=4, dcn=mesh.Dcn(data=2))
  made = links.axes_of(mesh.make(parts, two))
  assert (made['data'].slices, made['fsdp'].slices) == (2, 1)


# --- The script. ---


@pytest.mark.parametrize(
  ('flags', 'words'),
  [
    (['--topology=v5e:3x5'], 'v5e'),
    (['--topology=v5x:4x4'], 'v5'),
    (['--topology=v5e:4x4', '--layout=fsdp=5'], 'fsdp'),
    (['--topology=v5e:4x4', '--set', 'mesh.fpsd=4'], "Did you mean 'fsdp'"),
    (['--topology='], '--topology=NAME is missing'),
    (['--num_slices=0'], '--num_slices=0: 0 is not a positive integer'),
    (['--topology=v5e:4x4', '--search', '--estimate'], 'leave out --layout'),
    (['--topology=v5e:4x4', '--estimate', '--html=x'], 'leave out --html'),
    (['--topology=v5e:4x4', '--most=2'], '--most is for --search: give both'),
  ],
)
def test_errors_are_a_line_each(flags, words):
  extras.need('libtpu', extra='plan')
  done = commands.run(_SCRIPT, '--experiment=llama2_7b', *flags)
  assert done.returncode != 0 and 'Traceback' not in done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith('error: ') and words in last


def test_modules_of_paths():
  assert memory.module_of('tower.layers.group.0.mlp.up_DF') == 'tower mlp'
  assert memory.module_of('output.table_VD') == 'output'
  assert memory.module_of('0.count') == 'count'
  assert memory.source('') == 'elsewhere'
  loop = 'while/body/pipeline_loop_recompute_tower/while/body/'
  assert memory.source(loop + 'update') == 'kept by recomputation'
  assert memory.source(loop + 'mlp/dot') == 'mlp'
