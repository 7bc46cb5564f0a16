"""Prefix language modelling: what is seen, and what is predicted."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.models import decoder
from t2x.objectives import causal_lm
from t2x.objectives import noise
from t2x.objectives import prefix_lm
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib

ROWS, LENGTH = 300, 64
VOCAB = vocab_lib.Vocab(size=400)


def source():
  """Documents of 30 and 20 tokens, and padding."""
  tokens = np.random.default_rng(0).integers(105, 400, (ROWS, LENGTH + 1))
  segments = np.zeros((ROWS, LENGTH + 1), np.int32)
  segments[:, :30], segments[:, 30:50] = 1, 2
  return rows_lib.Rows((tokens * (segments > 0)).astype(np.int32), segments)


def examples(config, seed=0):
  keys = noise.keys(seed, np.arange(ROWS))
  return config.examples(source(), keys=keys, vocab=VOCAB, length=LENGTH)


def test_prefixes_are_of_all_lengths_and_predict_nothing():
  batch = examples(prefix_lm.PrefixLM())
  plain = examples(causal_lm.CausalLM())
  for name in ('inputs', 'targets', 'segments', 'positions'):
    np.testing.assert_array_equal(batch[name], plain[name])
  ends, weights = batch['prefix_ends'], batch['weights']
  for start, stop in ((0, 30), (30, 50)):
    own = ends[:, start:stop]
    assert (own == own[:, :1]).all()
    shares = (own[:, 0] - start) / (stop - start)
    assert shares.min() < 0.05 and shares.max() > 0.9
    assert shares.mean() == pytest.approx(0.5 - 0.5 / (stop - start), abs=0.07)
    for row in range(ROWS):
      place = np.arange(start, stop - 1)
      want = place >= own[row, 0] - 1
      np.testing.assert_array_equal(weights[row, start : stop - 1], want)
  assert not ends[:, 50:].any() and not weights[:, 49:].any()


def test_shares_are_those_that_are_asked_for():
  ends = examples(prefix_lm.PrefixLM(least=0.5, most=0.5))['prefix_ends']
  assert (ends[:, :30] == 15).all() and (ends[:, 30:50] == 40).all()
  whole = examples(prefix_lm.PrefixLM(least=0.0, most=0.0))
  plain = examples(causal_lm.CausalLM())
  np.testing.assert_array_equal(whole['weights'], plain['weights'])
  with pytest.raises(ValueError, match='least=0.7, most=0.2: shares from 0'):
    prefix_lm.PrefixLM(least=0.7, most=0.2)


def test_a_decoder_sees_the_prefix_and_nothing_that_it_predicts():
  config = decoder.DecoderConfig(
    vocab_size=400,
    num_layers=2,
    embed_dim=16,
    attention=attention_config.Dense(num_heads=2, head_dim=8),
    mlp=mlp.MlpConfig(hidden=16),
  )
  model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  batch = examples(prefix_lm.PrefixLM(least=0.4, most=0.4))
  names = ('inputs', 'segments', 'positions', 'prefix_ends')
  inputs = {name: jnp.asarray(batch[name][:2]) for name in names}
  run = jax.jit(lambda inputs: model.hidden(**inputs))
  before = run(inputs)

  def changed(place):
    ids = inputs['inputs']
    after = run({**inputs, 'inputs': ids.at[:, place].add(1)})
    return np.asarray((before != after).any((0, 2)))

  # The first document's prefix is 0 to 11, the second's 30 to 37.
  assert changed(11)[:30].all() and not changed(11)[30:].any()
  assert changed(20).nonzero()[0].tolist() == list(range(20, 30))
  assert changed(37).nonzero()[0].tolist() == list(range(30, 50))
  assert changed(45).nonzero()[0].tolist() == list(range(45, 50))
