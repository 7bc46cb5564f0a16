"""Translates a config of t2x to a config.json of Hugging Face.

This is the inverse of configs.py.

>>> from t2x.models import presets
>>> family, hf = from_t2x(presets.gpt2_small())
>>> family, hf['n_embd']
('gpt2', 768)
"""

import dataclasses
from typing import Any

from t2x.config import overrides
from t2x.interop import configs
from t2x.interop import labels as labels_lib
from t2x.interop import llama_like
from t2x.interop import llama_like_exported
from t2x.layers import moe
from t2x.layers import position
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import model as model_lib

_ACTIVATIONS = {
  'relu': 'relu',
  'gelu': 'gelu',
  'gelu_tanh': 'gelu_new',
  'silu': 'silu',
}
# Settings that do not change the outputs of a trained model.
_NEUTRAL = ('dropout', 'kernel', 'block', 'vocab_multiple', 'dtype', 'std')
# Heads that a checkpoint has if it has their weights.
_PARTS = ('pooler', 'next_sentence', 'masked_head')


def from_t2x(config: model_lib.ModelConfig) -> tuple[str, dict[str, Any]]:
  """Translates a model's config.

  Args:
    config: config of a model that one of Hugging Face's families can compute.

  Returns:
    The family, a key of `tables.FAMILIES`, and the contents of a config.json.

  Raises:
    ValueError: the nearest family computes something else; the message names
      every setting that it lacks.
  """
  config = _plain(config)
  if isinstance(config, encoder.EncoderConfig):
    hf = _bert(config)
  elif isinstance(config, encoder_decoder.EncoderDecoderConfig):
    hf = _t5(config)
  elif isinstance(config.position, position.Rotary):
    hf = _llama(config)
  else:
    hf = _gpt2(config)
  family, again = configs.to_t2x(hf)
  lacking = {
    name: pair
    for name, pair in overrides.differences(
      overrides.to_json(config), overrides.to_json(again)
    ).items()
    if name.rpartition('.')[2] not in (*_NEUTRAL, *_PARTS)
    and not name.startswith('init')
  }
  if lacking:
    of_kind = {n.removesuffix('kind') for n in lacking if n.endswith('.kind')}
    lacking = {
      name: (ours, theirs)
      for name, (ours, theirs) in lacking.items()
      # If the class of a part differs, its fields are not listed.
      if name.endswith('.kind') or not name.startswith(tuple(of_kind))
    }
    settings = [
      f'model.{name}={ours!r} (there {theirs!r})'
      for name, (ours, theirs) in lacking.items()
    ]
    raise ValueError(
      f'No class of Hugging Face computes this model; the nearest is {family}, '
      f'which lacks {", ".join(settings)}.'
    )
  return family, hf


def same(config: model_lib.ModelConfig, hf: configs.Hf) -> bool:
  """Whether a config.json describes exactly the model of `config`.

  Args:
    config: config of the model.
    hf: config.json of a family that `configs.to_t2x` reads.
  """
  head = ['lm_head.weight'] if config.tied_head == 'untied' else []
  again = configs.to_t2x(hf)[1]
  if isinstance(config, encoder_decoder.EncoderDecoderConfig):
    again = configs.with_parts(again, head)
  ours, theirs = map(overrides.to_json, (config, again))
  return not set(overrides.differences(ours, theirs)) - set(_PARTS)


def _plain(config: model_lib.ModelConfig) -> model_lib.ModelConfig:
  """Returns an equivalent config in the form that `configs.to_t2x` gives."""

  def plain(layer: Any) -> Any:
    change: dict[str, Any] = {}
    if layer.num_kv_heads == layer.num_heads:
      change |= {'num_kv_heads': None}
    if layer.out_bias == layer.bias:
      change |= {'out_bias': None}
    if not layer.qk_norm:
      change |= {'qk_norm_eps': 1e-6}
    return dataclasses.replace(layer, **change)

  if not isinstance(config, decoder.DecoderConfig):
    return dataclasses.replace(
      config,
      attention=plain(config.attention),
      attention_pattern=tuple(map(plain, config.attention_pattern)),
    )
  group = [plain(layer) for layer in config.kinds]
  layers = [group[i % len(group)] for i in range(config.num_layers)]
  return llama_like.with_layers(config, layers)


def _bert(config: encoder.EncoderConfig) -> dict[str, Any]:
  place = config.position
  offset = place.offset if isinstance(place, position.Learned) else 0
  length = place.max_length if isinstance(place, position.Learned) else 512
  prefix = 'Roberta' if offset else 'Bert'
  suffix = 'ForMaskedLM' if config.masked_head else 'Model'
  suffix = 'ForPreTraining' if config.next_sentence else suffix
  suffix, label_settings = labels_lib.class_and_labels(config, suffix)
  return {
    'model_type': prefix.lower(),
    'architectures': [prefix + suffix],
    **label_settings,
    **({'pad_token_id': offset - 1} if offset else {}),
    'vocab_size': config.vocab_size,
    'num_hidden_layers': config.num_layers,
    'hidden_size': config.embed_dim,
    'num_attention_heads': _heads(config),
    'intermediate_size': config.mlp.hidden,
    'hidden_act': _ACTIVATIONS.get(config.mlp.activation, 'gelu'),
    'layer_norm_eps': config.norm.eps,
    'max_position_embeddings': length + offset,
    'type_vocab_size': config.num_token_types,
    'initializer_range': config.init.std,
    'hidden_dropout_prob': config.dropout,
    'attention_probs_dropout_prob': _dropout(config),
  }


def _gpt2(config: decoder.DecoderConfig) -> dict[str, Any]:
  return {
    'model_type': 'gpt2',
    'architectures': ['GPT2LMHeadModel'],
    'vocab_size': config.vocab_size,
    'n_layer': config.num_layers,
    'n_embd': config.embed_dim,
    'n_head': _heads(config),
    'n_inner': config.mlp.hidden,
    'n_positions': config.max_length or 1024,
    'activation_function': _ACTIVATIONS.get(config.mlp.activation, 'gelu_new'),
    'layer_norm_epsilon': config.norm.eps,
    'initializer_range': config.init.std,
    'resid_pdrop': config.dropout,
    'embd_pdrop': config.dropout,
    'attn_pdrop': _dropout(config),
  }


def _t5(config: encoder_decoder.EncoderDecoderConfig) -> dict[str, Any]:
  gated = config.mlp.gated
  act = _ACTIVATIONS.get(config.mlp.activation, 'relu')
  # T5's 'gated-gelu' is the tanh approximation.
  act = 'gelu' if act == 'gelu_new' and gated else act
  place = config.position
  buckets = isinstance(place, position.RelativeBuckets)
  return {
    'model_type': 't5',
    'architectures': ['T5ForConditionalGeneration'],
    'is_encoder_decoder': True,
    'decoder_start_token_id': 0,
    'vocab_size': config.vocab_size,
    'num_layers': config.num_encoder_layers or config.num_layers,
    'num_decoder_layers': config.num_layers,
    'd_model': config.embed_dim,
    'd_kv': config.attention.head_dim,
    'd_ff': config.mlp.hidden,
    'num_heads': config.attention.num_heads,
    'feed_forward_proj': f'gated-{act}' if gated else act,
    'layer_norm_epsilon': config.norm.eps,
    'relative_attention_num_buckets': place.num_buckets if buckets else 32,
    'relative_attention_max_distance': place.max_distance if buckets else 128,
    'dropout_rate': config.dropout,
    'tie_word_embeddings': config.tied_head != 'untied',
    'scale_decoder_outputs': config.tied_head == 'tied_scaled',
  }


def _llama(config: decoder.DecoderConfig) -> dict[str, Any]:
  heads = config.attention
  rotary = config.position
  assert isinstance(rotary, position.Rotary)
  hf = {
    'model_type': 'llama',
    'architectures': ['LlamaForCausalLM'],
    'vocab_size': config.vocab_size,
    'num_hidden_layers': config.num_layers,
    'hidden_size': config.embed_dim,
    'num_attention_heads': heads.num_heads,
    'num_key_value_heads': heads.num_kv_heads or heads.num_heads,
    'head_dim': heads.head_dim,
    'intermediate_size': config.mlp.hidden,
    'hidden_act': _ACTIVATIONS.get(config.mlp.activation, 'silu'),
    'attention_bias': heads.bias,
    'mlp_bias': False,
    'rms_norm_eps': config.norm.eps,
    'rope_theta': rotary.base,
    'rope_scaling': _scaling(rotary.scaling),
    'max_position_embeddings': 2048,
    'initializer_range': config.init.std,
    'attention_dropout': _dropout(config),
    'tie_word_embeddings': config.tied_head == 'tied',
  }
  if isinstance(config.mlp, moe.MoeConfig):
    hf |= {
      'model_type': 'mixtral',
      'architectures': ['MixtralForCausalLM'],
      'num_local_experts': config.mlp.num_experts,
      'num_experts_per_tok': max(getattr(config.mlp.router, 'top_k', 2), 2),
      'router_aux_loss_coef': getattr(config.mlp.router, 'balance_loss', 0.0),
      'sliding_window': None,
    }
    return hf
  return llama_like_exported.config_json(config, hf)


def _heads(config: model_lib.ModelConfig) -> int:
  """Returns the divisor of the width nearest to the number of heads."""
  wanted, width = config.attention.num_heads, config.embed_dim
  fits = [num for num in range(1, width + 1) if not width % num]
  return min(fits, key=lambda num: abs(num - wanted))


def _scaling(scaling: position.Llama3Scaling | None) -> dict[str, Any] | None:
  if scaling is None:
    return None
  return {
    'rope_type': 'llama3',
    'factor': scaling.factor,
    'low_freq_factor': scaling.low_frequency_factor,
    'high_freq_factor': scaling.high_frequency_factor,
    'original_max_position_embeddings': scaling.original_length,
  }


def _dropout(config: model_lib.ModelConfig) -> float:
  return config.attention.dropout
