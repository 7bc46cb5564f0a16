"""Translates a config.json of Hugging Face to a config of t2x.

>>> family, config = to_t2x({
...     'model_type': 'gpt2', 'vocab_size': 50257, 'n_embd': 768,
...     'n_layer': 12, 'n_head': 12, 'n_positions': 1024})
>>> family, config.embed_dim
('gpt2', 768)
"""

from collections.abc import Collection
import dataclasses
from typing import Any

from t2x.interop import checked
from t2x.interop import labels as labels_lib
from t2x.interop import llama_like
from t2x.interop import values
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import norm
from t2x.layers import param
from t2x.layers import position
from t2x.layers import routing
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import model

Hf = values.Hf

_ACTIVATIONS = {
  'relu': 'relu',
  'gelu': 'gelu',
  'gelu_new': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
  'silu': 'silu',
  'swish': 'silu',
}


def to_t2x(hf: Hf) -> tuple[str, model.ModelConfig]:
  """Translates a config.json.

  Args:
    hf: parsed config.json, whose `model_type` is bert, roberta, gpt2, t5,
      llama, mixtral or one of `llama_like.NAMES`.

  Returns:
    The family, a key of `tables.FAMILIES`, and the config.

  Raises:
    ValueError: the model is of another family, or has a setting that t2x does
      not have.
  """
  name = hf.get('model_type')
  if not isinstance(name, str) or name not in _TRANSLATIONS:
    raise ValueError(
      f'model_type={values.short_repr(name)}; t2x reads '
      f'{", ".join(_TRANSLATIONS)}.'
    )
  try:
    return _TRANSLATIONS[name](checked.check(hf))
  except KeyError as error:
    raise ValueError(
      f'The config.json lacks {error.args[0]!r}. Copy it again.'
    ) from None


def with_parts(
  config: model.ModelConfig, names: Collection[str]
) -> model.ModelConfig:
  """Returns the config with the heads that a checkpoint has weights of.

  Released files of BERT and RoBERTa hold more than their `architectures` name
  (a pooler, the next-sentence head), or the body alone. Those of T5 1.1 hold an
  untied head, which newer config.json files do not mention.

  Args:
    config: config from `to_t2x`.
    names: names of the checkpoint's weights.
  """
  if isinstance(config, encoder_decoder.EncoderDecoderConfig):
    untied = config.tied_head == 'tied' and 'lm_head.weight' in names
    return dataclasses.replace(config, tied_head='untied') if untied else config
  if not isinstance(config, encoder.EncoderConfig):
    return config
  has = lambda *ends: any(name.endswith(ends) for name in names)
  return dataclasses.replace(
    config,
    pooler=has('pooler.dense.weight') or bool(config.classes),
    next_sentence=has('cls.seq_relationship.weight'),
    masked_head=has(
      'cls.predictions.transform.dense.weight', 'lm_head.dense.weight'
    ),
  )


def _bert(hf: Hf) -> tuple[str, encoder.EncoderConfig]:
  _require(
    hf,
    position_embedding_type='absolute',
    is_decoder=False,
    add_cross_attention=False,
    tie_word_embeddings=True,
  )
  # RoBERTa's positions start at the row after that of the padding id.
  roberta = hf['model_type'] == 'roberta'
  offset = hf.get('pad_token_id', 1) + 1 if roberta else 0
  classes = ' '.join(hf.get('architectures') or ['ForPreTraining'])
  heads = labels_lib.sizes(hf)
  pretraining = 'ForPreTraining' in classes
  masked_head = 'ForMaskedLM' in classes or pretraining
  config = encoder.EncoderConfig(
    vocab_size=hf['vocab_size'],
    num_layers=hf['num_hidden_layers'],
    embed_dim=hf['hidden_size'],
    attention=attention_config.Dense(
      num_heads=hf['num_attention_heads'],
      head_dim=_share(hf, 'hidden_size', 'num_attention_heads'),
      bias=True,
      dropout=hf.get('attention_probs_dropout_prob', 0.1),
    ),
    mlp=mlp.MlpConfig(
      hidden=hf['intermediate_size'],
      activation=_activation(hf.get('hidden_act', 'gelu')),
    ),
    norm=norm.LayerNorm(eps=hf.get('layer_norm_eps', 1e-12)),
    residual='post_norm',
    position=position.Learned(
      max_length=values.within(
        'max_position_embeddings', hf['max_position_embeddings'], above=offset
      )
      - offset,
      std=hf.get('initializer_range', 0.02),
      offset=offset,
    ),
    init=param.Init(
      distribution='normal' if roberta else 'truncated_normal',
      std=hf.get('initializer_range', 0.02),
    ),
    dropout=hf.get('hidden_dropout_prob', 0.1),
    num_token_types=hf.get('type_vocab_size', 2),
    embed_norm=True,
    pooler=not masked_head or (pretraining and not roberta),
    next_sentence=pretraining and not roberta,
    masked_head=masked_head,
    **heads,
  )
  # RoBERTa's classification head has other names than the pooler.
  suffix = '_classes' if roberta and config.classes else ''
  return hf['model_type'] + suffix, config


def _gpt2(hf: Hf) -> tuple[str, decoder.DecoderConfig]:
  _require(
    hf,
    scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False,
    add_cross_attention=False,
    tie_word_embeddings=True,
  )
  std = hf.get('initializer_range', 0.02)
  config = decoder.DecoderConfig(
    vocab_size=hf['vocab_size'],
    num_layers=hf['n_layer'],
    embed_dim=hf['n_embd'],
    attention=attention_config.Dense(
      num_heads=hf['n_head'],
      head_dim=_share(hf, 'n_embd', 'n_head'),
      bias=True,
      dropout=hf.get('attn_pdrop', 0.1),
    ),
    mlp=mlp.MlpConfig(
      hidden=hf.get('n_inner') or 4 * hf['n_embd'],
      activation=_activation(
        hf.get('activation_function', 'gelu_new'), 'activation_function'
      ),
    ),
    norm=norm.LayerNorm(eps=hf.get('layer_norm_epsilon', 1e-5)),
    position=position.Learned(max_length=hf['n_positions'], std=std),
    init=param.Init(std=std, depth_scaled=True),
    dropout=hf.get('resid_pdrop', 0.1),
  )
  return 'gpt2', config


def _t5(hf: Hf) -> tuple[str, encoder_decoder.EncoderDecoderConfig]:
  given = hf.get('feed_forward_proj', 'relu')
  gated, _, act = given.rpartition('-')
  if gated not in ('', 'gated'):
    raise values.Wrong('feed_forward_proj', given, 'gated-NAME or NAME')
  # T5's 'gated-gelu' is the tanh approximation in all implementations.
  act = (
    'gelu_tanh'
    if given == 'gated-gelu'
    else _activation(act, 'feed_forward_proj')
  )
  tied = hf.get('tie_word_embeddings', True)
  # Newer files say only that the features are not scaled, and not whether the
  # head is tied; see `with_parts`.
  scaled = hf.get('scale_decoder_outputs', tied)
  if scaled and not tied:
    raise ValueError(
      'tie_word_embeddings=False and scale_decoder_outputs=True; t2x scales '
      'the features of a tied head alone.'
    )
  rate = hf.get('dropout_rate', 0.1)
  num_layers = hf.get('num_decoder_layers') or hf['num_layers']
  config = encoder_decoder.EncoderDecoderConfig(
    vocab_size=hf['vocab_size'],
    num_layers=num_layers,
    num_encoder_layers=(
      None if hf['num_layers'] == num_layers else hf['num_layers']
    ),
    embed_dim=hf['d_model'],
    attention=attention_config.Dense(
      num_heads=hf['num_heads'],
      head_dim=hf['d_kv'],
      scale=1.0,
      dropout=rate,
    ),
    mlp=mlp.MlpConfig(
      hidden=hf['d_ff'],
      activation=act,
      gated=bool(gated),
      bias=False,
      dropout=rate,
    ),
    norm=norm.RMSNorm(eps=hf.get('layer_norm_epsilon', 1e-6)),
    position=position.RelativeBuckets(
      num_buckets=hf.get('relative_attention_num_buckets', 32),
      max_distance=hf.get('relative_attention_max_distance', 128),
    ),
    init=param.Init(scale='fan_in', std=1.0, embed_std=1.0),
    dropout=rate,
    tied_head='tied_scaled' if scaled else 'tied' if tied else 'untied',
  )
  return 't5_v1_1' if gated else 't5', config


def _llama(hf: Hf) -> tuple[str, decoder.DecoderConfig]:
  _require(hf, mlp_bias=False)
  heads = hf['num_attention_heads']
  kv_heads = hf.get('num_key_value_heads') or heads
  _share(
    {**hf, 'num_key_value_heads': kv_heads},
    'num_attention_heads',
    'num_key_value_heads',
  )
  gemma2 = hf['model_type'] == 'gemma2'
  act = 'hidden_activation' if gemma2 else 'hidden_act'
  config = decoder.DecoderConfig(
    vocab_size=hf['vocab_size'],
    num_layers=hf['num_hidden_layers'],
    embed_dim=hf['hidden_size'],
    attention=attention_config.Dense(
      num_heads=heads,
      num_kv_heads=None if kv_heads == heads else kv_heads,
      head_dim=(
        hf.get('head_dim') or _share(hf, 'hidden_size', 'num_attention_heads')
      ),
      bias=hf.get('attention_bias', False),
      dropout=hf.get('attention_dropout', 0.0),
    ),
    mlp=mlp.MlpConfig(
      hidden=hf['intermediate_size'],
      activation=_activation(hf.get('hidden_act', 'silu'), act),
      gated=True,
      bias=False,
    ),
    norm=norm.RMSNorm(eps=hf.get('rms_norm_eps', 1e-6)),
    position=_rotary(hf),
    init=param.Init(std=hf.get('initializer_range', 0.02)),
    tied_head='tied' if hf.get('tie_word_embeddings') else 'untied',
  )
  return 'llama', config


def _like_llama(hf: Hf) -> tuple[str, decoder.DecoderConfig]:
  hf = llama_like.as_llama(hf)
  return hf['model_type'], llama_like.adapt_to_family(_llama(hf)[1], hf)


def _mixtral(hf: Hf) -> tuple[str, decoder.DecoderConfig]:
  _require(hf, sliding_window=None, router_jitter_noise=0.0)
  _, config = _llama({'rms_norm_eps': 1e-5, 'rope_theta': 1e6, **hf})
  num, key = hf.get('num_local_experts', 8), 'num_experts_per_tok'
  # With a single expert per token the router would get no gradient.
  top_k = values.within(key, hf.get(key, 2), above=1, below=num + 1, whole=True)
  experts = moe.MoeConfig(
    **dataclasses.asdict(config.mlp),
    num_experts=num,
    router=routing.TokenChoice(
      top_k=top_k,
      balance_loss=hf.get('router_aux_loss_coef', 0.001),
    ),
    z_loss=0.0,
  )
  return 'mixtral', dataclasses.replace(config, mlp=experts)


def _rotary(hf: Hf) -> position.Rotary:
  """Reads `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
  key = 'rope_parameters' if hf.get('rope_parameters') else 'rope_scaling'
  rope = checked.rope(key, hf.get(key) or {})
  share = rope.get('partial_rotary_factor', 1)
  if share != 1 and hf['model_type'] != 'phi3':
    raise values.Wrong(f'{key}: partial_rotary_factor', share, '1')
  base = rope.get('rope_theta') or hf.get('rope_theta', 10000.0)
  rope_type = rope.get('rope_type') or rope.get('type')
  if rope_type is None and 'factor' in rope:
    raise ValueError(
      f'{key}={values.short_repr(rope)} names no rope_type; t2x has default '
      'and llama3.'
    )
  if rope_type in (None, 'default'):
    return position.Rotary(base=base)
  if rope_type != 'llama3':
    raise ValueError(
      f'{key}: rope_type={rope_type!r}; t2x has default and llama3.'
    )
  lacking = [name for name in checked.LLAMA3 if name not in rope]
  if lacking:
    raise ValueError(f'{key} lacks {", ".join(lacking)}, which llama3 has.')
  scaling = position.Llama3Scaling(
    factor=rope['factor'],
    low_frequency_factor=rope['low_freq_factor'],
    high_frequency_factor=rope['high_freq_factor'],
    original_length=rope['original_max_position_embeddings'],
  )
  return position.Rotary(base=base, scaling=scaling)


def _share(hf: Hf, whole: str, parts: str) -> int:
  """Returns a setting divided by another, such as the width of a head.

  Raises:
    ValueError: the division has a remainder.
  """
  if hf[whole] % hf[parts]:
    raise ValueError(
      f'{whole}={hf[whole]} is no multiple of {parts}={hf[parts]}.'
    )
  return hf[whole] // hf[parts]


def _activation(name: str, key: str = 'hidden_act') -> Any:
  """Returns t2x's name of an activation."""
  if name not in _ACTIVATIONS:
    raise values.Wrong(key, name, f'one of {", ".join(_ACTIVATIONS)}')
  return _ACTIVATIONS[name]


def _require(hf: Hf, **only: object) -> None:
  """Raises ValueError if a setting is given and is not the one that t2x has."""
  for name, value in only.items():
    if hf.get(name, value) != value:
      raise ValueError(
        f'{name}={values.short_repr(hf[name])} in the config; t2x has only '
        f'{value!r}.'
      )


_TRANSLATIONS = {
  'bert': _bert,
  'roberta': _bert,
  'gpt2': _gpt2,
  't5': _t5,
  'llama': _llama,
  'mixtral': _mixtral,
  **dict.fromkeys(llama_like.NAMES, _like_llama),
}
