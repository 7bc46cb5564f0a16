"""Checks that each value of a config.json has the type and range of its key.

The checks hold for all families; each family reads the keys that it has.
"""

from collections.abc import Mapping

from t2x.interop import values

_LAYERS = (
  'num_hidden_layers',
  'n_layer',
  'num_layers',
)
# Sizes: whole numbers above 0.
_SIZES = (
  'vocab_size',
  'hidden_size',
  'num_attention_heads',
  'intermediate_size',
  'max_position_embeddings',
  'n_embd',
  'n_head',
  'n_positions',
  'd_model',
  'd_kv',
  'd_ff',
  'num_heads',
  'relative_attention_max_distance',
)
# Sizes too, but null where the value follows from others.
_OPTIONAL = (
  'num_decoder_layers',
  'num_key_value_heads',
  'head_dim',
  'n_inner',
  'sliding_window',
)
_OPEN = ('architectures', 'hidden_activation')
_COUNTS = ('type_vocab_size',)
_RATES = (
  'attention_probs_dropout_prob',
  'hidden_dropout_prob',
  'attn_pdrop',
  'resid_pdrop',
  'embd_pdrop',
  'dropout_rate',
  'attention_dropout',
)
_POSITIVE = (
  'layer_norm_eps',
  'layer_norm_epsilon',
  'rms_norm_eps',
  'rope_theta',
)
_CAPS = (
  'final_logit_softcapping',
  'attn_logit_softcapping',
  'query_pre_attn_scalar',
)
_NUMBERS = ('initializer_range', 'router_aux_loss_coef')
_FLAGS = (
  'tie_word_embeddings',
  'scale_decoder_outputs',
  'attention_bias',
  'use_sliding_window',
)
_TEXTS = (
  'hidden_act',
  'hidden_activation',
  'activation_function',
  'feed_forward_proj',
)
_MAPPINGS = ('rope_parameters', 'rope_scaling')
LLAMA3 = (
  'factor',
  'low_freq_factor',
  'high_freq_factor',
  'original_max_position_embeddings',
)
_MOST_LAYERS = 10_000
_MOST_SIZE = 2**31


def check(hf: values.Hf) -> values.Hf:
  """Returns a config.json after checking its values.

  Raises:
    ValueError: a value has another type than its key, or is out of range.
  """
  may_be_open = (*_OPTIONAL, *_CAPS, *_MAPPINGS, *_OPEN)
  for key, value in hf.items():
    if value is not None or key not in may_be_open:
      _check(key, value, hf.get('model_type'))
  return hf


def rope(key: str, given: values.Hf) -> values.Hf:
  """Returns the parameters of rotary positions after checking them.

  Args:
    key: key of the parameters in the config.json, for errors.
    given: parameters, such as rope_type and factor.

  Raises:
    ValueError: a value has another type than its key, or is out of range.
  """
  for name, value in given.items():
    full = f'{key}: {name}'
    if name in ('type', 'rope_type') and not isinstance(value, str):
      raise values.Wrong(full, value, 'a text, such as llama3')
    if name in ('rope_theta', *LLAMA3):
      whole = name == 'original_max_position_embeddings'
      values.within(full, value, above=0, below=_MOST_SIZE, whole=whole)
    if name == 'partial_rotary_factor':
      values.within(full, value, above=0, below=1 + 1e-9)
  return given


def _check(key: str, value: object, model_type: object) -> None:
  if key in _LAYERS or key == 'num_decoder_layers':
    values.within(key, value, above=0, below=_MOST_LAYERS, whole=True)
  elif key == 'num_local_experts':
    values.within(key, value, above=1, below=_MOST_SIZE, whole=True)
  elif key == 'relative_attention_num_buckets':
    values.within(key, value, above=3, below=_MOST_SIZE, whole=True)
  elif key in (*_SIZES, *_OPTIONAL):
    values.within(key, value, above=0, below=_MOST_SIZE, whole=True)
  elif key in _COUNTS:
    values.within(key, value, above=-1, below=_MOST_SIZE, whole=True)
  elif key in _RATES:
    values.within(key, value, above=-1e-300, below=1)
  elif key in (*_POSITIVE, *_CAPS):
    values.within(key, value, above=0)
  elif key in _NUMBERS:
    values.within(key, value, above=-1e-300, below=1e6)
  elif key in _FLAGS and not isinstance(value, bool):
    raise values.Wrong(key, value, 'true or false')
  elif key in _TEXTS and not isinstance(value, str):
    raise values.Wrong(key, value, 'a text, the name of an activation')
  elif key in _MAPPINGS and not isinstance(value, Mapping):
    raise values.Wrong(key, value, 'an object with a rope_type, or null')
  elif key == 'architectures':
    if not isinstance(value, list) or not all(
      isinstance(name, str) for name in value
    ):
      raise values.Wrong(key, value, 'a list of names of classes')
  elif key == 'pad_token_id' and model_type == 'roberta':
    # RoBERTa's positions start after this id.
    values.within(key, value, above=-1, below=_MOST_SIZE, whole=True)
