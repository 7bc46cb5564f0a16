"""Reads the config.json of decoder families that resemble Llama.

configs.py reads such a config.json as a Llama's, and `adapt_to_family` changes
the settings that the family has otherwise. llama_like_exported.py is the
inverse.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from t2x.interop import values
from t2x.layers import attention_config
from t2x.layers import norm
from t2x.layers import position
from t2x.models import decoder

Hf = values.Hf
Config = decoder.DecoderConfig

SLIDING, FULL = 'sliding_attention', 'full_attention'

# Defaults of transformers for keys that a config.json leaves out, where they
# differ from Llama's.
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
# Families that choose for each layer whether it has a sliding window; in the
# others all layers have one, or none.
BY_LAYER = ('qwen2', 'qwen3', 'gemma2', 'smollm3')


def as_llama(hf: Hf) -> dict[str, Any]:
  """Returns the config.json of such a family in Llama's terms.

  Raises:
    ValueError: the attention is bidirectional.
  """
  family = hf['model_type']
  hf = {**_DEFAULTS[family], **hf}
  if hf.get('use_bidirectional_attention'):
    raise ValueError(
      'use_bidirectional_attention=True in the config; t2x has decoders whose '
      'tokens see no later ones.'
    )
  if family == 'gemma2':
    hf['hidden_act'] = hf['hidden_activation']
  # Gemma's first releases say gelu for the tanh approximation.
  if family == 'gemma' and hf['hidden_act'] == 'gelu':
    hf['hidden_act'] = 'gelu_pytorch_tanh'
  if family in ('mistral', 'qwen2', 'phi3'):
    hf['attention_bias'] = family == 'qwen2'
  rope = hf.get('rope_parameters')
  if family == 'phi3' and rope:  # Llama rotates whole heads.
    hf['rope_parameters'] = {k: v for k, v in rope.items() if k != _PARTIAL}
    hf |= {k: v for k, v in rope.items() if k == _PARTIAL}
  return hf


def adapt_to_family(config: Config, hf: Hf) -> Config:
  """Returns the config of a family, given that of a Llama.

  Args:
    config: config of a Llama with the same settings.
    hf: result of `as_llama`.

  Raises:
    ValueError: a setting is invalid, or t2x does not have it.
  """
  family = hf['model_type']
  heads: Any = dataclasses.replace(config.attention, **_heads(hf, config))
  change: dict[str, Any] = {}
  if family in ('gemma', 'gemma2'):
    change |= {
      'norm': norm.RMSNorm(eps=config.norm.eps, unit_offset=True),
      'embed_scale': True,
    }
  if family == 'gemma2':
    cap = _optional(hf, 'final_logit_softcapping')
    change |= {'residual': 'sandwich', 'logit_soft_cap': cap}
  if family == 'phi3':
    change |= {'position': _partial(config.position, hf)}
    change |= {'dropout': hf.get('resid_pdrop', 0.0)}
  layers = _layers(heads, hf)
  return with_layers(dataclasses.replace(config, **change), layers)


def with_layers(config: Config, layers: Sequence[Any]) -> Config:
  """Returns a config with the given attention of each layer.

  The pattern is the shortest group that repeats, and empty if all layers are
  the same.

  Args:
    config: config to change.
    layers: config of the attention of each layer, in order.
  """
  size = next(
    p
    for p in range(1, len(layers) + 1)
    if all(layer == layers[i % p] for i, layer in enumerate(layers))
  )
  return dataclasses.replace(
    config,
    attention=layers[0],
    attention_pattern=tuple(layers[:size]) if size > 1 else (),
  )


def _heads(hf: Hf, config: Config) -> dict[str, Any]:
  """Returns the fields of attention in which a family differs from Llama."""
  family = hf['model_type']
  if family == 'qwen2':
    return {'out_bias': False}
  if family == 'qwen3':
    return {'qk_norm': True, 'qk_norm_eps': config.norm.eps}
  if family == 'gemma2':
    scalar = _number(hf, 'query_pre_attn_scalar')
    plain = scalar == config.attention.head_dim
    return {
      'scale': None if plain else scalar**-0.5,
      'soft_cap': _optional(hf, 'attn_logit_softcapping'),
    }
  return {}


def _partial(rotary: position.PositionConfig | None, hf: Hf) -> position.Rotary:
  """Returns Phi-3's positions, which may rotate only a part of each head."""
  assert isinstance(rotary, position.Rotary)
  if rotary.scaling is not None:
    raise ValueError(
      "rope_type='llama3' in the config; a phi3 has default or longrope, and "
      't2x default of them.'
    )
  share = _number({_PARTIAL: 1.0, **hf}, _PARTIAL)
  return dataclasses.replace(rotary, fraction=share)


def _layers(heads: attention_config.Dense, hf: Hf) -> list[Any]:
  """Returns the config of the attention of each layer."""
  num = hf['num_hidden_layers']
  is_smollm3 = hf['model_type'] == 'smollm3'
  rotary = _rotary_layers(hf, num) if is_smollm3 else [True] * num
  return [
    _windowed(dataclasses.replace(heads, rotary=has_rotary), window)
    for window, has_rotary in zip(_windows(hf, rotary), rotary)
  ]


def _windowed(
  heads: attention_config.Dense, window: int | None
) -> attention_config.Softmax:
  if window is None:
    return heads
  return attention_config.Local(**dataclasses.asdict(heads), window=window)


def _rotary_layers(hf: Hf, num: int) -> list[bool]:
  """Returns, for each layer of a SmolLM3, whether it has rotary positions."""
  given, name = hf.get('no_rope_layers'), 'no_rope_layer_interval'
  if given is None:
    every = _number({name: 4, **hf}, name, whole=True)
    return [(i + 1) % every != 0 for i in range(num)]
  whole = isinstance(given, list) and len(given) >= num
  if not whole or any(flag not in (0, 1) for flag in given):
    raise values.Wrong(
      'no_rope_layers', given, f'a 1 or a 0 for each of num_hidden_layers={num}'
    )
  return [bool(flag) for flag in given[:num]]


def _windows(hf: Hf, rotary: Sequence[bool]) -> list[int | None]:
  """Returns the sliding window of each layer, in tokens; None for no window.

  Args:
    hf: result of `as_llama`.
    rotary: flag of each layer, whether it has rotary positions.
  """
  family, num = hf['model_type'], len(rotary)
  window = _optional(hf, 'sliding_window', whole=True)
  if family == 'gemma':
    return [None] * num
  if family not in BY_LAYER:
    return [window] * num
  if family != 'gemma2' and not values.flag(_SLIDES, hf.get(_SLIDES)):
    return [None] * num
  types = hf.get('layer_types')
  if types is None:
    types = _default_types(hf, rotary)
  whole = isinstance(types, list) and len(types) == num
  if not whole or any(name not in (SLIDING, FULL) for name in types):
    needed = f'{SLIDING} or {FULL} for each of num_hidden_layers={num}'
    raise values.Wrong('layer_types', types, needed)
  if window is None and family == 'gemma2' and SLIDING in types:
    raise ValueError(
      'sliding_window=None in the config, and some of layer_types are '
      f'{SLIDING}. Set the number of tokens, or the layers to {FULL}.'
    )
  return [window if name == SLIDING else None for name in types]


def _default_types(hf: Hf, rotary: Sequence[bool]) -> list[str]:
  """Returns `layer_types` for a config.json that leaves it out."""
  family, name = hf['model_type'], 'max_window_layers'
  if family == 'gemma2':
    slides = [i % 2 == 0 for i in range(len(rotary))]
  elif family == 'smollm3':
    slides = [not has_rotary for has_rotary in rotary]
  else:
    first = _number({name: 28, **hf}, name, above=-1, whole=True)
    slides = [i >= first for i in range(len(rotary))]
  return [SLIDING if slide else FULL for slide in slides]


def _number(hf: Hf, name: str, *, above: int = 0, whole: bool = False) -> Any:
  """Returns a setting that is a number above a bound."""
  return values.within(name, hf.get(name), above=above, whole=whole)


def _optional(hf: Hf, name: str, *, whole: bool = False) -> Any:
  """Returns a setting that is a number above 0, or null."""
  return None if hf.get(name) is None else _number(hf, name, whole=whole)
