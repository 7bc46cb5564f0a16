"""To the config.json of decoders that are like Llama: the way back."""

from collections.abc import Mapping
from typing import Any

from t2x.interop import llama_like
from t2x.layers import attention_config
from t2x.layers import position
from t2x.models import decoder

Hf = Mapping[str, Any]
Config = decoder.DecoderConfig

_CLASSES = {
  'mistral': 'Mistral',
  'qwen2': 'Qwen2',
  'qwen3': 'Qwen3',
  'gemma': 'Gemma',
  'gemma2': 'Gemma2',
  'phi3': 'Phi3',
  'smollm3': 'SmolLM3',
}


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
  windows = any(isinstance(kind, attention_config.Local) for kind in kinds)
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
  if kind not in llama_like.BY_LAYER:
    return result
  types = [
    llama_like.FULL if w is None else llama_like.SLIDING for w in windows
  ]
  result |= {'layer_types': types}
  if kind == 'gemma2':  # It asks for a number even where no layer slides.
    return result | {'sliding_window': window or 4096}
  first = (
    types.index(llama_like.SLIDING) if llama_like.SLIDING in types else num
  )
  result |= {'use_sliding_window': window is not None}
  if kind == 'smollm3':
    return result | {'no_rope_layers': [int(k.rotary) for k in layers]}
  return result | {'max_window_layers': first}
