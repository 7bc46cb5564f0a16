"""Sampling: masks against plain numpy, frequencies against the distribution."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from t2x.decode import processors
from t2x.decode import sampling

CONFIGS = [
  sampling.SamplingConfig(),
  sampling.SamplingConfig(temperature=0.7),
  sampling.SamplingConfig(temperature=1.3, top_k=4),
  sampling.SamplingConfig(top_p=0.8),
  sampling.SamplingConfig(temperature=0.5, top_k=5, top_p=0.9),
  sampling.SamplingConfig(temperature=2.0, top_k=9, top_p=0.6),
]


@jax.jit
def drawn(logits, keys, settings):
  return sampling.sample(logits, keys, settings)


def sample(logits, keys, config):
  return drawn(logits, keys, sampling.rows([config], *logits.shape))


@jax.jit
def truncated(logits, settings):
  return sampling.apply_truncation(logits, settings)


def truncate(logits, config):
  return truncated(logits, sampling.rows([config], *logits.shape))


def softmax_of_truncated(logits, config):
  return jax.nn.softmax(truncate(logits, config))


def naive_distribution(logits, config):
  """One row, one token at a time, in float64."""
  logits = np.asarray(logits, np.float64) / config.temperature
  kept = set(range(len(logits)))
  if config.top_k is not None:
    kth = sorted(logits, reverse=True)[min(config.top_k, len(logits)) - 1]
    kept = {i for i in kept if logits[i] >= kth}
  weights = {i: np.exp(logits[i] - logits.max()) for i in kept}
  if config.top_p is not None:
    total, mass, last = sum(weights.values()), 0.0, None
    for i in sorted(kept, key=lambda i: -logits[i]):
      if mass >= config.top_p:
        break
      mass, last = mass + weights[i] / total, logits[i]
    kept = {i for i in kept if logits[i] >= last}
  probs = np.array([weights[i] if i in kept else 0 for i in range(len(logits))])
  return probs / probs.sum()


def make_logits(rows, vocab, seed=0):
  # Halves and whole numbers make many exact ties.
  rng = np.random.default_rng(seed)
  return (rng.integers(-6, 7, (rows, vocab)) / 2).astype(np.float32)


@pytest.mark.parametrize('config', CONFIGS, ids=str)
@pytest.mark.parametrize('ties', [True, False])
def test_truncation_equals_naive_version(config, ties):
  logits = make_logits(40, 24)
  if not ties:
    rng = np.random.default_rng(1)
    logits = rng.normal(size=logits.shape).astype(np.float32) * 2
  probs = softmax_of_truncated(jnp.asarray(logits), config)
  expected = np.stack([naive_distribution(row, config) for row in logits])
  np.testing.assert_array_equal(np.asarray(probs) > 0, expected > 0)
  np.testing.assert_allclose(probs, expected, atol=2e-6)


def test_ties_stay_together():
  logits = jnp.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]])
  kept = lambda x: np.flatnonzero(np.isfinite(np.asarray(x)[0])).tolist()
  assert kept(processors.top_k(logits, jnp.array([1]))) == [1]
  assert kept(processors.top_k(logits, jnp.array([2]))) == [1, 2, 3, 4]
  assert kept(processors.top_p(logits, jnp.array([0.4]))) == [1]
  assert kept(processors.top_p(logits, jnp.array([0.6]))) == [1, 2, 3, 4]
  assert kept(processors.top_k(logits, jnp.array([100]))) == [0, 1, 2, 3, 4, 5]


def test_top_k_comes_before_top_p():
  # Of all tokens 0.5 of the mass needs two; of the best two it needs one.
  logits = jnp.log(jnp.array([[0.3, 0.28, 0.22, 0.2]]))
  both = sampling.SamplingConfig(top_k=2, top_p=0.5)
  alone = sampling.SamplingConfig(top_p=0.5)
  count = lambda c: int(jnp.isfinite(truncate(logits, c)).sum())
  assert (count(both), count(alone)) == (1, 2)


@pytest.mark.parametrize('config', CONFIGS, ids=str)
def test_frequencies_fit_the_truncated_distribution(config):
  num = 20_000
  row = make_logits(1, 12, seed=3)[0] * 0.7
  probs = naive_distribution(row, config)
  logits = jnp.broadcast_to(jnp.asarray(row), (num, 12))
  keys = jax.random.split(jax.random.key(7), num)
  tokens = np.asarray(sample(logits, keys, config))
  counts = np.bincount(tokens, minlength=12)
  assert counts[probs == 0].sum() == 0
  seen = probs > 0
  result = stats.chisquare(counts[seen], probs[seen] * num)
  assert result.pvalue > 1e-3, (counts, probs * num)


def test_temperature_zero_is_greedy_and_takes_the_first_of_equals():
  logits = jnp.asarray(make_logits(50, 12))
  keys = jax.random.split(jax.random.key(0), 50)
  config = sampling.SamplingConfig(temperature=0)
  tokens = sample(logits, keys, config)
  np.testing.assert_array_equal(tokens, np.argmax(logits, -1))
  assert tokens.dtype == jnp.int32


def test_tiny_temperature_tends_to_greedy():
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(20, 12)) * 50)
  keys = jax.random.split(jax.random.key(0), 20)
  config = sampling.SamplingConfig(temperature=1e-36)
  tokens = sample(logits.astype(jnp.float32), keys, config)
  np.testing.assert_array_equal(tokens, logits.argmax(-1))


def test_a_row_draws_the_same_alone_and_in_any_batch():
  logits = jnp.asarray(make_logits(30, 12))
  keys = jax.random.split(jax.random.key(2), 30)
  config = sampling.SamplingConfig(temperature=0.9, top_k=8, top_p=0.95)
  together = sample(logits, keys, config)
  order = np.random.default_rng(0).permutation(30)
  shuffled = sample(logits[order], keys[order], config)
  np.testing.assert_array_equal(shuffled, together[order])
  alone = [
    sample(logits[i : i + 1], keys[i : i + 1], config)[0] for i in range(4)
  ]
  np.testing.assert_array_equal(alone, together[:4])


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'temperature': -0.5}, r'temperature=-0.5; it must be 0'),
    ({'temperature': float('nan')}, r'temperature=nan; it must be 0'),
    ({'top_k': 0}, r'top_k=0; it must be 1 or more, or none'),
    ({'top_p': 0.0}, r'top_p=0.0; it must be in \(0, 1\], or none'),
    ({'top_p': 1.5}, r'top_p=1.5; it must be in \(0, 1\]'),
  ],
)
def test_messages(settings, message):
  with pytest.raises(ValueError, match=message):
    sampling.SamplingConfig(**settings)


def test_a_few_candidates_draw_what_all_tokens_would():
  """Whether a neighbour keeps everything, which rules candidates out."""
  rng = np.random.default_rng(0)
  logits_BV = jnp.asarray(rng.normal(size=(64, 5000)) * 3, jnp.float32)
  keys_B = jax.random.split(jax.random.key(1), 64)
  small = sampling.SamplingConfig(top_k=40, top_p=0.9, temperature=0.8)
  draw = lambda configs: sampling.sample(
    logits_BV, keys_B, sampling.rows(configs, 64, 5000)
  )
  alone = draw([small])
  beside = draw([small] * 63 + [sampling.SamplingConfig()])
  assert alone[:63].tolist() == beside[:63].tolist()
  assert len(set(alone.tolist())) > 30


def test_ties_stay_together_whoever_is_beside():
  logits_BV = jnp.zeros((32, 500)).at[:, 400:].set(-1.0)
  keys_B = jax.random.split(jax.random.key(1), 32)
  tied = sampling.SamplingConfig(top_k=5)
  draw = lambda configs: sampling.sample(
    logits_BV, keys_B, sampling.rows(configs, 32, 500)
  ).tolist()
  alone = draw([tied])
  assert alone[:31] == draw([tied] * 31 + [sampling.SamplingConfig()])[:31]
  assert max(alone) > 64 and max(alone) < 400


@pytest.mark.parametrize('number', range(8))
def test_few_forms_draw_the_same(number):
  """Companions that are given as well change nothing."""
  rng = np.random.default_rng(number)
  configs = [
    sampling.SamplingConfig(
      temperature=float(rng.choice([0, 0.7])) if number else 0,
      top_k=int(rng.choice([3, 300])) if number & 1 else None,
      top_p=0.8 if number & 2 and rng.random() < 0.5 else None,
      repetition_penalty=1.5 if number & 4 and rng.random() < 0.5 else 1.0,
    )
    for _ in range(6)
  ]
  V = 40
  plain = sampling.rows(configs, 6, V)
  few = sampling.canonical(plain, V)
  logits_BV = jnp.asarray(rng.normal(size=(6, V)) * 3, jnp.float32)
  keys_B = jax.random.split(jax.random.key(number), 6)
  prompts = [[1, 2, 3]] * 6
  tokens = [
    sampling.sample(
      logits_BV,
      keys_B,
      settings,
      sampling.begin(settings, prompts, V),
      number_B=jnp.zeros(6, jnp.int32),
      ends_BE=jnp.full((6, 1), -1),
    ).tolist()
    for settings in (plain, few)
  ]
  assert tokens[0] == tokens[1]
