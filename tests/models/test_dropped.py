"""Tokens that are dropped from an encoder, and asked for by a second stack."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from t2x.config import consistency
from t2x.data import input_pipeline
from t2x.hlo import jaxpr_costs
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import position
from t2x.models import encoder
from t2x.models import flops
from t2x.objectives import masked_lm
from t2x.objectives import noise
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib
from t2x.training import train_state
from t2x.training import train_step

VOCAB, FIRST, ROWS, LENGTH = 200, 105, 5, 64
VOCABULARY = vocab_lib.Vocab(size=VOCAB)
CONFIG = encoder.EncoderConfig(
  vocab_size=VOCAB,
  vocab_multiple=8,
  num_layers=2,
  query_layers=1,
  embed_dim=32,
  attention=attention_config.Dense(num_heads=4, head_dim=8),
  mlp=mlp.MlpConfig(hidden=64),
  position=position.Learned(max_length=LENGTH),
)
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def source():
  """Two documents and padding in each row."""
  tokens = np.random.default_rng(0).integers(FIRST, VOCAB, (ROWS, LENGTH))
  segments = np.where(np.arange(LENGTH) < 30, 1, 2) * np.ones((ROWS, 1), int)
  tokens[:, [0, 30]], tokens[:, 29] = vocab_lib.BOS, vocab_lib.EOS
  for row in range(1, ROWS):
    tokens[row, LENGTH - row :], segments[row, LENGTH - row :] = 0, 0
  return rows_lib.Rows(tokens.astype(np.int32), segments.astype(np.int32))


def batch_of(rate=0.4, **settings):
  objective = masked_lm.MaskedLM(rate=rate, dropped=True, **settings)
  keys = noise.keys(0, np.arange(ROWS))
  batch = objective.examples(
    source(), keys=keys, vocab=VOCABULARY, length=LENGTH
  )
  assert {n: a.shape[1] for n, a in batch.items()} == objective.lengths(LENGTH)
  return batch


@pytest.mark.parametrize('rate', [0.15, 0.4, 0.8])
def test_a_row_is_what_is_left_and_what_is_asked_for(rate):
  tokens, segments = source()
  positions = rows_lib.positions(segments)
  batch = batch_of(rate)
  for row in range(ROWS):
    is_left, is_asked = batch['segments'][row] > 0, batch['weights'][row] > 0
    left = batch['places'][row][is_left]
    asked = batch['query_places'][row][is_asked]
    together = np.sort(np.r_[left, asked])
    np.testing.assert_array_equal(together, np.flatnonzero(segments[row]))
    assert abs(len(asked) - rate * (tokens[row] >= FIRST).sum()) <= 2
    assert (tokens[row][asked] >= FIRST).all()
    for name, whole in (
      ('inputs', tokens),
      ('segments', segments),
      ('positions', positions),
    ):
      np.testing.assert_array_equal(batch[name][row][is_left], whole[row][left])
    for name, whole in (
      ('targets', tokens),
      ('query_segments', segments),
      ('query_positions', positions),
    ):
      got = batch[name][row][is_asked]
      np.testing.assert_array_equal(got, whole[row][asked])
    assert not batch['query_segments'][row][~is_asked].any()
  assert (batch['query_inputs'] == vocab_lib.MASK).all()


KINDS = {
  'dense': {},
  'local': {
    'attention': attention_config.Local(num_heads=4, head_dim=8, window=7)
  },
  'relative': {'position': position.RelativeBuckets(num_buckets=8)},
  'rotary': {'position': position.Rotary()},
}


def make(config):
  return jit(lambda: encoder.Encoder(config, rngs=nnx.Rngs(0)))()


@pytest.mark.parametrize('kind', KINDS)
def test_the_encoder_is_that_of_whole_rows_in_which_nobody_sees_the_dropped(
  kind,
):
  """Also by place: windows and distances are those of the whole row."""
  config = dataclasses.replace(CONFIG, query_layers=0)
  model = make(dataclasses.replace(config, **KINDS[kind]))
  tokens, segments = source()
  batch = batch_of()
  hidden = np.zeros_like(segments)
  for row in range(ROWS):
    left = batch['places'][row][batch['segments'][row] > 0]
    hidden[row, left] = segments[row, left]
  positions = rows_lib.positions(segments)
  encode = jit(lambda m, **inputs: m.encode(**inputs))
  whole = encode(model, inputs=tokens, segments=hidden, positions=positions)
  names = ('inputs', 'segments', 'positions', 'places')
  got = encode(model, **{name: batch[name] for name in names})
  for row in range(ROWS):
    is_left = batch['segments'][row] > 0
    want = whole[row, batch['places'][row][is_left]]
    np.testing.assert_allclose(got[row][is_left], want, atol=2e-5)


def test_queries_see_their_document_alone():
  model, batch = make(CONFIG), batch_of()
  names = set(batch) - {'targets', 'weights'}
  features = jit(lambda inputs: model.features(**inputs)[0])
  want = features({name: batch[name] for name in names})
  first = batch['segments'] == 1
  other = {name: batch[name] for name in names}
  other['inputs'] = np.where(first, batch['inputs'], FIRST)
  got = features(other)
  own = batch['query_segments'] == 1
  np.testing.assert_array_equal(np.asarray(got)[own], np.asarray(want)[own])
  second = batch['query_segments'] == 2
  assert (np.asarray(got)[second] != np.asarray(want)[second]).any()


def test_queries_ask_for_different_tokens():
  model, batch = make(CONFIG), batch_of()
  names = set(batch) - {'targets', 'weights'}
  inputs = {name: batch[name] for name in names}
  features = np.asarray(jit(lambda m: m.features(**inputs)[0])(model))
  for row in range(ROWS):
    own = features[row][batch['query_segments'][row] == 1]
    apart = np.abs(own[:, None] - own[None]).max(-1)
    assert (apart[~np.eye(len(own), dtype=bool)] > 1e-3).all()


def counted(config, batch):
  """FLOPs of a forward pass up to the logits, counted in the program."""
  model = jax.eval_shape(lambda: encoder.Encoder(config, rngs=nnx.Rngs(0)))
  names = set(batch) - {'targets', 'weights'}

  def fn(model, batch):
    return model.head(model.features(**{n: batch[n] for n in names})[0])

  return jaxpr_costs.count(jax.make_jaxpr(fn)(model, batch)).total.flops


def test_the_cost_falls_with_the_rate():
  """Of the encoder by the rate; the program counts what the formula says."""
  batch = batch_of(0.5)
  by_formula = flops.forward_flops(
    CONFIG, flops.BatchShape(ROWS, 32, num_targets=32), skip_masked=False
  )
  np.testing.assert_allclose(counted(CONFIG, batch), by_formula, rtol=0.02)
  for rate in (0.25, 0.5, 0.75):
    left = masked_lm.MaskedLM(rate=rate, dropped=True).num_left(LENGTH)
    assert left == round((1 - rate) * LENGTH)
    layers = lambda length: flops.layer_flops(CONFIG, length)['tower']
    ratio = sum(layers(left)) / sum(layers(LENGTH))
    # Products of weights fall with the rate, scores with its square.
    assert (1 - rate) ** 2 < ratio <= 1 - rate


def test_gradients_reach_both_stacks():
  model, batch = make(CONFIG), batch_of()
  trained, rest = train_state.partition(model, '.*')
  fn = functools.partial(train_step.gradients, config=train_state.StepConfig())
  grads, sums = jit(fn)(trained, rest, batch, jax.random.key(0))
  assert np.isfinite(sums['loss'])
  for tower in (grads.tower, grads.queries):
    for path, leaf in jax.tree_util.tree_leaves_with_path(tower):
      assert jnp.abs(leaf).max() > 0, path


def test_messages(tmp_path):
  make = lambda **more: tiny.experiment_of(
    tmp_path, model='encoder', data__objective='masked_lm', **more
  )
  fine = {'data__objective__dropped': True, 'model__query_layers': 1}
  consistency.check(make(**fine), 8)
  input_pipeline.check(make(**fine).data)
  with pytest.raises(ValueError, match='asked for by query layers'):
    consistency.check(make(data__objective__dropped=True), 8)
  with pytest.raises(ValueError, match='asked for by query layers'):
    consistency.check(make(model__query_layers=1), 8)
  with pytest.raises(ValueError, match='all of them would ask the same'):
    make(**fine, model__position='rotary')
  for kind in ('linear', 'bigbird', 'random'):
    with pytest.raises(ValueError, match='goes by whole rows'):
      make(**fine, model__attention=kind)
  with pytest.raises(ValueError, match='places are missing'):
    consistency.check(make(**fine, mesh__context=2, mesh__data=1), 8)
  with pytest.raises(ValueError, match='Set one of them'):
    make(**fine, data__objective__masking='by_loss')
