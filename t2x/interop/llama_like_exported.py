"""Writes the config.json of decoder families that resemble Llama.

This is the inverse of llama_like.py.
"""

from typing import Any

from t2x.interop import llama_like
from t2x.layers import attention_config
from t2x.layers import position

Hf = llama_like.Hf
Config = llama_like.Config

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
  """Returns the family that computes a decoder, or the nearest one.

  Args:
    config: config with rotary positions and a feed-forward layer without
      experts.
  """
  layers = config.kinds
  rotary = config.position
  assert isinstance(rotary, position.Rotary)
  if config.residual == 'sandwich':
    return 'gemma2'
  if config.norm.unit_offset:
    return 'gemma'
  if not all(layer.rotary for layer in layers):
    return 'smollm3'
  if layers[0].qk_norm:
    return 'qwen3'
  if layers[0].bias and not layers[0].has_out_bias:
    return 'qwen2'
  if rotary.fraction != 1.0:
    return 'phi3'
  windows = any(isinstance(layer, attention_config.Local) for layer in layers)
  return 'mistral' if windows else 'llama'


def config_json(config: Config, hf: Hf) -> dict[str, Any]:
  """Returns the config.json of a decoder, for its family.

  Args:
    config: config of the model.
    hf: config.json of the model as a Llama.
  """
  family = family_of(config)
  if family == 'llama':
    return dict(hf)
  # The default ids of these classes may be outside the vocabulary.
  ids = dict.fromkeys(('bos_token_id', 'eos_token_id', 'pad_token_id'))
  result = {
    **hf,
    'model_type': family,
    'architectures': [f'{_CLASSES[family]}ForCausalLM'],
    **ids,
    **_window_settings(family, config),
  }
  if family in ('mistral', 'qwen2', 'phi3'):
    del result['attention_bias']
  if family != 'smollm3':
    del result['mlp_bias']
  if family == 'phi3':
    rotary: Any = config.position
    result |= {'partial_rotary_factor': rotary.fraction}
    result |= {'resid_pdrop': config.dropout}
  if family in ('gemma', 'gemma2'):
    act = result.pop('hidden_act')
    act = 'gelu_pytorch_tanh' if act == 'gelu_new' else act
    result['hidden_act' if family == 'gemma' else 'hidden_activation'] = act
  if family == 'gemma2':
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


def _window_settings(family: str, config: Config) -> dict[str, Any]:
  """Returns the entries of a config.json for the layers' sliding windows."""
  num, group = config.num_layers, config.kinds
  layers = [group[i % len(group)] for i in range(num)]
  windows = [getattr(layer, 'window', None) for layer in layers]
  window = next((w for w in windows if w is not None), None)
  if family == 'gemma':
    return {}
  result: dict[str, Any] = {'sliding_window': window}
  if family not in llama_like.BY_LAYER:
    return result
  types = [
    llama_like.FULL if w is None else llama_like.SLIDING for w in windows
  ]
  result |= {'layer_types': types}
  if family == 'gemma2':  # It needs a number even if no layer has a window.
    return result | {'sliding_window': window or 4096}
  first = (
    types.index(llama_like.SLIDING) if llama_like.SLIDING in types else num
  )
  result |= {'use_sliding_window': window is not None}
  if family == 'smollm3':
    return result | {'no_rope_layers': [int(layer.rotary) for layer in layers]}
  return result | {'max_window_layers': first}
