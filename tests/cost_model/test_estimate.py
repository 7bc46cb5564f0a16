"""Estimates of a step against formulas, jaxprs and compiled programs."""

import dataclasses
import functools
import json
from typing import Any

import jax
import pytest

from t2x.compilation import lowering
from t2x.config import catalog
from t2x.config import experiment
from t2x.config import overrides
from t2x.config import partitioning
from t2x.cost_model import communication_bounds
from t2x.cost_model import estimate
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.hardware import target_devices
from t2x.hlo import jaxpr_costs
from t2x.hlo import matmul_flops
from t2x.hlo import stage_trips
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import norm
from t2x.layers import position
from t2x.layers import routing
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.objectives import masked_lm
from t2x.objectives import span_corruption
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.planning import estimate_text
from t2x.planning import sharding_table

_SHAPE: dict[str, Any] = {'vocab_size': 512, 'num_layers': 4, 'embed_dim': 64}
_PLAIN = mlp.MlpConfig(hidden=128, bias=False)
_GATED = mlp.MlpConfig(hidden=128, gated=True, activation='silu', bias=False)
_EXPERTS = moe.MoeConfig(
  hidden=128,
  gated=True,
  bias=False,
  num_experts=4,
  router=routing.TokenChoice(top_k=2, capacity=1.25),
)
_BLOCKS = attention_config.Dense(
  num_heads=4, num_kv_heads=2, head_dim=16, kernel='blocks'
)
_MODELS = {
  'decoder': decoder.DecoderConfig(
    **_SHAPE,
    attention=_BLOCKS,
    mlp=_GATED,
    norm=norm.RMSNorm(),
    position=position.Rotary(),
    tied_head='untied',
  ),
  'parallel': decoder.DecoderConfig(
    **_SHAPE, attention=_BLOCKS, mlp=_PLAIN, residual='parallel'
  ),
  'sandwich': decoder.DecoderConfig(
    **_SHAPE,
    attention_pattern=(
      attention_config.Local(
        num_heads=4, head_dim=16, kernel='blocks', window=100, soft_cap=9.0
      ),
      dataclasses.replace(_BLOCKS, num_kv_heads=None, qk_norm=True),
    ),
    mlp=_GATED,
    residual='sandwich',
    logit_soft_cap=5.0,
  ),
  'experts': decoder.DecoderConfig(
    **_SHAPE, attention=_BLOCKS, mlp_pattern=(_GATED, _EXPERTS)
  ),
  'encoder': encoder.EncoderConfig(
    **_SHAPE, attention=_BLOCKS, mlp=_PLAIN, residual='post_norm'
  ),
  't5': encoder_decoder.EncoderDecoderConfig(
    **_SHAPE,
    num_encoder_layers=2,
    attention=_BLOCKS,
    mlp=_GATED,
    position=position.RelativeBuckets(),
  ),
}


def config_of(model: str = 'decoder', **settings) -> experiment.Experiment:
  """Returns a small experiment, with settings as for --set (`__` for dots)."""
  objectives = {
    'encoder': masked_lm.MaskedLM(),
    't5': span_corruption.SpanCorruption(),
  }
  rest = {'objective': objectives[model]} if model in objectives else {}
  config = experiment.Experiment(
    model=_MODELS[model],
    data=data.DataConfig(
      length=256, batch_size=16, tokenizer=tokenizers.Bytes(), **rest
    ),
  )
  texts = {n.replace('__', '.'): str(v) for n, v in settings.items()}
  return overrides.override(config, {'mesh.data': '1', **texts})


@functools.cache
def traced_flops(model: str, remat: str) -> int:
  closed = lowering.step(config_of(model, train__remat=remat))
  return jaxpr_costs.count(closed).total.flops


@pytest.mark.parametrize('model', _MODELS)
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_products_are_those_of_the_jaxpr(model, remat):
  found = estimate.step(config_of(model, train__remat=remat))
  # Balance losses have products of their own, of a few numbers.
  small = 1e-6 if model == 'experts' else 0
  assert found.executed_flops == pytest.approx(
    traced_flops(model, remat), rel=small, abs=0
  )


@pytest.mark.parametrize('remat', ['dots', 'save:attention,mlp_up', 'save:key'])
def test_products_of_other_remat(remat):
  found = estimate.step(config_of(train__remat=remat))
  assert found.executed_flops == traced_flops('decoder', remat)


def test_arguments_are_the_state_and_the_batch():
  config = config_of(mesh__data=1, mesh__fsdp=4, mesh__tensor=2)
  found = estimate.step(config)
  table = sharding_table.make(config, 8)
  # Nothing of this size fills its tiles.
  assert found.argument_bytes > sharding_table.total(table).bytes_per_device
  wide = overrides.override(
    config, {'model.embed_dim': '1024', 'model.mlp.hidden': '2048'}
  )
  wide = overrides.override(
    wide,
    {'model.attention.num_heads': '8', 'model.attention.head_dim': '128'}
    | {'model.attention.num_kv_heads': '2'},
  )
  found, table = estimate.step(wide), sharding_table.make(wide, 8)
  matrices = lambda group: sum(
    row.bytes_per_device for row in table.groups[group] if len(row.shape) > 2
  )
  norms = 2 * 4 * 4 * 1024 + 4 * 1024  # (layers, width) twice, and the last.
  tables = 2 * 4 * 512 * 1024 // 8
  own = matrices(sharding_table.PARAMETERS) + norms + tables
  assert found.arguments['parameters'] == own
  # Two moments, and the step twice (Adam's and the schedule's), a tile each.
  assert found.arguments['optimizer state'] - 2 * own in (512, 1024, 1536)
  # Five arrays of 4 rows of 256 tokens.
  assert found.arguments['batch'] == 5 * 4 * 4 * 256


def test_more_fsdp_keeps_and_holds_less():
  wide: dict[str, Any] = {'model__embed_dim': 2048, 'model__num_layers': 8}
  some = [estimate.step(config_of(mesh__fsdp=n, **wide)) for n in (2, 4, 8)]
  for less, more in zip(some[1:], some):
    for name in ('parameters', 'optimizer state'):
      ratio = less.arguments[name] / more.arguments[name]
      assert ratio == pytest.approx(0.5, abs=0.01)
    assert less.executed_flops == more.executed_flops / 2
    assert less.peak_bytes < more.peak_bytes


def test_remat_trades_memory_for_products():
  remats = ('none', 'dots', 'save:query,mlp_up', 'full')
  found = [estimate.step(config_of(train__remat=remat)) for remat in remats]
  activations = [f.phases[0].parts['activations'] for f in found]
  assert activations == sorted(activations, reverse=True)
  assert len(set(activations)) == 4
  products = [f.executed_flops for f in found]
  assert products == sorted(products) and len(set(products)) == 4
  # Of each of four layers the input, in float32 here.
  assert activations[-1] == 4 * 4 * 16 * 256 * 64


@pytest.mark.parametrize(
  'layout',
  [
    {'data': 8},
    {'tensor': 4},
    {'context': 4},
    {'data': 2, 'tensor': 2},
  ],
)
def test_exchanges_are_those_of_the_theory(layout):
  """For which there is a formula of plain decoders (plan/theory.py)."""
  settings: dict[str, Any] = {
    f'mesh__{axis}': size for axis, size in layout.items()
  }
  config = config_of('decoder', model__dtype='bfloat16', **settings)
  model = dataclasses.replace(
    config.model,
    mlp=_PLAIN,
    attention=dataclasses.replace(_BLOCKS, num_kv_heads=4),
  )
  config = dataclasses.replace(config, model=model)
  found = estimate.step(config)
  expected = communication_bounds.bytes_sent(config, found.sizes)
  assert found.sent_bytes() == pytest.approx(expected, rel=0.01)


def test_what_cannot_be_is_refused():
  with pytest.raises(sharding.ShardingError, match='not divisible by 3'):
    estimate.step(config_of(mesh__tensor=3))
  with pytest.raises(ValueError, match='batch_size=16 rows cannot be dealt'):
    estimate.step(config_of(), sizes={'data': 32})
  with pytest.raises(ValueError, match='Give num_devices, or each axis'):
    estimate.step(config_of(mesh__data=-1))
  assert estimate.step(config_of(mesh__data=-1), 8).sizes['data'] == 8


def test_a_compiled_program_of_a_billion_parameters():
  """Figures of jax 0.10.2 and libtpu 0.0.42.1 for v5e 4x4."""
  config = catalog.load('llama_1b')
  own = dataclasses.replace(config.data, tokenizer=tokenizers.Bytes())
  config = dataclasses.replace(config, data=own)
  found = estimate.step(config, 16)
  assert found.argument_bytes == 829_089_792
  assert found.executed_flops == 63_144_609_185_792 + 7_559_142_440_960
  assert found.sent_bytes() == pytest.approx(6_290_153_516, rel=1e-3)
  assert found.peak_bytes == pytest.approx(2_820_047_360, rel=0.03)
  lines = estimate_text.text(found, limit=2e9)
  assert 'gathers of weights (all-gather over fsdp)' in lines
  assert lines.startswith('memory of a device: 2.6')
  assert 'should NOT fit: a device has 1.86 GiB' in lines
  entry = json.loads(json.dumps(estimate_text.to_json(found, limit=16e9)))
  assert entry['fits'] and entry['memory']['limit_bytes'] == 16e9
  parts = entry['collectives']['parts']
  assert sum(parts.values()) == pytest.approx(found.sent_bytes())


@pytest.mark.parametrize(
  ('layout', 'sent'),
  [
    ({'data': 2, 'tensor': 4}, 2_176_772_788),
    ({'pipe': 2, 'data': 4}, 2_499_944_972),
  ],
)
def test_compiled_programs_of_t5(layout, sent):
  """Figures of jax 0.10.2 and libtpu 0.0.42.1 for v5e 2x4, 64 rows."""
  config = catalog.load('t5_base')
  sizes = {f'mesh.{axis}': str(size) for axis, size in layout.items()}
  config = overrides.override(
    config,
    {'mesh.data': '1', 'data.batch_size': '64', 'train.remat': 'none'}
    | {'pipeline.microbatches': '4', **sizes},
  )
  own = dataclasses.replace(config.data, tokenizer=tokenizers.Bytes())
  found = estimate.step(dataclasses.replace(config, data=own))
  assert found.sent_bytes() == pytest.approx(sent, rel=1e-3)


def test_stages_share_the_layers_and_the_last_has_the_head():
  whole = estimate.step(config_of(train__remat='none')).flops
  settings = {'mesh__pipe': 4, 'pipeline__microbatches': 8}
  staged = estimate.step(config_of('decoder', **settings)).flops
  for name in ('forward', 'backward'):
    assert staged[name] == whole[name] / 4
  assert staged['head'] == whole['head']
  full = estimate.step(config_of('decoder', train__remat='full', **settings))
  assert full.flops['made again'] == staged['forward']


def stage_flops(config, num: int) -> list[float]:
  """Returns what each stage computes of a program for CPUs."""
  mesh = mesh_lib.make(config.mesh, jax.devices()[:num])
  options = {'xla_backend_optimization_level': 0}
  text = target_devices.compile(
    lowering.lower_step(config, mesh), options
  ).as_text()
  plan = partitioning.of(config, mesh.shape).pipeline
  assert plan is not None
  return [
    matmul_flops.matrix_flops(text, stage_trips.trips(plan, stage))
    for stage in range(num)
  ]


@pytest.mark.parametrize(
  'settings',
  [
    pytest.param({}, marks=pytest.mark.exhaustive),
    {'train__remat': 'full'},
    {'pipeline__uniform': True},
  ],
)
def test_stages_of_two_towers_are_those_of_the_program(settings):
  """One has the encoder and the other the decoder, or both do both's work."""
  config = config_of('t5', mesh__pipe=2, pipeline__microbatches=4, **settings)
  own, found = stage_flops(config, 2), estimate.step(config)
  # What is summed over pairs for the relative bias is no product.
  assert found.executed_flops == pytest.approx(max(own), rel=0.01)
  assert found.mean_flops == pytest.approx(sum(own) / 2, rel=0.01)
  alike = 'pipeline__uniform' in settings
  assert alike or found.executed_flops > 1.2 * min(own)


def test_a_last_unit_has_fewer_layers():
  """Five layers in pairs on three stages: the last has the first of a pair."""
  config = config_of(
    'experts', mesh__pipe=3, pipeline__microbatches=3, model__num_layers=5
  )
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, batch_size=12)
  )
  own, found = stage_flops(config, 3), estimate.step(config)
  assert found.executed_flops == pytest.approx(max(own), rel=0.01)
  assert found.mean_flops == pytest.approx(sum(own) / 3, rel=0.01)
  assert max(own) > 1.1 * min(own)


def test_a_compiled_pipeline_of_a_billion_parameters():
  """Figures of jax 0.10.2 and libtpu 0.0.42.1 for v5e 4x4."""
  config = overrides.override(
    catalog.load('llama_1b'),
    {'mesh.fsdp': '4', 'mesh.pipe': '4', 'data.batch_size': '32'},
  )
  own = dataclasses.replace(config.data, tokenizer=tokenizers.Bytes())
  found = estimate.step(dataclasses.replace(config, data=own))
  assert found.argument_bytes == pytest.approx(828_645_376, rel=1e-4)
  assert found.executed_flops == 42_107_859_369_984
  assert found.sent_bytes() == pytest.approx(6_116_426_240, rel=1e-3)
  assert found.peak_bytes == pytest.approx(3_145_373_184, rel=0.03)
