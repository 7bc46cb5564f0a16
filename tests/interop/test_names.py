"""Names and configs of Hugging Face, where no other library is needed."""

import dataclasses

from flax import nnx
import jax
import numpy as np
import pytest

from t2x.interop import configs
from t2x.interop import names
from t2x.models import model as model_lib
from t2x.models import presets

GPT2 = dict(
  model_type='gpt2',
  vocab_size=9,
  n_embd=8,
  n_layer=2,
  n_head=2,
  n_positions=4,
)


@pytest.fixture(scope='module')
def gpt2():
  family, config = configs.to_t2x(GPT2)
  model = model_lib.make(config, rngs=nnx.Rngs(0))
  return config, model, names.from_t2x(family, config, model)


def test_round_trip_drops_and_restores_padding(gpt2):
  config, model, tensors = gpt2
  assert tensors['transformer.wte.weight'].shape == (9, 8)
  again = names.to_t2x('gpt2', config, tensors)
  table = np.asarray(again.embeddings.tokens.table_VD[...])
  assert table.shape == (128, 8)
  np.testing.assert_array_equal(table[9:], 0)
  np.testing.assert_array_equal(table[:9], model.embeddings.tokens.table_VD[:9])
  jax.tree.map(np.testing.assert_array_equal, again.tower, model.tower)


def test_all_problems_come_in_one_message(gpt2):
  config, _, tensors = gpt2
  tensors = dict(tensors)
  del tensors['transformer.h.1.ln_2.bias']
  del tensors['transformer.wpe.weight']
  tensors['score.weight'] = np.zeros((2, 8), np.float32)
  tensors['transformer.ln_f.weight'] = np.zeros((7,), np.float32)
  tensors['lm_head.weight'] = tensors['lm_head.weight'] + 1
  with pytest.raises(ValueError) as error:
    names.to_t2x('gpt2', config, tensors)
  for text in (
    'Missing: transformer.wpe.weight, transformer.h.1.ln_2.bias.',
    'Unexpected: score.weight.',
    'transformer.ln_f.weight has (7,), not (8,)',
    'different: lm_head.weight and transformer.wte.weight',
  ):
    assert text in str(error.value)


def test_a_checkpoint_with_another_vocabulary_is_refused(gpt2):
  config, _, tensors = gpt2
  config = dataclasses.replace(config, vocab_size=10)
  with pytest.raises(ValueError, match=r'wte.weight has \(9, 8\), not \(10,'):
    names.to_t2x('gpt2', config, tensors)


def test_mask_buffers_are_ignored_but_biases_are_not(gpt2):
  config, _, tensors = gpt2
  buffer = {'transformer.h.0.attn.bias': np.ones((1, 1, 4, 4), bool)}
  names.to_t2x('gpt2', config, {**tensors, **buffer})
  lacking = dict(tensors)
  del lacking['transformer.h.0.attn.c_attn.bias']
  with pytest.raises(ValueError, match='Missing: .*c_attn.bias'):
    names.to_t2x('gpt2', config, lacking)


def test_first_names_of_norms(gpt2):
  config, model, tensors = gpt2
  old = {
    k.replace('ln_f.weight', 'ln_f.gamma').replace('ln_f.bias', 'ln_f.beta'): v
    for k, v in tensors.items()
  }
  assert 'transformer.ln_f.gamma' in old
  again = names.to_t2x('gpt2', config, old)
  jax.tree.map(np.testing.assert_array_equal, again.tower, model.tower)


def test_a_tied_weight_may_stand_under_its_copys_name_only(gpt2):
  config, _, tensors = gpt2
  tensors = dict(tensors)
  table = tensors.pop('transformer.wte.weight')
  again = names.to_t2x('gpt2', config, tensors)
  np.testing.assert_array_equal(again.embeddings.tokens.table_VD[:9], table)


def test_half_precision_becomes_float32(gpt2):
  config, _, tensors = gpt2
  half = {k: v.astype(np.float16) for k, v in tensors.items()}
  model = names.to_t2x('gpt2', config, half)
  assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {
    np.dtype('float32')
  }


def test_messages(gpt2):
  config, model, _ = gpt2
  with pytest.raises(ValueError, match="family 'gpt3'; known: bert, roberta"):
    names.from_t2x('gpt3', config, model)
  with pytest.raises(ValueError, match='does not know: .*attention.o_bias_D'):
    names.from_t2x('t5', config, model)
  with pytest.raises(ValueError, match="model_type='mamba'; t2x reads bert"):
    configs.to_t2x({'model_type': 'mamba'})
  with pytest.raises(ValueError, match='scale_attn_weights=False'):
    configs.to_t2x({**GPT2, 'scale_attn_weights': False})
  with pytest.raises(
    ValueError, match="activation_function='mish'; it must be"
  ):
    configs.to_t2x({**GPT2, 'activation_function': 'mish'})


def llama2_json(rope):
  return dict(
    model_type='llama',
    vocab_size=32000,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    tie_word_embeddings=False,
    **rope,
  )


def test_a_released_config_is_the_preset():
  family, config = configs.to_t2x(llama2_json({}))
  expected = presets.llama2_70b()
  assert (family, config) == ('llama', expected)


def test_rotary_in_its_old_and_new_spelling():
  scaling = dict(
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
    rope_type='llama3',
  )
  old = llama2_json(dict(rope_theta=5e5, rope_scaling=scaling))
  new = llama2_json(dict(rope_parameters={'rope_theta': 5e5, **scaling}))
  rotary = configs.to_t2x(old)[1].position
  assert rotary == configs.to_t2x(new)[1].position
  assert (rotary.base, rotary.scaling.factor) == (5e5, 8.0)
  yarn = llama2_json(dict(rope_scaling={'type': 'yarn', 'factor': 2.0}))
  with pytest.raises(ValueError, match="rope_type='yarn'"):
    configs.to_t2x(yarn)
