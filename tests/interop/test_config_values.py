"""Malformed config.json: a model, or one line that names key and value."""

import functools
import json

import extras
import pytest

from t2x.interop import configs
from t2x.interop import exported
from t2x.interop import generation_config
from t2x.interop import llama_like
from t2x.models import presets

ABSENT = object()
VALUES = (
  ABSENT, None, 'text', '768', '', [], [1], ['a'], {}, {'a': 1}, -1, 0, 1, 3, 7,
  True, False, 10**12, 10**30, 1.5, 0.5, float('nan'), float('inf'),
)  # fmt: skip
ROPE = {
  'rope_type': 'llama3',
  'rope_theta': 1000.0,
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
PRESETS = (
  'bert_large', 'roberta_base', 'gpt2_xl', 't5_3b', 't5_v1_1_base',
  'llama2_70b', 'mixtral_8x7b',
)  # fmt: skip


def changed(data, key, value):
  rest = {k: v for k, v in data.items() if k != key}
  return rest if value is ABSENT else {**rest, key: value}


def outcome(fn, key):
  """Returns whether it works; what it raises is one line with the key."""
  try:
    fn()
    return True
  except ValueError as error:
    assert '\n' not in str(error) and len(str(error)) < 250
    assert key in str(error), (key, str(error))
    return False


def json_of(name):
  """Returns the config.json of a preset, or of a family of decoders."""
  if name in PRESETS:
    return exported.from_t2x(getattr(presets, name)())[1]
  own = {
    'model_type': name, 'head_dim': 8, 'num_key_value_heads': 8,
    'layer_types': ['full_attention'] * 32, 'use_sliding_window': True,
    'sliding_window': 16, 'query_pre_attn_scalar': 8,
    'final_logit_softcapping': 30.0, 'attn_logit_softcapping': 50.0,
    'hidden_activation': 'gelu_pytorch_tanh', 'no_rope_layers': [1] * 32,
    'resid_pdrop': 0.0, 'max_window_layers': 3,
  }  # fmt: skip
  return {**exported.from_t2x(presets.llama2_7b())[1], **own}


@pytest.mark.parametrize('name', (*PRESETS, *llama_like.NAMES))
def test_each_value_of_a_config(name):
  hf = json_of(name)
  results = {}
  for key in (*hf, 'rope_parameters', 'n_inner', 'num_decoder_layers'):
    for place, value in enumerate(VALUES):
      spoilt = changed(hf, key, value)
      read = functools.partial(configs.to_t2x, spoilt)
      results[key, place] = outcome(read, key)
  assert not results['vocab_size', 3]  # '768'
  assert results['vocab_size', VALUES.index(7)]
  print(name, len(results), sum(results.values()))
  assert 0 < sum(results.values()) < len(results)


@pytest.mark.parametrize('outer', ['rope_parameters', 'rope_scaling'])
def test_each_value_of_what_turns_positions(outer):
  hf = exported.from_t2x(presets.llama2_7b())[1]
  results = []
  for key in (*ROPE, 'type', 'partial_rotary_factor'):
    for value in VALUES:
      spoilt = {**hf, outer: changed(ROPE, key, value)}
      read = functools.partial(configs.to_t2x, spoilt)
      results.append(outcome(read, outer))
  assert 0 < sum(results) < len(results)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'rope_scaling': 'linear'}, "rope_scaling='linear'; it must be an object"),
    ({'rope_scaling': {'factor': 2.0}}, r'names no rope_type'),
    ({'rope_scaling': {'type': 'yarn'}}, "rope_type='yarn'; t2x has default"),
    ({'hidden_size': '4096'}, "hidden_size='4096'; it must be a whole number"),
    ({'hidden_size': 4099, 'head_dim': None}, 'is no multiple of num_att'),
    ({'num_key_value_heads': 5}, 'num_attention_heads=32 is no multiple of'),
    ({'rope_scaling': {'type': 'llama3'}}, 'rope_scaling lacks factor, low_f'),
    ({'num_attention_heads': 0}, 'num_attention_heads=0; it must be'),
    ({'model_type': ['llama']}, r"model_type=\['llama'\]; t2x reads bert"),
  ],
)
def test_what_is_wrong_with_a_llama(change, message):
  hf = exported.from_t2x(presets.llama2_7b())[1]
  with pytest.raises(ValueError, match=message):
    configs.to_t2x({**hf, **change})


def test_a_padding_that_is_left_open():
  hf = exported.from_t2x(presets.roberta_base())[1]
  with pytest.raises(ValueError, match='pad_token_id=None; it must be a whole'):
    configs.to_t2x({**hf, 'pad_token_id': None})
  llama = exported.from_t2x(presets.llama2_7b())[1]
  hf = {**llama, 'pad_token_id': None, 'rope_scaling': None}
  assert configs.to_t2x(hf) == configs.to_t2x(llama)
  found = generation_config.read(None, hf, vocab_size=50)
  assert found == generation_config.GenerationConfig()


GENERATION = {
  'eos_token_id': [1, 2],
  'bos_token_id': 1,
  'pad_token_id': 0,
  'decoder_start_token_id': 3,
  'forced_bos_token_id': 4,
  'suppress_tokens': [5],
  'begin_suppress_tokens': [6],
  'bad_words_ids': [[7, 8]],
  'do_sample': True,
  'temperature': 0.7,
  'top_k': 5,
  'top_p': 0.9,
  'min_p': 0.1,
  'typical_p': 0.5,
  'repetition_penalty': 1.2,
  'min_new_tokens': 2,
  'length_penalty': 2.0,
  'early_stopping': True,
}
NAMED = ('num_beams', 'no_repeat_ngram_size', 'max_length', 'unknown_setting')


@pytest.mark.parametrize('answers', [False, True])
@pytest.mark.parametrize('own', [True, False])
def test_each_value_of_what_speaks_of_texts(own, answers):
  results = []
  for key in (*GENERATION, *NAMED):
    for value in (*VALUES, [[1]], [[]], [[10**12]], [True], [-1]):
      spoilt = changed(GENERATION, key, value)
      file = 'generation_config.json: ' if own else 'config.json: '
      files = (spoilt, {}) if own else (None, spoilt)
      read = functools.partial(
        generation_config.read, *files, vocab_size=50, answers=answers
      )
      results.append(outcome(read, f'{file}{key}'))
  assert 0 < sum(results) < len(results)


def test_what_is_not_honoured_is_named():
  given = {
    'num_beams': 4, 'no_repeat_ngram_size': 3, 'max_length': 20,
    'forced_eos_token_id': 1, 'stop_strings': ['.'], 'unknown_setting': [1, 2],
    'use_cache': True, 'num_return_sequences': 1, 'temperature': 0.6,
    'guidance_scale': None, 'transformers_version': '5.0', 'top_p': 1.0,
  }  # fmt: skip
  found = generation_config.read(given, {}, vocab_size=9)
  assert found.ignored == (
    'temperature=0.6', 'num_beams=4', 'no_repeat_ngram_size=3', 'max_length=20',
    'forced_eos_token_id=1', "stop_strings=['.']", 'unknown_setting=[1, 2]',
  )  # fmt: skip
  drawn = {**given, 'do_sample': True, 'forced_bos_token_id': 1}
  found = generation_config.read(drawn, {}, vocab_size=9)
  assert found.sampling == {'temperature': 0.6}
  assert 'forced_bos_token_id=1' in found.ignored
  assert found.first is None


def test_every_setting_of_transformers_is_known():
  """A new one is honoured, named, or known to change no text."""
  transformers = extras.need('transformers', extra='reference')
  names = set(vars(transformers.GenerationConfig()))
  names = {name for name in names if not name.startswith('_')}
  known = generation_config._HONOURED | set(generation_config._IGNORED)
  assert names - known - generation_config._NO_TEXT <= {
    'transformers_version', 'continuous_batching_config',
  }  # fmt: skip
  one = json.loads(transformers.GenerationConfig().to_json_string())
  assert generation_config.read(one, {}, vocab_size=9).ignored == ()
