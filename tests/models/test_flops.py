import dataclasses
import itertools

import pytest

from t2x.attention import mask as mask_lib
from t2x.attention import patterns
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import position
from t2x.layers import routing
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import flops

_DENSE = attention_config.Dense(num_heads=4, head_dim=16)
_GROUPED = attention_config.Dense(num_heads=4, num_kv_heads=2, head_dim=8)
_LOCAL = attention_config.Local(num_heads=4, head_dim=16, window=7)
_GATED = mlp.MlpConfig(hidden=48, gated=True, activation='silu', bias=False)
# Slots for 2 of 4 experts of a token: products of a fixed number of rows.
_EXPERTS = moe.MoeConfig(
  hidden=24,
  bias=False,
  num_experts=4,
  router=routing.TokenChoice(capacity=1.0),
)
_SIZES = {'vocab_size': 256, 'embed_dim': 32, 'num_layers': 3}

_CONFIGS = {
  'decoder': decoder.DecoderConfig(**_SIZES, attention=_DENSE),
  'grouped': decoder.DecoderConfig(
    **_SIZES,
    attention=_GROUPED,
    mlp=_GATED,
    residual='parallel',
    position=position.Rotary(),
    tied_head='untied',
  ),
  'pattern': decoder.DecoderConfig(
    **_SIZES, attention=_DENSE, attention_pattern=(_DENSE, _LOCAL)
  ),
  'experts': decoder.DecoderConfig(
    **_SIZES, attention=_DENSE, mlp_pattern=(_GATED, _EXPERTS)
  ),
  'encoder': encoder.EncoderConfig(**_SIZES, attention=_DENSE, pooler=True),
  'bare encoder': encoder.EncoderConfig(
    **_SIZES, attention=_LOCAL, masked_head=False
  ),
  'encoder_decoder': encoder_decoder.EncoderDecoderConfig(
    **_SIZES,
    attention=_GROUPED,
    mlp=_GATED,
    num_encoder_layers=2,
    position=position.RelativeBuckets(),
  ),
}


@pytest.mark.parametrize(
  'window, T, S', [(None, 12, 12), (1, 12, 12), (5, 12, 12), (40, 12, 12)]
)
def test_causal_pairs_are_the_visible_ones_less_half_an_edge(window, T, S):
  mask = mask_lib.make(causal=True, window=window)
  seen = int(mask_lib.visible(mask, slice(0, T), slice(0, S)).sum())
  width = min(window or T, T)
  assert flops.pairs(T, S, mask.pattern) == seen - width / 2


def test_pairs_without_order_are_the_visible_ones():
  for window, (T, S) in itertools.product(
    (1, 3, 11, 40), ((12, 12), (5, 16), (16, 5))
  ):
    mask = mask_lib.make(window=window)
    seen = mask_lib.visible(mask, slice(0, T), slice(0, S)).sum()
    assert flops.pairs(T, S, mask.pattern) == int(seen)
  assert flops.pairs(3, 7, patterns.Everything()) == 21


def test_each_layer_of_a_pattern_counts_by_its_own_window():
  # Three layers: dense, a window of 7, dense; 4 heads of 16.
  parts = flops.forward_parts(_CONFIGS['pattern'], flops.BatchShape(2, 40))
  seen = 2 * (40 * 40 / 2) + (7 * 40 - 7 * 7 / 2)
  assert parts['scores and values'] == 2 * 4 * 4 * 16 * seen


def _gpt2_tiny(**changes):
  return decoder.DecoderConfig(
    vocab_size=8192,
    num_layers=4,
    embed_dim=256,
    attention=attention_config.Dense(num_heads=4, head_dim=64),
    mlp=mlp.MlpConfig(hidden=1024),
    **changes,
  )


def test_the_benchmarks_shape_costs_67_6_gflop_a_step():
  step = flops.train_flops(_gpt2_tiny(), flops.BatchShape(8, 256))
  assert f'{step / 1e9:.1f}' == '67.6'
  # 6 x tokens x weights, and half of 12 x rows x layers x width x T x T.
  weights = 4 * (4 * 256**2 + 2 * 256 * 1024) + 8192 * 256
  assert step == 6 * 2048 * weights + 6 * 8 * 4 * 256 * 256**2


def test_padding_of_the_vocabulary_is_not_counted():
  config = dataclasses.replace(_gpt2_tiny(), vocab_size=8191)
  shape = flops.BatchShape(8, 256)
  whole = flops.forward_flops(_gpt2_tiny(), shape)
  less = whole - flops.forward_flops(config, shape)
  assert less == 2 * 8 * 256 * 256


def test_encoder_decoder_needs_the_length_of_its_source():
  with pytest.raises(ValueError, match='encoder_length=None; an encoder-dec'):
    flops.forward_flops(_CONFIGS['encoder_decoder'], flops.BatchShape(2, 8))


@pytest.mark.parametrize(
  'kind, dtype, teraflops',
  [
    ('TPU v4', 'bfloat16', 275),
    ('TPU v5 lite', 'bfloat16', 197),
    ('TPU v5p', 'bfloat16', 459),
    ('TPU v5', 'bfloat16', 459),
    ('TPU v6 lite', 'bfloat16', 918),
    ('TPU7x', 'bfloat16', 1153.5),
    ('NVIDIA A100-SXM4-80GB', 'float32', 156),
    ('NVIDIA H100 80GB HBM3', 'bfloat16', 989.4),
    ('NVIDIA H100 PCIe', 'bfloat16', 756),
    ('NVIDIA H200', 'float32', 494.7),
    ('NVIDIA B200', 'bfloat16', 2250),
  ],
)
def test_peaks_of_known_devices(kind, dtype, teraflops):
  assert flops.peak_flops(kind, dtype) == pytest.approx(teraflops * 1e12)


@pytest.mark.parametrize('kind', ['cpu', 'TPU v4 lite', 'TPU v2', 'NVIDIA L4'])
def test_mfu_is_null_where_the_peak_is_unknown(kind):
  peak = flops.peak_flops(kind, 'bfloat16')
  assert peak is None
  assert flops.mfu(1e12, 1.0, 1, peak) is None


def test_mfu_is_a_share_of_all_devices():
  assert flops.mfu(1e12, 0.5, 4, 1e12) == pytest.approx(0.5)


def test_formula_says_what_is_counted():
  shape = flops.BatchShape(8, 256)
  text = flops.formula(_gpt2_tiny(), shape, peak=1e12)
  assert 'T*T/2 (causal attention counted as half)' in text
  assert '67.65 GFLOP; peak FLOP/s of a device 1e+12' in text
  assert 'mfu is null' in flops.formula(_gpt2_tiny(), shape)
  windows = flops.formula(_CONFIGS['pattern'], flops.BatchShape(2, 40))
  assert 'in a window w w*T - w*w/2' in windows
  assert 'causal' not in flops.formula(
    _CONFIGS['encoder'], flops.BatchShape(2, 40)
  )


@pytest.mark.parametrize('name', _CONFIGS)
def test_layers_and_head_add_up_to_the_model(name):
  config = _CONFIGS[name]
  source = 24 if name == 'encoder_decoder' else None
  layers = flops.layer_flops(config, 40, source)
  total = sum(map(sum, layers.values())) + flops.head_flops(config, 40)
  assert total == flops.forward_flops(config, flops.BatchShape(1, 40, source))
  last = layers['decoder' if source else 'tower']
  assert len(last) == config.num_layers
  # The third layer is of the first's kind again.
  different = 'pattern' in name or name == 'experts'
  assert (last[0] != last[1]) == different and last[0] == last[2]


def test_layers_of_an_encoder_decoder_need_the_length_of_its_source():
  with pytest.raises(ValueError, match='encoder_length=None; an encoder-dec'):
    flops.layer_flops(_CONFIGS['encoder_decoder'], 8)
