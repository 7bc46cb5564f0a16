"""Uncertainty: scores against plain numpy, and what is done about it."""

import dataclasses
import math

from flax import nnx
import jax
import numpy as np
import pytest
import shared_runs
import tiny

from t2x.inference import generation
from t2x.inference import loading
from t2x.inference import uncertainty
from t2x.models import encoder
from t2x.models import model as model_lib

TEXTS = ['the run of it', 'a', 'and some more of the text here']


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  directory = shared_runs.trained(tmp_path_factory, train__num_steps=2)
  return str(directory / 'run')


@pytest.fixture(scope='module')
def trained(run):
  return loading.load(run)


@pytest.fixture(scope='module')
def other(trained):
  """A second model of the same kind, drawn anew."""
  model = model_lib.make(trained.config.model, rngs=nnx.Rngs(7))
  return dataclasses.replace(trained, model=model)


def naive(models, trained, text):
  """Distributions of each model, in float64; the mean's and the members'."""
  (row,) = trained.prompt_ids([text])
  logits = [np.asarray(m(np.array([row]))[0, :-1], np.float64) for m in models]
  probs = [np.exp(z - z.max(-1, keepdims=True)) for z in logits]
  probs = [p / p.sum(-1, keepdims=True) for p in probs]
  mean = np.mean(probs, axis=0)
  entropy = lambda p: -(p * np.log(p)).sum(-1)
  own = np.log(mean[np.arange(len(row) - 1), row[1:]])
  within = np.mean([entropy(p) for p in probs], axis=0)
  return row[1:], own, entropy(mean), entropy(mean) - within


@pytest.mark.parametrize('members', [1, 2])
def test_scores_are_those_of_plain_numpy(trained, other, members):
  models = [trained, other][:members]
  found = uncertainty.token_scores(models, TEXTS)
  for text, scores in zip(TEXTS, found):
    want = naive([m.model for m in models], trained, text)
    assert scores.tokens == want[0]
    np.testing.assert_allclose(scores.log_probs, want[1], atol=1e-4)
    np.testing.assert_allclose(scores.entropies, want[2], atol=1e-4)
    np.testing.assert_allclose(scores.disagreement, want[3], atol=1e-4)
    assert (max(scores.disagreement) > 1e-3) == (members == 2)
    np.testing.assert_allclose(scores.total, want[1].sum(), rtol=1e-5)
    np.testing.assert_allclose(scores.mean, want[1].mean(), rtol=1e-5)


def test_dropout_is_drawn_anew_in_each_pass(run, trained):
  dropping = loading.load(run, settings=['model.dropout=0.4'])
  score = lambda seed: uncertainty.token_scores(
    [dropping], TEXTS, passes=6, seed=seed
  )
  first = score(0)
  assert all(min(scores.disagreement) > 0 for scores in first)
  assert first == score(0) and first != score(1)
  # A text draws the same whatever stands beside it.
  alone = uncertainty.token_scores([dropping], TEXTS[:1], passes=6)[0]
  np.testing.assert_allclose(alone.entropies, first[0].entropies, atol=1e-5)
  with pytest.raises(ValueError, match='passes=2 draws dropout, and the model'):
    uncertainty.token_scores([trained], TEXTS, passes=2)


def test_spread_over_meanings():
  assert uncertainty.spread(['Yes it is.', 'yes  it IS.']) == 0
  apart = ['red', 'green', 'blue and more']
  np.testing.assert_allclose(uncertainty.spread(apart), math.log(3))
  half = ['a b c', 'a b d', 'x y', 'x y']
  np.testing.assert_allclose(uncertainty.spread(half), math.log(2))
  # Those between which others lead mean the same.
  chain = ['a b', 'a b c', 'b c', 'q']
  got = uncertainty.spread(chain, alike=0.6)
  want = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
  np.testing.assert_allclose(got, want)
  with pytest.raises(ValueError, match='no texts whose spread'):
    uncertainty.spread([])


def test_spread_by_vectors(trained, tmp_path):
  config = tiny.experiment_of(tmp_path, model__kind='encoder').model
  assert isinstance(config, encoder.EncoderConfig)
  model = encoder.Encoder(config, rngs=nnx.Rngs(0))
  own = dataclasses.replace(
    trained,
    model=model,
    config=dataclasses.replace(trained.config, model=config),
  )
  assert uncertainty.spread(['the run', 'the run'], encoder=own) == 0
  texts = ['the run', 'a very different text']
  got = uncertainty.spread(texts, encoder=own, alike=0.9999)
  np.testing.assert_allclose(got, math.log(2))


def test_the_surest_of_some_texts_is_taken(trained):
  ask = dict(num_tokens=6, seed=3)
  prompts = ['the run', 'a']
  (first, second) = uncertainty.answer(trained, prompts, samples=3, **ask)
  drawn = generation.generation(
    trained, [p for p in prompts for _ in range(3)], **ask
  )
  means = [np.mean(row) if row else -math.inf for row in drawn.log_probs]
  assert first.score == max(means[:3]) and second.score == max(means[3:])
  best = drawn.tokens[int(np.argmax(means[:3]))]
  assert first.text == trained.detokenize(prompts[:1], [best])[0]
  assert first.tries == 3 and first.spread >= 0
  worst = uncertainty.answer(
    trained, prompts, samples=3, rank=lambda text, score: -score, **ask
  )
  assert worst[0].score == min(means[:3])


def test_abstaining_drawing_again_and_stopping(trained):
  ask = dict(num_tokens=6, samples=2)
  (none,) = uncertainty.answer(trained, ['a'], least=-1e-3, rounds=3, **ask)
  assert none.text is None and none.tries == 6 and none.score < -1e-3
  (some,) = uncertainty.answer(trained, ['a'], least=-100.0, rounds=3, **ask)
  assert some.text is not None and some.tries == 2
  assert none.score >= some.score, 'The best of all tries is kept.'
  (cut,) = uncertainty.answer(trained, ['a'], stop_below=0.9, **ask)
  assert cut.text == '' and cut.score == -math.inf
  with pytest.raises(ValueError, match='samples=0, rounds=1, stop_below=0.0'):
    uncertainty.answer(trained, ['a'], num_tokens=2, samples=0)


def test_messages(trained):
  with pytest.raises(ValueError, match='a model and a text at least'):
    uncertainty.token_scores([], ['a'])
  with pytest.raises(ValueError, match='Text 1 has 200 tokens|Text 1 has 1'):
    uncertainty.token_scores([trained], ['a', 'b' * 199])
  shapes = jax.eval_shape(
    lambda: encoder.Encoder(encoder.EncoderConfig(), rngs=nnx.Rngs(0))
  )
  other = dataclasses.replace(trained, model=shapes)
  with pytest.raises(
    ValueError, match='Encoder gives no probability of a next'
  ):
    uncertainty.token_scores([other], ['a'])
