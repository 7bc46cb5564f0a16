"""Models that no class of others computes: the nearest, and what it lacks."""

import dataclasses
import importlib.util
import pathlib
import typing

import pytest

from t2x.interop import exported
from t2x.layers import attention_config
from t2x.layers import attention_kinds
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import norm
from t2x.layers import position
from t2x.layers import routing
from t2x.layers import transformer_xl
from t2x.models import encoder
from t2x.models import presets

_EXPERIMENTS = pathlib.Path(__file__).parents[2] / 'experiments'
_XL = transformer_xl.TransformerXL(num_heads=3, head_dim=8)
_MOE = moe.MoeConfig(hidden=32, num_experts=4)


def small(preset, **changes):
  """Returns a preset of 2 layers and 3 heads, with other settings."""
  config = presets.__dict__[preset]()
  heads = dataclasses.replace(config.attention, num_heads=3, head_dim=8)
  own = {'num_layers': 2, 'embed_dim': 24, 'attention': heads}
  return dataclasses.replace(config, **{**own, **changes})


def message(config):
  """Returns what the export of a model says; '' if it goes."""
  try:
    exported.from_t2x(config)
  except ValueError as error:
    assert '\n' not in str(error)
    return str(error)
  return ''


@pytest.mark.parametrize(
  'file',
  [
    f
    for f in sorted(_EXPERIMENTS.glob('*.py'))
    if 'get_config' in f.read_text()
  ],
  ids=lambda f: f.stem,
)
def test_every_experiment_exports_or_says_what_is_lacking(file):
  spec = importlib.util.spec_from_file_location(file.stem, file)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  said = message(module.get_config().model)
  assert not said or 'the nearest is ' in said
  if file.stem == 'bert_tiny':
    assert 'the nearest is bert, which lacks ' in said
    assert "model.position.kind='relative' (there 'learned')" in said
    assert "model.residual='pre_norm'" in said and 'max_length' not in said


POSITIONS = (
  None, position.Sinusoidal(), position.Rotary(), position.RelativeBuckets(),
  position.Alibi(), position.Learned(max_length=16),
)  # fmt: skip


@pytest.mark.parametrize('place', POSITIONS)
@pytest.mark.parametrize('preset', ['bert_large', 'gpt2_xl', 't5_3b'])
def test_positions(preset, place):
  said = message(small(preset, position=place))
  own = {'bert_large': 'learned', 'gpt2_xl': 'learned', 't5_3b': 'relative'}
  if getattr(place, 'kind', None) == own[preset]:
    assert not said
  elif preset == 'gpt2_xl' and isinstance(place, position.Rotary):
    assert 'the nearest is llama' in said and 'layernorm' in said
  else:
    assert 'model.position' in said


def test_kinds_of_attention():
  tried = 0
  for kind in typing.get_args(attention_kinds.AttentionConfig):
    if kind is attention_config.Dense:
      continue
    for preset in ('bert_large', 'gpt2_xl', 't5_3b'):
      try:
        config = small(preset, attention=kind(num_heads=3, head_dim=8))
      except ValueError:
        continue  # The model itself cannot be.
      tried += 1
      assert 'model.attention' in message(config)
  assert tried > 20


@pytest.mark.parametrize(
  'preset, changes, named',
  [
    ('gpt2_xl', {'ahead': (0.3, 0.1)}, 'model.ahead'),
    ('gpt2_xl', {'attention': _XL, 'position': None, 'memory': 8}, 'memory=8'),
    ('bert_large', {'attention': _XL, 'position': None}, 'transformer_xl'),
    ('bert_large', {'query_layers': 1}, 'query_layers'),
    ('gpt2_xl', {'mlp': _MOE}, "model.mlp.kind='moe'"),
    ('bert_large', {'mlp': _MOE}, "model.mlp.kind='moe'"),
    ('t5_3b', {'mlp': _MOE}, "model.mlp.kind='moe'"),
    ('llama2_7b', {'mlp_pattern': (mlp.MlpConfig(), _MOE)}, 'mlp_pattern'),
    ('gpt2_xl', {'residual': 'parallel'}, "residual='parallel'"),
    ('gpt2_xl', {'embed_scale': True}, 'embed_scale=True'),
    ('gpt2_xl', {'norm': norm.RMSNorm()}, "model.norm.kind='rmsnorm'"),
    ('gpt2_xl', {'tied_head': 'untied'}, "tied_head='untied'"),
    ('gpt2_xl', {'embed_dim': 25}, 'model.attention.num_heads=3'),
    ('bert_large', {'embed_dim': 25}, 'model.attention.num_heads=3'),
    ('llama2_7b', {'mlp': dataclasses.replace(_MOE, gated=True, bias=False,
      router=routing.TokenChoice(top_k=1, normalize=False))}, 'top_k=1'),
  ],
)  # fmt: skip
def test_further_settings(preset, changes, named):
  assert named in message(small(preset, **changes))


def test_a_head_of_classes_is_named():
  config = small('bert_large')
  assert isinstance(config, encoder.EncoderConfig)
  config = dataclasses.replace(config, classes=(3,), pooler=True)
  assert not message(config) or 'classes' in message(config)


def test_heads_that_do_not_part_the_width():
  heads = attention_config.Dense(num_heads=5, head_dim=16, bias=True)
  assert 'num_heads=5' in message(small('gpt2_xl', attention=heads))
