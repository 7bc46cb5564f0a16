"""The presets, and parts in every mixture, as models of a few thousand weights.

Attention is in one block of queries, so that nothing hidden is skipped.
"""

import dataclasses

from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import norm
from t2x.layers import position
from t2x.layers import routing
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import presets

ROWS, LENGTH, SOURCE = 2, 24, 16
BLOCK = 24


def _attention(kind):
  heads = {kind.num_heads: None, 1: 1}.get(kind.kv_heads, 2)
  sizes = {'num_heads': 4, 'num_kv_heads': heads, 'head_dim': 8}
  if isinstance(kind, attention_config.Local):
    sizes['window'] = 5
  return dataclasses.replace(kind, **sizes, block=BLOCK)


def preset(name: str):
  """Returns a preset with its parts, and small sizes."""
  config = presets.PRESETS[name]()
  return dataclasses.replace(
    config,
    vocab_size=200,  # Padded to 256 rows.
    embed_dim=32,
    num_layers=3,
    attention=_attention(config.attention),
    attention_pattern=tuple(map(_attention, config.attention_pattern)),
    mlp=dataclasses.replace(config.mlp, hidden=48),
  )


PRESETS = {
  name: preset(name)
  for name in (
    'transformer_base',
    'bert_base',
    'roberta_base',
    'gpt2_small',
    'gpt3_175b',
    'palm_540b',
    't5_base',
    't5_v1_1_base',
    'llama2_7b',
    'llama2_70b',
    'mixtral_8x7b',
  )
}

_SIZES = {'vocab_size': 256, 'embed_dim': 32, 'num_layers': 3}
_DENSE = attention_config.Dense(num_heads=4, head_dim=16, block=BLOCK)
_GROUPED = dataclasses.replace(_DENSE, num_kv_heads=2)
_LOCAL = attention_config.Local(num_heads=4, head_dim=16, block=BLOCK, window=7)
_GATED = mlp.MlpConfig(hidden=48, gated=True, activation='silu', bias=False)


def experts(router, num=4) -> moe.MoeConfig:
  return moe.MoeConfig(hidden=24, bias=False, num_experts=num, router=router)


PARTS = {
  'alibi': decoder.DecoderConfig(
    **_SIZES, attention=_GROUPED, position=position.Alibi()
  ),
  'local': decoder.DecoderConfig(**_SIZES, attention=_LOCAL, mlp=_GATED),
  'pattern': decoder.DecoderConfig(
    **_SIZES, attention=_DENSE, attention_pattern=(_DENSE, _LOCAL)
  ),
  'qk_norm': decoder.DecoderConfig(
    **_SIZES,
    attention=dataclasses.replace(_DENSE, qk_norm=True, soft_cap=9.0),
    residual='parallel',
    tied_head='untied',
  ),
  'sandwich': decoder.DecoderConfig(
    **_SIZES,
    attention_pattern=(
      dataclasses.replace(_LOCAL, soft_cap=9.0),
      dataclasses.replace(_DENSE, soft_cap=9.0),
    ),
    mlp=_GATED,
    norm=norm.RMSNorm(unit_offset=True),
    residual='sandwich',
    position=position.Rotary(),
    logit_soft_cap=5.0,
  ),
  'bare encoder': encoder.EncoderConfig(
    **_SIZES,
    attention=_LOCAL,
    masked_head=False,
    position=position.RelativeBuckets(),
  ),
  'grouped encoder-decoder': encoder_decoder.EncoderDecoderConfig(
    **_SIZES,
    attention=_GROUPED,
    mlp=_GATED,
    num_encoder_layers=2,
    position=position.RelativeBuckets(),
  ),
  'dropless': decoder.DecoderConfig(
    **_SIZES, attention=_DENSE, mlp=experts(routing.TokenChoice())
  ),
  'capacity': decoder.DecoderConfig(
    **_SIZES,
    attention=_DENSE,
    mlp_pattern=(_GATED, experts(routing.TokenChoice(capacity=1.0))),
  ),
  'expert choice': encoder.EncoderConfig(
    **_SIZES, attention=_DENSE, mlp=experts(routing.ExpertChoice())
  ),
}
CONFIGS = PRESETS | PARTS


def source_length(config) -> int | None:
  """Returns the length of the source's rows, where there is a source."""
  has_source = isinstance(config, encoder_decoder.EncoderDecoderConfig)
  return SOURCE if has_source else None
