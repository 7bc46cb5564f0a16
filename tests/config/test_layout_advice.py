"""Layouts that cannot work are answered with the nearest that do."""

import re

import bert_tiny
import gpt2_tiny
import jax
import moe_tiny
import pytest
import t5_tiny
import tiny

from t2x.config import abstract_state
from t2x.config import layout_advice
from t2x.config import layout_flag
from t2x.config import overrides
from t2x.inference import evaluation
from t2x.inference import loading
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.trainer import train

_ADVICE = re.compile(r' Layouts of (\d+) devices? that work: (.*)\.$')


def with_settings(module, *settings):
  parsed = overrides.parse_settings(settings)
  return overrides.override(module.get_config(), parsed)


def advice(config, num_devices, error=ValueError, **options):
  """Returns the message and the layouts of a config that is refused."""
  with pytest.raises(error) as caught:
    layout_advice.check(config, num_devices, **options)
  message = str(caught.value)
  match = _ADVICE.search(message)
  assert match and int(match[1]) == num_devices, message
  return message, match[2].split('; ')


def nearest(config, num_devices, **options):
  """Returns the nearest layouts that work, as settings."""
  found = layout_advice.nearest(config, num_devices, **options)
  return [layout_advice.set_text(config.mesh, mesh) for mesh in found]


def assert_works(config, layout, num_devices):
  """Takes the advice as a user would, and looks at the result by hand."""
  config = overrides.override(config, overrides.parse_settings(layout.split()))
  layout_advice.check(config, num_devices)
  sizes = mesh_lib.sizes(config.mesh, num_devices)
  assert config.model.attention.num_heads % sizes['tensor'] == 0
  rows = sizes['data'] * sizes['fsdp'] * sizes['expert']
  assert config.data.batch_size % (rows * config.train.accumulate) == 0


@pytest.mark.parametrize(
  'module, num_devices, settings, message, expected',
  [
    pytest.param(
      gpt2_tiny,
      16,
      ['mesh.tensor=16'],
      r"\('kv_heads'\) of size 8 is not divisible by 16 \(mesh\.tensor=16",
      ['mesh.data=2 mesh.tensor=8', 'mesh.data=4 mesh.tensor=4'],
      id='heads',
    ),
    pytest.param(
      moe_tiny,
      16,
      ['mesh.expert=16', 'mesh.data=1'],
      r"\('experts'\) of size 8 is not divisible by 16 \(mesh\.expert=16",
      ['mesh.data=2 mesh.expert=8', 'mesh.fsdp=2 mesh.expert=8'],
      id='experts',
    ),
    pytest.param(
      gpt2_tiny,
      12,
      [
        'model.attention.num_heads=12',
        'model.attention.num_kv_heads=2',
        'data.length=126',
        'data.batch_size=12',
        'mesh.data=4',
        'mesh.tensor=3',
        'rules.kv_heads=none',
        'rules.norm_length=context,tensor',
      ],
      r'has 4 of attention\.num_heads=12 and 2 of attention\.num_kv_heads=2,',
      ['mesh.data=6 mesh.tensor=2', 'mesh.data=3 mesh.fsdp=2 mesh.tensor=2'],
      id='groups of heads',
    ),
    pytest.param(
      moe_tiny,
      8,
      [
        'mesh.data=2',
        'mesh.expert=2',
        'mesh.tensor=2',
        'rules.experts=expert,tensor',
        'rules.mlp=none',
      ],
      r'rules\.experts=expert,tensor with rules\.batch=data,expert',
      [
        'mesh.data=4 mesh.tensor=2 mesh.expert=1',
        'mesh.data=4 mesh.tensor=1 mesh.expert=2',
      ],
      id='experts on axes that split some tokens',
    ),
    pytest.param(
      t5_tiny,
      256,
      ['mesh.data=4', 'mesh.tensor=64'],
      r"\('heads'\) of size 8 is not divisible by 64",
      ['mesh.data=32 mesh.tensor=8', 'mesh.data=4 mesh.fsdp=8 mesh.tensor=8'],
      id='heads of many devices',
    ),
    pytest.param(
      gpt2_tiny,
      8,
      ['data.batch_size=4'],
      r'data\.batch_size=4 rows cannot be dealt to mesh\.data=8',
      ['mesh.data=4 mesh.tensor=2', 'mesh.data=4 mesh.context=2'],
      id='more devices than rows',
    ),
    pytest.param(
      bert_tiny,
      8,
      ['mesh.data=2', 'mesh.fsdp=4', 'train.accumulate=16'],
      r'cannot be dealt to mesh\.data=2 x mesh\.fsdp=4 in train\.accumulate=16',
      [
        'mesh.data=2 mesh.fsdp=1 mesh.tensor=4',
        'mesh.data=2 mesh.fsdp=1 mesh.context=4',
      ],
      id='microbatches',
    ),
    pytest.param(
      gpt2_tiny,
      8,
      ['mesh.data=3'],
      r'The mesh \(data=3\) needs 3 devices and there are 8',
      ['mesh.data=8', 'mesh.data=4 mesh.fsdp=2'],
      id='product',
    ),
    pytest.param(
      gpt2_tiny,
      8,
      ['mesh.data=4', 'mesh.tensor=4'],
      r'needs 16 devices and there are 8',
      ['mesh.data=4 mesh.tensor=2', 'mesh.data=2 mesh.tensor=4'],
      id='product too large',
    ),
    pytest.param(
      gpt2_tiny,
      8,
      ['mesh.tensor=3'],
      r'needs a multiple of 3 devices and there are 8',
      ['mesh.data=2 mesh.tensor=4', 'mesh.data=4 mesh.tensor=2'],
      id='the rest',
    ),
  ],
)
def test_the_two_nearest(module, num_devices, settings, message, expected):
  config = with_settings(module, *settings)
  said, found = advice(config, num_devices)
  assert re.search(message, said), said
  assert found == expected
  for layout in found:
    assert_works(config, layout, num_devices)


def test_the_error_stays_what_it_was():
  config = with_settings(gpt2_tiny, 'mesh.tensor=16')
  advice(config, 16, error=sharding.ShardingError)
  with pytest.raises(ValueError) as caught:
    layout_advice.check(with_settings(gpt2_tiny, 'data.batch_size=4'), 8)
  assert type(caught.value) is ValueError


def test_no_such_mesh_axis():
  config = with_settings(gpt2_tiny, 'mesh.context=2', 'rules.length=contxt')
  message = (
    r"rules\.length='contxt' names no mesh axis; the mesh has pipe, data"
  )
  with pytest.raises(sharding.ShardingError, match=message):
    layout_advice.check(config, 8)


@pytest.mark.parametrize(
  'settings, message',
  [
    (
      ['mesh.tensor=2', 'rules.length=tensor'],
      "'length' and 'heads' both",
    ),
    (['mesh.data=8', 'rules.heads=data'], "'batch' and 'heads' both live on"),
    (['mesh.data=8', 'rules.mlp=data'], "'batch' and 'mlp' both live on the"),
    (['mesh.tensor=2', 'rules.act_embed=tensor'], "'vocab' and 'act_embed' b"),
    (['mesh.fsdp=8', 'rules.norm_length=fsdp'], "'batch' and 'norm_length' b"),
  ],
)
def test_two_dimensions_of_an_activation_on_one_axis(settings, message):
  config = with_settings(gpt2_tiny, *settings)
  with pytest.raises(sharding.ShardingError, match=message):
    layout_advice.check(config, 8)


def test_no_layout_helps():
  config = with_settings(gpt2_tiny, 'data.objective=masked_lm')
  with pytest.raises(ValueError, match=r'prefix_lm, or another model\.$'):
    layout_advice.check(config, 8)
  assert nearest(config, 8) == []


@pytest.mark.parametrize(
  'settings, message, expected',
  [
    (
      ['mesh.data=1', 'mesh.pipe=8'],
      '8 parts of a pipeline for 4',
      'mesh.data=2 mesh.pipe=4',
    ),
    (
      ['mesh.data=8', 'mesh.dcn.data=2'],
      r'mesh\.dcn \(data=2\) needs 2 slices',
      'mesh.data=8 mesh.dcn.data=1',
    ),
    (
      ['mesh.data=1', 'mesh.pipe=8', 'mesh.dcn.fsdp=2'],
      '8 parts of a pipeline for 4',
      'mesh.data=2 mesh.pipe=4 mesh.dcn.fsdp=1',
    ),
  ],
)
def test_stages_and_slices_that_cannot_be(settings, message, expected):
  said, found = advice(with_settings(gpt2_tiny, *settings), 8)
  assert re.search(message, said) and found[0] == expected
  assert_works(with_settings(gpt2_tiny, *settings), expected, 8)


@pytest.mark.parametrize(
  'settings, message',
  [
    (['pipeline.schedule=zb_v', 'pipeline.chunks=3'], 'the nearest .* is 2'),
    (['pipeline.schedule=gone.csv'], 'there is no such file'),
    (['pipeline.layers=3,2'], 'must make up 4 layers'),
  ],
)
def test_no_layout_mends_a_pipeline(settings, message):
  staged = ['mesh.pipe=2', 'mesh.data=4', 'pipeline.microbatches=4', *settings]
  with pytest.raises(ValueError, match=message) as caught:
    layout_advice.check(with_settings(gpt2_tiny, *staged), 8)
  assert 'Layouts' not in str(caught.value)
  layout = layout_flag.parse(','.join(s.removeprefix('mesh.') for s in staged))
  with pytest.raises(ValueError, match=message) as caught:
    layout.check(layout.applied(gpt2_tiny.get_config()))
  assert 'Layouts' not in str(caught.value)


@pytest.mark.parametrize('asked, near', [(3, '2 or 4'), (16, '4 or 8')])
def test_microbatches_that_the_rows_allow(asked, near):
  settings = ['mesh.pipe=2', 'mesh.data=4', f'pipeline.microbatches={asked}']
  config = with_settings(gpt2_tiny, *settings)
  with pytest.raises(ValueError, match=f'pipeline.microbatches to {near}, or'):
    layout_advice.check(config, 8)


def test_one_device_is_no_devices():
  config = with_settings(gpt2_tiny, 'mesh.tensor=2', 'mesh.data=1')
  message = r'Layouts of 1 device that work: mesh\.tensor=1\.$'
  with pytest.raises(ValueError, match=message):
    layout_advice.check(config, 1)


def test_rows_of_ones_own_come_first():
  settings = ['mesh.data=2', 'mesh.expert=3', 'data.batch_size=12']
  config = with_settings(moe_tiny, *settings)
  own = with_settings(moe_tiny, *settings[:2], 'data.batch_size=8')
  with pytest.raises(sharding.ShardingError) as caught:
    layout_advice.check(config, 6, own=own)
  # Six devices and eight rows: none. Twelve rows do, and the error says so.
  message = r'Layouts of 6 devices that work with data\.batch_size=12: mesh\.'
  assert re.search(message, str(caught.value)), caught.value


def test_a_layout_that_works_is_the_nearest_to_itself():
  config = with_settings(
    gpt2_tiny, 'mesh.data=2', 'mesh.fsdp=2', 'mesh.tensor=2'
  )
  first = nearest(config, 8, count=1)
  assert first == ['mesh.data=2 mesh.fsdp=2 mesh.tensor=2']
  layout_advice.check(config, 8)


def test_as_many_as_asked_each_farther_and_each_once():
  config = with_settings(gpt2_tiny, 'mesh.data=8')
  found = nearest(config, 8, count=30)
  assert found[0] == 'mesh.data=8' and len(set(found)) == len(found) > 8
  for layout in found:
    assert_works(config, layout, 8)


def test_layouts_over_slices():
  config = with_settings(gpt2_tiny, 'mesh.data=1', 'mesh.fsdp=8')
  layout_advice.check(config, 8)
  said, found = advice(config, 8, num_slices=2)
  assert 'mesh.data=1 cannot be cut into mesh.dcn.data=2 parts' in said
  assert found == [
    'mesh.data=2 mesh.fsdp=4',
    'mesh.data=4 mesh.fsdp=2',
  ]


def test_specs_on_sizes_alone_are_those_on_devices():
  config = with_settings(gpt2_tiny, 'mesh.fsdp=2', 'mesh.tensor=2')
  mesh = mesh_lib.make(config.mesh)
  shapes = abstract_state.state_shapes(config)
  real = abstract_state.shardings_of(config, shapes, mesh)
  abstract = abstract_state.shardings_of(config, shapes, mesh.abstract_mesh)
  spec = lambda tree: jax.tree.map(lambda s: s.spec, tree)
  assert jax.tree.leaves(spec(real)) == jax.tree.leaves(spec(abstract))


def test_the_state_is_traced_twice_at_most(monkeypatch):
  traced = []
  trace = abstract_state.state_shapes
  monkeypatch.setattr(
    abstract_state, 'state_shapes', lambda c: traced.append(c) or trace(c)
  )
  advice(with_settings(gpt2_tiny, 'mesh.tensor=256'), 256)
  assert len(traced) == 2


def test_training_ends_before_anything_is_built(tmp_path):
  config = tiny.experiment_of(
    tmp_path, mesh__tensor=8, mesh__data=1, mesh__fsdp=1
  )
  message = (
    r'of size 4 is not divisible by 8 .*work: mesh\.data=2 mesh\.tensor=4'
  )
  with pytest.raises(sharding.ShardingError, match=message):
    train.train(config, str(tmp_path / 'run'), show=False)
  assert not (tmp_path / 'run').exists()


def test_loading_and_evaluation_too(tmp_path):
  config = tiny.experiment_of(tmp_path, train__num_steps=1)
  train.train(config, str(tmp_path / 'run'), show=False)
  message = (
    r'of size 4 is not divisible by 8 .*work: mesh\.data=2 mesh\.tensor=4'
  )
  with pytest.raises(sharding.ShardingError, match=message):
    loading.load(str(tmp_path / 'run'), settings=['mesh.tensor=8'])
  # Rows that are dealt to microbatches concern training alone.
  settings = ['mesh.data=2', 'train.accumulate=8']
  trained = loading.load(str(tmp_path / 'run'), settings=settings)
  message = r'microbatches: .* Layouts of 2 devices that work: '
  with pytest.raises(ValueError, match=message):
    evaluation.evaluate_splits(trained)
