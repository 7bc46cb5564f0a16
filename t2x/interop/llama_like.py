"""Decoders of others that differ from Llama in a few settings.

configs.py reads such a config.json as a Llama's, and `adapted` changes what
the family computes otherwise; llama_like_exported.py goes the way back.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

from t2x.interop import values
from t2x.layers import attention_config
from t2x.layers import norm
from t2x.layers import position
from t2x.models import decoder

Hf = Mapping[str, Any]
Config = decoder.DecoderConfig

SLIDING, FULL = 'sliding_attention', 'full_attention'

# What transformers takes where a config.json is silent and Llama's value is
# another one.
_QWEN = {'num_key_value_heads': 32, 'sliding_window': 4096}
_GEMMA: dict[str, Any] = {'head_dim': 256, 'tie_word_embeddings': True}
_DEFAULTS: dict[str, dict[str, Any]] = {
  'mistral': {'num_key_value_heads': 8, 'sliding_window': 4096},
  'qwen2': _QWEN,
  'qwen3': {**_QWEN, 'head_dim': 128},
  'gemma': {
    **_GEMMA,
    'num_key_value_heads': 16,
    'hidden_act': 'gelu_pytorch_tanh',
  },
  'gemma2': {
    **_GEMMA,
    'num_key_value_heads': 4,
    'hidden_activation': 'gelu_pytorch_tanh',
    'sliding_window': 4096,
    'query_pre_attn_scalar': 256,
    'attn_logit_softcapping': 50.0,
    'final_logit_softcapping': 30.0,
  },
  'phi3': {'rms_norm_eps': 1e-5},
  'smollm3': {
    'num_key_value_heads': 4,
    'rope_theta': 2e6,
    'tie_word_embeddings': True,
  },
}
NAMES = tuple(_DEFAULTS)
_PARTIAL = 'partial_rotary_factor'
_SLIDES = 'use_sliding_window'
# They say which layers slide; in the others all do, or none.
BY_LAYER = ('qwen2', 'qwen3', 'gemma2', 'smollm3')


def as_llama(hf: Hf) -> dict[str, Any]:
  """Returns a config.json of these families as Llama's would say it.

  Raises:
    ValueError: tokens that see later ones.
  """
  kind = hf['model_type']
  hf = {**_DEFAULTS[kind], **hf}
  if hf.get('use_bidirectional_attention'):
    raise ValueError(
      'use_bidirectional_attention=True in the config; t2x has decoders whose '
      'tokens see no later ones.'
    )
  if kind == 'gemma2':
    hf['hidden_act'] = hf['hidden_activation']
  # Gemma's first releases say gelu and mean the approximation.
  if kind == 'gemma' and hf['hidden_act'] == 'gelu':
    hf['hidden_act'] = 'gelu_pytorch_tanh'
  if kind in ('mistral', 'qwen2', 'phi3'):
    hf['attention_bias'] = kind == 'qwen2'
  rope = hf.get('rope_parameters')
  if kind == 'phi3' and rope:  # Llama's turn whole heads.
    hf['rope_parameters'] = {k: v for k, v in rope.items() if k != _PARTIAL}
    hf |= {k: v for k, v in rope.items() if k == _PARTIAL}
  return hf


def adapted(config: Config, hf: Hf) -> Config:
  """Returns what a family computes otherwise than Llama.

  Args:
    config: Llama's, of the same settings.
    hf: what `as_llama` returned.

  Raises:
    ValueError: a setting that t2x does not have.
  """
  kind = hf['model_type']
  heads: Any = dataclasses.replace(config.attention, **_heads(hf, config))
  change: dict[str, Any] = {}
  if kind in ('gemma', 'gemma2'):
    own = norm.RMSNorm(eps=config.norm.eps, unit_offset=True)
    change |= {'norm': own, 'embed_scale': True}
  if kind == 'gemma2':
    cap = _optional(hf, 'final_logit_softcapping')
    change |= {'residual': 'sandwich', 'logit_soft_cap': cap}
  if kind == 'phi3':
    change |= {'position': _partial(config.position, hf)}
    change |= {'dropout': hf.get('resid_pdrop', 0.0)}
  layers = _layers(heads, hf)
  return with_layers(dataclasses.replace(config, **change), layers)


def with_layers(config: Config, kinds: Sequence[Any]) -> Config:
  """Returns the config whose layers have these kinds of attention, in order.

  As the shortest group that repeats: of one kind alone, no pattern.
  """
  size = next(
    p
    for p in range(1, len(kinds) + 1)
    if all(kind == kinds[i % p] for i, kind in enumerate(kinds))
  )
  return dataclasses.replace(
    config,
    attention=kinds[0],
    attention_pattern=tuple(kinds[:size]) if size > 1 else (),
  )


def _heads(hf: Hf, config: Config) -> dict[str, Any]:
  """Returns the fields of attention that a family has otherwise."""
  kind = hf['model_type']
  if kind == 'qwen2':
    return {'out_bias': False}
  if kind == 'qwen3':
    return {'qk_norm': True, 'qk_norm_eps': config.norm.eps}
  if kind == 'gemma2':
    scalar = _number(hf, 'query_pre_attn_scalar')
    plain = scalar == config.attention.head_dim
    return {
      'scale': None if plain else scalar**-0.5,
      'soft_cap': _optional(hf, 'attn_logit_softcapping'),
    }
  return {}


def _partial(rotary: Any, hf: Hf) -> position.Rotary:
  """Returns Phi-3's positions, which may turn a part of each head."""
  if rotary.scaling is not None:
    raise ValueError(
      "rope_type='llama3' in the config; a phi3 has default or longrope, and "
      't2x default of them.'
    )
  share = _number({_PARTIAL: 1.0, **hf}, _PARTIAL)
  return dataclasses.replace(rotary, fraction=share)


def _layers(heads: attention_config.Dense, hf: Hf) -> list[Any]:
  """Returns the attention of each layer."""
  num = hf['num_hidden_layers']
  turned = _turned(hf, num) if hf['model_type'] == 'smollm3' else [True] * num
  return [
    _kind(dataclasses.replace(heads, rotary=turns), window)
    for window, turns in zip(_windows(hf, turned), turned)
  ]


def _kind(
  heads: attention_config.Dense, window: int | None
) -> attention_config.Softmax:
  if window is None:
    return heads
  return attention_config.Local(**dataclasses.asdict(heads), window=window)


def _turned(hf: Hf, num: int) -> list[bool]:
  """Returns which layers of a SmolLM3 have positions."""
  given, name = hf.get('no_rope_layers'), 'no_rope_layer_interval'
  if given is None:
    every = _number({name: 4, **hf}, name, whole=True)
    return [(i + 1) % every != 0 for i in range(num)]
  whole = isinstance(given, list) and len(given) >= num
  if not whole or any(turns not in (0, 1) for turns in given):
    raise values.Wrong(
      'no_rope_layers', given, f'a 1 or a 0 for each of num_hidden_layers={num}'
    )
  return [bool(turns) for turns in given[:num]]


def _windows(hf: Hf, turned: Sequence[bool]) -> list[int | None]:
  """Returns the tokens that each layer sees, None for all."""
  kind, num = hf['model_type'], len(turned)
  window = _optional(hf, 'sliding_window', whole=True)
  if kind == 'gemma':
    return [None] * num
  if kind not in BY_LAYER:
    return [window] * num
  if kind != 'gemma2' and not values.flag(_SLIDES, hf.get(_SLIDES)):
    return [None] * num
  types = hf.get('layer_types')
  if types is None:
    types = _default_types(hf, turned)
  whole = isinstance(types, list) and len(types) == num
  if not whole or any(name not in (SLIDING, FULL) for name in types):
    needed = f'{SLIDING} or {FULL} for each of num_hidden_layers={num}'
    raise values.Wrong('layer_types', types, needed)
  if window is None and kind == 'gemma2' and SLIDING in types:
    raise ValueError(
      'sliding_window=None in the config, and some of layer_types are '
      f'{SLIDING}. Set the number of tokens, or the layers to {FULL}.'
    )
  return [window if name == SLIDING else None for name in types]


def _default_types(hf: Hf, turned: Sequence[bool]) -> list[str]:
  """Returns which layers slide where a config.json does not say it."""
  kind, name = hf['model_type'], 'max_window_layers'
  if kind == 'gemma2':
    slides = [i % 2 == 0 for i in range(len(turned))]
  elif kind == 'smollm3':
    slides = [not turns for turns in turned]
  else:
    first = _number({name: 28, **hf}, name, above=-1, whole=True)
    slides = [i >= first for i in range(len(turned))]
  return [SLIDING if slide else FULL for slide in slides]


def _number(hf: Hf, name: str, *, above: int = 0, whole: bool = False) -> Any:
  """Returns a setting that is a number above a bound."""
  return values.within(name, hf.get(name), above=above, whole=whole)


def _optional(hf: Hf, name: str, *, whole: bool = False) -> Any:
  """Returns a setting that is a number above 0, or null."""
  return None if hf.get(name) is None else _number(hf, name, whole=whole)
