"""FLOPs that stages execute, of compiled programs, against one device's."""

import dataclasses
import functools

import jax
import pytest
import tiny

from t2x.compilation import lowering
from t2x.config import partitioning
from t2x.hardware import target_devices
from t2x.hlo import collectives
from t2x.hlo import matmul_flops
from t2x.hlo import stage_trips
from t2x.parallel import mesh as mesh_lib
from t2x.pipeline import schedules

# Of a layer's forward: 8 rows of 32 tokens, width 16, hidden 32, all scores.
_TOKENS = 8 * 32
_LAYER = 2 * _TOKENS * (4 * 16 * 16 + 2 * 16 * 32 + 2 * 32 * 16)
_DOWN = 2 * _TOKENS * 32 * 16
_HEAD = 2 * _TOKENS * 384 * 16
_LAYERS = 8


@pytest.fixture
def compiled(tmp_path):
  """Returns a step's text, its mesh and its plan; 'pipe' names the stages."""

  def make(*, pipe=1, group=1, **settings):
    names = ('data', 'fsdp', 'tensor')
    sizes = dict.fromkeys((f'mesh__{n}' for n in names), 1)
    sizes |= {'mesh__pipe': pipe, 'model__num_layers': _LAYERS} | settings
    config = tiny.experiment_of(tmp_path, **sizes)
    kinds = (config.model.attention,) * group
    model = dataclasses.replace(config.model, attention_pattern=kinds)
    config = dataclasses.replace(config, model=model)
    num = pipe * sizes['mesh__data'] * sizes['mesh__fsdp']
    mesh = mesh_lib.make(config.mesh, jax.devices()[:num])
    # LLVM's optimisations cost half the time and change no count.
    options = {'xla_backend_optimization_level': 0}
    program = target_devices.compile(lowering.lower_step(config, mesh), options)
    return program.as_text(), mesh, partitioning.of(config, mesh.shape).pipeline

  return make


@pytest.fixture
def flops_of(compiled):
  """Returns the FLOPs of each stage of a step."""

  def count(*, pipe=1, **settings):
    text, _, plan = compiled(pipe=pipe, **settings)
    if plan is None:
      return [matmul_flops.matrix_flops(text)]
    trips = [stage_trips.trips(plan, stage) for stage in range(pipe)]
    return [matmul_flops.matrix_flops(text, each) for each in trips]

  return count


exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
  'schedule, remat',
  [
    ('one_f_one_b', 'full'),
    ('interleaved', 'none'),
    ('zb_v', 'full'),
    exhaustive('one_f_one_b', 'none'),
    exhaustive('interleaved', 'full'),
    exhaustive('zb_v', 'none'),
  ],
)
def test_stages_execute_what_one_device_does(flops_of, schedule, remat):
  """No product twice, and none that a mask throws away."""
  settings = {'train__remat': remat, 'pipeline__microbatches': 4}
  settings['pipeline__schedule'] = schedule
  found = flops_of(pipe=4, **settings)
  (one,) = flops_of(train__remat=remat)
  passes = 3 if remat == 'none' else 4
  # The head is on the last part, and nothing of it is made again.
  last = 0 if schedule == 'zb_v' else 3
  for stage, flops in enumerate(found):
    want = passes * _LAYER * _LAYERS // 4 + 3 * _HEAD * (stage == last)
    assert flops == pytest.approx(want, rel=0.01)
  # One device leaves out a layer's last product where it runs it again: of
  # stages, the next layer's input is made so.
  again = _LAYERS * _DOWN if remat == 'full' else 0
  assert sum(found) == pytest.approx(one + again, rel=0.01)


def test_devices_share_a_stage(flops_of):
  settings = {'pipeline__microbatches': 4, 'pipeline__schedule': 'gpipe'}
  whole = flops_of(pipe=2, **settings)
  halves = flops_of(pipe=2, mesh__data=2, **settings)
  assert [2 * flops for flops in halves] == whole


def test_uniform_stages_pay_for_each_other(flops_of):
  settings = {'pipeline__microbatches': 2, 'pipeline__schedule': 'gpipe'}
  own = flops_of(pipe=2, **settings)
  alike = flops_of(pipe=2, pipeline__uniform=True, **settings)
  assert alike[0] == alike[1] > max(own)
  # As the schedule foretells it of the layers; the head stands beside them.
  head = 3 * _HEAD
  price = (alike[0] - head) / ((sum(own) - head) / 2)
  want = schedules.gpipe(2, 2).simulate().uniform
  assert price == pytest.approx(want, rel=0.05)


def test_a_last_unit_of_fewer_layers(flops_of):
  """Groups of two layers, five in all: two units and a half."""
  settings = {'model__num_layers': 5, 'pipeline__layers': '1,2'}
  settings |= {'pipeline__microbatches': 2, 'train__remat': 'full'}
  found = flops_of(pipe=2, group=2, **settings)
  want = [4 * 2 * _LAYER, 4 * 3 * _LAYER + 3 * _HEAD]
  assert found == pytest.approx(want, rel=0.01)


def test_gradients_of_tables_are_not_gathered(compiled):
  """Of 8 rows of 32 tokens, width 16, on four devices a stage; 64 positions."""
  settings = {'pipeline__schedule': 'gpipe', 'pipeline__microbatches': 2}
  text, mesh, plan = compiled(pipe=2, mesh__fsdp=4, **settings)
  sent = collectives.collectives(text, mesh, stage_trips.trips(plan, 0))
  found = [
    (row.kind, row.bytes)
    for row in sent
    if 'enter_backward' in row.op_name and row.dtype == 'f32'
  ]
  # Token vectors travel, and the position table's gradients are summed.
  rows = 8 // 2 // 4 * 32 * 16 * 4
  assert sorted(found) == [('all-reduce', 64 * 16 * 4), ('all-to-all', rows)]


def test_messages_are_counted_in_the_ticks_in_which_they_are_sent(compiled):
  settings = {'pipeline__schedule': 'zb_v', 'pipeline__microbatches': 4}
  text, mesh, plan = compiled(pipe=4, **settings)
  sent = collectives.collectives(text, mesh, stage_trips.trips(plan, 0))
  times = [row.times for row in sent if row.kind == 'collective-permute']
  ways = plan.instructions.sends_down_T, plan.instructions.sends_up_T
  assert sorted(times) == sorted(int(sends_T.sum()) for sends_T in ways)
  assert max(times) < plan.table.num_ticks
