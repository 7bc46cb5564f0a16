"""Losses of several terms and of two passes, by hand."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.config import consistency
from t2x.config import experiment
from t2x.config import overrides
from t2x.data import config as data
from t2x.layers import attention_config
from t2x.layers import dropout
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import position
from t2x.layers import stack
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import loss_terms
from t2x.objectives import causal_lm
from t2x.objectives import noise
from t2x.objectives import rows as rows_lib
from t2x.objectives import span_corruption
from t2x.objectives import vocab as vocab_lib
from t2x.training import scheduled_sampling
from t2x.training import train_state
from t2x.training import train_step

VOCAB, ROWS, LENGTH = 23, 6, 8
SMALL = {
  'vocab_size': VOCAB,
  'vocab_multiple': 8,
  'num_layers': 2,
  'embed_dim': 16,
  'attention': attention_config.Dense(num_heads=2, head_dim=8),
  'mlp': mlp.MlpConfig(hidden=32),
  'position': position.Learned(max_length=LENGTH),
}
KEY = jax.random.key(3)
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


def log_probs(logits, targets):
  logits = np.asarray(logits, np.float64)
  logits = logits - logits.max(-1, keepdims=True)
  logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  return np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]


def mean_nll(logits, targets, weights):
  return -(log_probs(logits, targets) * weights).sum() / weights.sum()


# --- Tokens further ahead. ---


def test_targets_further_ahead():
  """Of a row, by a loop; no way leads over the end of a document."""
  tokens = np.arange(105, 119)[None]
  segments = np.array([[1] * 5 + [2] * 7 + [0] * 2])
  objective = causal_lm.CausalLM(ahead=2)
  batch = objective.examples(
    rows_lib.Rows(tokens, segments),
    keys=noise.keys(0, np.arange(1)),
    vocab=vocab_lib.Vocab(size=200),
    length=13,
  )
  assert {n: a.shape[1] for n, a in batch.items()} == objective.lengths(13)
  for name, by in (('', 1), ('ahead2_', 2), ('ahead3_', 3)):
    for t in range(13):
      seen = t + by < 14 and segments[0, t] == segments[0, t + by] != 0
      assert batch[f'{name}weights'][0, t] == seen
      if seen:
        assert batch[f'{name}targets'][0, t] == tokens[0, t + by]


def test_loss_of_heads_further_ahead():
  config = decoder.DecoderConfig(**SMALL, ahead=(0.5, 0.25))
  model = jit(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))()
  rng = np.random.default_rng(0)
  ids = lambda: rng.integers(0, VOCAB, (ROWS, LENGTH))
  batch = {'inputs': ids()}
  for name in ('', 'ahead2_', 'ahead3_'):
    batch[f'{name}targets'] = ids()
    batch[f'{name}weights'] = rng.random((ROWS, LENGTH)).astype(np.float32)
  trained, rest = train_state.partition(model, '.*')
  step = train_state.StepConfig()
  grads, sums = jit(functools.partial(train_step.gradients, config=step))(
    trained, rest, batch, KEY
  )

  def logits(model):
    """The stack without its norm, one more layer, then norm and table."""
    taken = dict.fromkeys(('positions', 'segments'), None)
    context = model.context('tower', batch | taken, None, 1)
    x, _ = model.enter('tower', batch, context, None)
    x, _, _ = model.tower(x, context)
    found = [model.head(model.tower.final_norm(x))]
    for layer in model.ahead:
      y, _, _ = layer(x, context)
      found.append(model.head(model.tower.final_norm(y)))
    return found

  nlls = [
    mean_nll(own, batch[f'{name}targets'], batch[f'{name}weights'])
    for name, own in zip(('', 'ahead2_', 'ahead3_'), jit(logits)(model))
  ]
  got = sums['nll'], sums['ahead2_nll'], sums['ahead3_nll']
  np.testing.assert_allclose(got, nlls, rtol=1e-5)
  want = nlls[0] + 0.5 * nlls[1] + 0.25 * nlls[2]
  np.testing.assert_allclose(sums['loss'], want, rtol=1e-5)
  for leaf in jax.tree.leaves(grads.ahead):
    assert np.abs(leaf).max() > 0
  # Use does not run them, and evaluation says what they are worth.
  plain = dataclasses.replace(config, ahead=())
  assert len(jax.tree.leaves(model)) > len(
    jax.tree.leaves(
      jax.eval_shape(lambda: decoder.Decoder(plain, rngs=nnx.Rngs(0)))
    )
  )
  found = jit(functools.partial(train_step.eval_step, config=step))(
    model, batch
  )
  np.testing.assert_allclose(
    found['ahead2_nll'] / found['ahead2_weight'], nlls[1], rtol=1e-5
  )


def test_heads_further_ahead_fit_their_targets():
  model = decoder.DecoderConfig(**SMALL, ahead=(0.5, 0.25))
  objective = causal_lm.CausalLM(ahead=1)
  config = experiment.Experiment(
    model=model, data=data.DataConfig(length=LENGTH, objective=objective)
  )
  with pytest.raises(ValueError, match=r'objective\.ahead=2, or model'):
    consistency.check(config, 1)
  with pytest.raises(ValueError, match='above 0'):
    dataclasses.replace(model, ahead=(0.0,))
  with pytest.raises(ValueError, match='not balanced'):
    dataclasses.replace(model, mlp=moe.MoeConfig(num_experts=2, hidden=8))


# --- Scheduled sampling. ---


@functools.cache
def sampled():
  config = encoder_decoder.EncoderDecoderConfig(**SMALL)
  make = lambda: encoder_decoder.EncoderDecoder(config, rngs=nnx.Rngs(0))
  model = jit(make)()
  rng = np.random.default_rng(0)
  ids = lambda: rng.integers(1, VOCAB, (ROWS, LENGTH))
  segments = np.where(np.arange(LENGTH) < 5, 1, 2) * np.ones((ROWS, 1), int)
  segments[:, -1] = 0
  positions = rows_lib.positions(segments)
  targets = ids()
  batch = {
    'inputs': rows_lib.shift_right(targets, positions),
    'targets': targets,
    'weights': (segments > 0).astype(np.float32),
    'segments': segments,
    'positions': positions,
    'encoder_inputs': ids(),
    'encoder_segments': segments,
    'encoder_positions': positions,
  }
  return model, batch


def replaced(share, **settings):
  model, batch = sampled()
  own = scheduled_sampling.ScheduledSampling(**settings)
  batch = batch | {'sampled_share': jnp.full(ROWS, share)}
  keys_B = dropout.row_keys(KEY, jnp.arange(ROWS))
  fn = lambda model: scheduled_sampling.mix_in_predictions(
    own, model, batch, keys_B, stack.Execution()
  )
  return np.asarray(jit(fn)(model))


def test_predictions_take_the_place_of_targets():
  model, batch = sampled()
  names = set(batch) - {'targets', 'weights'}
  best = jit(lambda m: m(**{n: batch[n] for n in names}))(model).argmax(-1)
  got, inputs = replaced(1.0), batch['inputs']
  for row, t in np.ndindex(inputs.shape):
    may = batch['positions'][row, t] > 0 and batch['weights'][row, t] > 0
    assert got[row, t] == (best[row, t - 1] if may else inputs[row, t])
  np.testing.assert_array_equal(replaced(0.0), inputs)


def test_as_many_are_replaced_as_the_share_says():
  model, batch = sampled()
  del model
  may = (batch['positions'] > 0) & (batch['weights'] > 0)
  best, half = replaced(1.0), replaced(0.5)
  differ = may & (best != batch['inputs'])
  rate = (half == best)[differ].mean()
  assert abs(rate - 0.5) < 4 * 0.5 / differ.sum() ** 0.5
  # Samples are other tokens than the best ones, now and then.
  assert (replaced(1.0, predict='sample') != best)[may].any()


def test_the_share_follows_its_schedule():
  own = scheduled_sampling.ScheduledSampling(share=0.5, start=10, steps=20)
  share = lambda own, *steps: [
    float(own.share_at(jnp.asarray(s))) for s in steps
  ]
  # None in ten steps, then more in each of twenty, the last of them whole.
  np.testing.assert_allclose(
    share(own, 0, 9, 10, 19, 28), [0.0, 0.0, 0.025, 0.25, 0.475], rtol=1e-6
  )
  assert share(own, 29, 30, 99) == [0.5, 0.5, 0.5]
  curved = dataclasses.replace(own, shape='sigmoid')
  np.testing.assert_allclose(
    share(curved, 0, 9, 19, 29, 99), [0.0, 0.0, 0.25, 0.5, 0.5], atol=1e-7
  )
  assert 0 < share(curved, 12)[0] < share(own, 12)[0]
  at_once = scheduled_sampling.ScheduledSampling(share=0.5)
  assert share(at_once, 0, 1) == [0.5, 0.5]


def test_a_step_reads_what_the_first_pass_predicts():
  """With gradients of the second pass alone."""
  model, batch = sampled()
  own = scheduled_sampling.ScheduledSampling(share=1.0, start=0, steps=1)
  step = train_state.StepConfig(sampling=own)
  trained, rest = train_state.partition(model, '.*')
  fn = lambda batch, config: jit(
    functools.partial(train_step.gradients, config=config)
  )(trained, rest, batch, KEY)
  got = fn(batch | {'sampled_share': jnp.ones(ROWS)}, step)
  inputs = replaced(1.0)
  want = fn(batch | {'inputs': inputs}, train_state.StepConfig())
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_scheduled_sampling_needs_a_decoder_beside_an_encoder():
  set_to = lambda config, *lines: overrides.override(
    config, overrides.parse_settings(lines)
  )
  config = experiment.Experiment(
    model=encoder_decoder.EncoderDecoderConfig(**SMALL),
    data=data.DataConfig(
      length=LENGTH, objective=span_corruption.SpanCorruption()
    ),
  )
  config = set_to(config, 'train.sampling=scheduled')
  consistency.check(config, 1)
  assert config.train.sampling == scheduled_sampling.ScheduledSampling()
  with pytest.raises(ValueError, match='do not have'):
    consistency.check(set_to(config, 'mesh.pipe=2'), 2)
  plain = dataclasses.replace(
    config,
    model=decoder.DecoderConfig(**SMALL),
    data=data.DataConfig(length=LENGTH),
  )
  with pytest.raises(ValueError, match='has no decoder that reads'):
    consistency.check(plain, 1)
  with pytest.raises(ValueError, match=r'it is in \(0, 1\]'):
    scheduled_sampling.ScheduledSampling(share=0.0)


# --- Sentences. ---


def test_loss_of_sentences_and_masked_tokens():
  config = encoder.EncoderConfig(
    **SMALL, pooler=True, next_sentence=True, num_token_types=2
  )
  model = jit(lambda: encoder.Encoder(config, rngs=nnx.Rngs(0)))()
  rng = np.random.default_rng(0)
  batch = {
    'inputs': rng.integers(0, VOCAB, (ROWS, LENGTH)),
    'token_types': rng.integers(0, 2, (ROWS, LENGTH)),
    'targets': rng.integers(0, VOCAB, (ROWS, 2)),
    'weights': np.ones((ROWS, 2), np.float32),
    'target_positions': np.ones((ROWS, 1), int) * [2, 5],
    'sentence_targets': rng.integers(0, 2, (ROWS, 1)),
    'sentence_weights': np.array([[1.0]] * 4 + [[0.0]] * 2, np.float32),
  }
  trained, rest = train_state.partition(model, '.*')
  step = train_state.StepConfig()
  _, sums = jit(functools.partial(train_step.gradients, config=step))(
    trained, rest, batch, KEY
  )
  inputs = {'inputs': batch['inputs'], 'token_types': batch['token_types']}
  logits = np.asarray(jit(lambda m: m(**inputs))(model))
  masked = mean_nll(logits[:, [2, 5]], batch['targets'], batch['weights'])
  first = np.asarray(jit(lambda m: m.encode(**inputs))(model))[:, 0]
  pooler, own = jax.device_get((model.pooler, model.next_sentence))
  pooled = np.tanh(first @ pooler.kernel_DE[...] + pooler.bias_E[...])
  two = pooled @ own.kernel_DE[...] + own.bias_E[...]
  sentence = -log_probs(two, batch['sentence_targets'][:, 0])[:4].mean()
  np.testing.assert_allclose(sums['nll'], masked, rtol=1e-5)
  np.testing.assert_allclose(sums['sentence_nll'], sentence, rtol=1e-5)
  np.testing.assert_allclose(sums['loss'], masked + sentence, rtol=1e-5)


def test_rows_share_what_terms_there_are():
  rng = np.random.default_rng(0)
  weights = rng.uniform(size=(ROWS, LENGTH)).astype(np.float32)
  main = {'weights': weights / weights.sum()}
  nothing = {'class0_weights': np.zeros((ROWS, 1), np.float32)}
  alone, beside = (
    loss_terms.with_row_shares(batch)[loss_terms.ROW_SHARES]
    for batch in (main, main | nothing)
  )
  np.testing.assert_allclose(alone, main['weights'].sum(1), rtol=1e-6)
  np.testing.assert_allclose(beside, alone, rtol=1e-6)
  first = np.zeros((ROWS, 1), np.float32)
  first[0] = 1.0
  both = loss_terms.with_row_shares(main | {'class0_weights': first})
  np.testing.assert_allclose(
    both[loss_terms.ROW_SHARES], (alone + first[:, 0]) / 2, rtol=1e-6
  )
