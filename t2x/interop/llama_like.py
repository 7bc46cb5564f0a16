"""Decoders of others that differ from Llama in a few settings, both ways.

configs.py reads such a config.json as a Llama's, and `adapted` changes what
the family computes otherwise; exported.py goes the same way back.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

from t2x.layers import attention
from t2x.layers import norm
from t2x.layers import position
from t2x.models import decoder

Hf = Mapping[str, Any]
Config = decoder.DecoderConfig

_SLIDING, _FULL = 'sliding_attention', 'full_attention'

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
_CLASSES = {
  'mistral': 'Mistral',
  'qwen2': 'Qwen2',
  'qwen3': 'Qwen3',
  'gemma': 'Gemma',
  'gemma2': 'Gemma2',
  'phi3': 'Phi3',
  'smollm3': 'SmolLM3',
}
NAMES = tuple(_DEFAULTS)
# They say which layers slide; in the others all do, or none.
_BY_LAYER = ('qwen2', 'qwen3', 'gemma2', 'smollm3')


# --- From a config.json. ---


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
  heads = dataclasses.replace(config.attention, **_heads(hf))
  change: dict[str, Any] = {}
  if kind in ('gemma', 'gemma2'):
    own = norm.RMSNorm(eps=config.norm.eps, unit_offset=True)
    change |= {'norm': own, 'embed_scale': True}
  if kind == 'gemma2':
    cap = _positive(hf, 'final_logit_softcapping')
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


def _heads(hf: Hf) -> dict[str, Any]:
  """Returns the fields of attention that a family has otherwise."""
  kind = hf['model_type']
  if kind == 'qwen2':
    return {'out_bias': False}
  if kind == 'qwen3':
    return {'qk_norm': True, 'qk_norm_eps': hf.get('rms_norm_eps', 1e-6)}
  if kind == 'gemma2':
    scalar = _positive(hf, 'query_pre_attn_scalar')
    plain = scalar in (None, hf['head_dim'])
    return {
      'scale': None if plain else scalar**-0.5,
      'soft_cap': _positive(hf, 'attn_logit_softcapping'),
    }
  return {}


def _partial(rotary: Any, hf: Hf) -> position.Rotary:
  """Returns Phi-3's positions, which may turn a part of each head."""
  if rotary.scaling is not None:
    raise ValueError(
      "rope_type='llama3' in the config; a phi3 has default or longrope, and "
      't2x default of them.'
    )
  rope = hf.get('rope_parameters') or {}
  name = 'partial_rotary_factor'
  share = _positive({name: 1.0, **hf, **rope}, name)
  return dataclasses.replace(rotary, fraction=share or 1.0)


def _layers(heads: attention.Dense, hf: Hf) -> list[Any]:
  """Returns the attention of each layer."""
  num = hf['num_hidden_layers']
  turned = _turned(hf, num) if hf['model_type'] == 'smollm3' else [True] * num
  return [
    _kind(dataclasses.replace(heads, rotary=turns), window)
    for window, turns in zip(_windows(hf, turned), turned)
  ]


def _kind(heads: attention.Dense, window: int | None) -> attention.Softmax:
  if window is None:
    return heads
  return attention.Local(**dataclasses.asdict(heads), window=window)


def _turned(hf: Hf, num: int) -> list[bool]:
  """Returns which layers of a SmolLM3 have positions."""
  name, given = 'no_rope_layers', hf.get('no_rope_layers')
  if given is None:
    every = _positive({'no_rope_layer_interval': 4, **hf},
                      'no_rope_layer_interval')  # fmt: skip
    return [bool(every) and (i + 1) % every != 0 for i in range(num)]
  if not isinstance(given, list) or len(given) < num or {*given} - {0, 1}:
    raise ValueError(
      f'{name}={given!r} in the config; it is a 1 or a 0 for each of the {num} '
      'layers.'
    )
  return [bool(turns) for turns in given[:num]]


def _windows(hf: Hf, turned: Sequence[bool]) -> list[int | None]:
  """Returns the tokens that each layer sees, None for all."""
  kind, num = hf['model_type'], len(turned)
  window = _positive(hf, 'sliding_window', whole=True)
  if kind not in _BY_LAYER:
    return [window] * num
  if kind != 'gemma2' and not hf.get('use_sliding_window'):
    return [None] * num
  types = hf.get('layer_types')
  if types is None:
    types = _default_types(hf, turned)
  if len(types) != num or {*types} - {_SLIDING, _FULL}:
    raise ValueError(
      f'layer_types={types!r} in the config; it is {_SLIDING} or {_FULL} for '
      f'each of the {num} layers.'
    )
  if window is None and kind == 'gemma2' and _SLIDING in types:
    raise ValueError(
      'sliding_window=None in the config, and some of layer_types are '
      f'{_SLIDING}. Set the number of tokens, or the layers to {_FULL}.'
    )
  return [window if name == _SLIDING else None for name in types]


def _default_types(hf: Hf, turned: Sequence[bool]) -> list[str]:
  num = len(turned)
  slides = {
    'gemma2': lambda i: i % 2 == 0,
    'smollm3': lambda i: not turned[i],
  }.get(hf['model_type'], lambda i: i >= hf.get('max_window_layers', 28))
  return [_SLIDING if slides(i) else _FULL for i in range(num)]


def _positive(hf: Hf, name: str, whole: bool = False) -> Any:
  """Returns a setting that is a number above 0, or None."""
  value = hf.get(name)
  number = int if whole else int | float
  fits = isinstance(value, number) and not isinstance(value, bool) and value > 0
  if value is None or fits:
    return value
  what = 'whole number' if whole else 'number'
  raise ValueError(f'{name}={value!r} in the config; it is a {what} above 0.')


# --- To a config.json. ---


def family_of(config: Config) -> str:
  """Returns the family, or the nearest, that computes a decoder.

  Args:
    config: with rotary positions and a plain feed-forward layer.
  """
  kinds = config.kinds
  rotary = config.position
  assert isinstance(rotary, position.Rotary)
  if config.residual == 'sandwich':
    return 'gemma2'
  if getattr(config.norm, 'unit_offset', False):
    return 'gemma'
  if not all(kind.rotary for kind in kinds):
    return 'smollm3'
  if kinds[0].qk_norm:
    return 'qwen3'
  if kinds[0].bias and not kinds[0].has_out_bias:
    return 'qwen2'
  if rotary.fraction != 1.0:
    return 'phi3'
  windows = any(isinstance(kind, attention.Local) for kind in kinds)
  return 'mistral' if windows else 'llama'


def written(config: Config, hf: Hf) -> dict[str, Any]:
  """Returns the config.json of a family.

  Args:
    config: of the model.
    hf: Llama's config.json of it.
  """
  kind = family_of(config)
  if kind == 'llama':
    return dict(hf)
  # Their classes' own ids may lie past the vocabulary.
  ids = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))
  result = {
    **hf,
    'model_type': kind,
    'architectures': [f'{_CLASSES[kind]}ForCausalLM'],
    **ids,
    **_window_settings(kind, config),
  }
  if kind in ('mistral', 'qwen2', 'phi3'):
    del result['attention_bias']
  if kind != 'smollm3':
    del result['mlp_bias']
  if kind == 'phi3':
    rotary: Any = config.position
    result |= {'partial_rotary_factor': rotary.fraction}
    result |= {'resid_pdrop': config.dropout}
  if kind in ('gemma', 'gemma2'):
    act = result.pop('hidden_act')
    act = 'gelu_pytorch_tanh' if act == 'gelu_new' else act
    result['hidden_act' if kind == 'gemma' else 'hidden_activation'] = act
  if kind == 'gemma2':
    result |= _caps(config)
  return result


def _caps(config: Config) -> dict[str, Any]:
  heads: Any = config.kinds[0]
  scalar = heads.head_dim if heads.scale is None else heads.scale**-2
  return {
    'query_pre_attn_scalar': round(scalar),
    'attn_logit_softcapping': heads.soft_cap,
    'final_logit_softcapping': config.logit_soft_cap,
  }


def _window_settings(kind: str, config: Config) -> dict[str, Any]:
  """Returns what says how far each layer sees."""
  num, kinds = config.num_layers, config.kinds
  layers = [kinds[i % len(kinds)] for i in range(num)]
  windows = [getattr(layer, 'window', None) for layer in layers]
  window = next((w for w in windows if w is not None), None)
  if kind == 'gemma':
    return {}
  result: dict[str, Any] = {'sliding_window': window}
  if kind not in _BY_LAYER:
    return result
  types = [_FULL if w is None else _SLIDING for w in windows]
  result |= {'layer_types': types}
  if kind == 'gemma2':  # It asks for a number even where no layer slides.
    return result | {'sliding_window': window or 4096}
  first = types.index(_SLIDING) if _SLIDING in types else num
  result |= {'use_sliding_window': window is not None}
  if kind == 'smollm3':
    return result | {'no_rope_layers': [int(k.rotary) for k in layers]}
  return result | {'max_window_layers': first}
