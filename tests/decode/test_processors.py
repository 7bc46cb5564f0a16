"""Processors against transformers' own, and against plain numpy."""

import extras
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.decode import generate
from t2x.decode import processors
from t2x.decode import sampling

VOCAB, ROWS = 40, 12


@pytest.fixture(scope='module')
def logits():
  return np.random.default_rng(0).normal(size=(ROWS, VOCAB)).astype('f') * 3


@pytest.fixture(scope='module')
def texts():
  return np.random.default_rng(1).integers(0, VOCAB, (ROWS, 9))


def column(values):
  return jnp.asarray(np.resize(np.asarray(values), ROWS))


def theirs(name, *args, ids, logits, **kwargs):
  torch = extras.need('torch', extra='reference')
  logits_process = extras.need(
    'transformers.generation.logits_process', extra='reference'
  )
  made = getattr(logits_process, name)(*args, **kwargs)
  result = made(torch.tensor(ids), torch.tensor(np.array(logits)))
  return result.numpy()


def same(ours, theirs):
  np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(theirs))
  finite = np.isfinite(theirs)
  np.testing.assert_allclose(
    np.asarray(ours)[finite], theirs[finite], rtol=1e-6
  )


@pytest.mark.reference
@pytest.mark.parametrize('k', [1, 3, 7, 100])
@pytest.mark.parametrize('most', [128, None])
def test_top_k(logits, texts, k, most):
  ours = jax.jit(processors.top_k, static_argnums=2)(logits, column([k]), most)
  name = 'TopKLogitsWarper'
  same(ours, theirs(name, min(k, VOCAB), ids=texts, logits=logits))


@pytest.mark.reference
@pytest.mark.parametrize(
  'ours, name',
  [
    (processors.top_p, 'TopPLogitsWarper'),
    (processors.min_p, 'MinPLogitsWarper'),
    (processors.typical, 'TypicalLogitsWarper'),
  ],
)
@pytest.mark.parametrize('p', [0.05, 0.3, 0.5, 0.9, 0.99])
def test_masses(logits, texts, ours, name, p):
  got = jax.jit(ours)(logits, column([p]).astype('f'))
  same(got, theirs(name, p, ids=texts, logits=logits))


@pytest.mark.reference
def test_penalties_and_words(logits, texts):
  seen = np.zeros((ROWS, VOCAB), bool)
  np.put_along_axis(seen, texts, True, axis=1)
  got = processors.repetition(logits, seen, column([1.7]))
  name = 'RepetitionPenaltyLogitsProcessor'
  same(got, theirs(name, 1.7, ids=texts, logits=logits))
  words = [[3], [int(texts[0, -1]), 5], texts[1, -2:].tolist() + [6], [9, 8, 7]]
  settings = sampling.rows([sampling.SamplingConfig(banned=words)], ROWS, VOCAB)
  history = sampling.begin(settings, texts, VOCAB)
  got = processors.without_words(logits, history.recent_BW, settings.words_BMW)
  want = theirs(
    'NoBadWordsLogitsProcessor', words, eos_token_id=None, ids=texts,
    logits=logits,
  )  # fmt: skip
  same(got, want)
  assert np.isneginf(got[0, 5]) and np.isneginf(got[1, 6])
  assert np.isneginf(got[:, 3]).all() and np.isneginf(got).sum() < ROWS + 6
  got = processors.min_length(
    logits, column([True]), jnp.full((ROWS, 2), 4).at[:, 1].set(-1)
  )
  name = 'MinLengthLogitsProcessor'
  same(got, theirs(name, 20, eos_token_id=4, ids=texts, logits=logits))


@pytest.mark.reference
def test_all_in_their_order(logits, texts):
  """The chain that `generate` of transformers builds for the same settings."""
  ids = texts
  want = logits
  for name, *args in (
    ('RepetitionPenaltyLogitsProcessor', 1.3),
    ('TemperatureLogitsWarper', 0.7),
    ('TopKLogitsWarper', 20),
    ('TopPLogitsWarper', 0.95),
    ('MinPLogitsWarper', 0.02),
    ('TypicalLogitsWarper', 0.9),
  ):
    want = theirs(name, *args, ids=ids, logits=want)
  config = sampling.SamplingConfig(
    repetition_penalty=1.3, temperature=0.7, top_k=20, top_p=0.95, min_p=0.02,
    typical_p=0.9,
  )  # fmt: skip
  settings = sampling.rows([config], ROWS, VOCAB)
  history = sampling.begin(settings, texts, VOCAB)
  got = sampling.process_logits(jnp.asarray(logits), settings, history)
  got = sampling.apply_truncation(got, settings)
  np.testing.assert_allclose(
    jax.nn.softmax(got), jax.nn.softmax(want), atol=1e-6
  )
  assert (np.isfinite(want).sum(1) < 20).any()


def test_frequency_and_bias():
  """OpenAI's formula: mu - count * frequency - (count > 0) * presence."""
  logits = jnp.zeros((1, 4))
  counts = jnp.array([[0, 1, 3, 0]])
  got = processors.frequency(
    logits, counts, column([0.5])[:1], column([2.0])[:1]
  )
  np.testing.assert_allclose(got, [[0, -2.5, -6.5, 0]])
  config = sampling.SamplingConfig(bias={1: 2.0, 3: -np.inf}, temperature=0)
  settings = sampling.rows([config], 1, 4)
  got = sampling.process_logits(logits, settings)
  np.testing.assert_allclose(got, [[0, 2, 0, -np.inf]])


def test_each_row_has_its_own_settings(logits):
  """Rows that ask for nothing draw as if nobody else asked either."""
  configs = [
    sampling.SamplingConfig(),
    sampling.SamplingConfig(temperature=0),
    sampling.SamplingConfig(temperature=0.5, top_k=3, presence_penalty=1.0),
    sampling.SamplingConfig(top_p=0.5, banned=[[1], [2, 3]]),
    sampling.SamplingConfig(min_p=0.2, bias={4: 3.0}),
    sampling.SamplingConfig(typical_p=0.4, repetition_penalty=1.2),
  ]
  configs = (configs * 2)[:ROWS]
  keys = jax.random.split(jax.random.key(5), ROWS)
  prompts = [[i, i + 1] for i in range(ROWS)]

  def run(picked):
    settings = sampling.rows([configs[i] for i in picked], len(picked), VOCAB)
    history = sampling.begin(settings, [prompts[i] for i in picked], VOCAB)
    index = np.array(picked)
    return sampling.sample(logits[index], keys[index], settings, history)

  together = np.asarray(run(range(ROWS)))
  alone = [int(run([i])[0]) for i in range(ROWS)]
  assert together.tolist() == alone
  assert together[1] == logits[1].argmax() and together[7] == logits[7].argmax()


def test_drawing_hits_every_token_and_no_other():
  """Vocabularies around the size of a piece; the ends of the unit interval."""
  for size in (3, 255, 256, 257, 1000):
    logits = jnp.where(jnp.arange(size) % 3 == 1, 0.0, -jnp.inf)[None]
    num = 3000
    uniform = (jnp.arange(num) + 0.5) / num
    uniform = uniform.at[0].set(0.0).at[-1].set(1 - 2.0**-24)
    got = processors.draw(jnp.broadcast_to(logits, (num, size)), uniform)
    want = np.arange(size)[np.arange(size) % 3 == 1]
    assert set(np.asarray(got).tolist()) == set(want.tolist())
    assert (np.diff(got) >= 0).all() and int(got[0]) == 1
    assert int(got[-1]) == want[-1]


@pytest.mark.usefixtures('compiled_as_by_users')
def test_no_vocabulary_is_sorted():
  config = sampling.SamplingConfig(top_k=300, top_p=0.9, typical_p=0.9)
  settings = sampling.rows([config], 2, 5000)
  text = jax.jit(sampling.sample).lower(
    jnp.zeros((2, 5000)), jax.random.split(jax.random.key(0), 2), settings
  ).compile().as_text()  # fmt: skip
  assert 'while' in text and ' sort(' not in text and 'TopK' not in text


def test_messages():
  for settings, message in (
    ({'min_p': 1.2}, r'min_p=1.2; it must be in \(0, 1\]'),
    ({'typical_p': 0}, 'typical_p=0; it must be in'),
    ({'repetition_penalty': 0.0}, 'repetition_penalty=0.0; it must be above'),
    ({'presence_penalty': float('nan')}, 'presence_penalty=nan; it must be'),
    ({'min_tokens': -1}, 'min_tokens=-1; it is 0 or more'),
    ({'bias': {3: float('inf')}}, 'bias holds what is no number, or inf'),
    ({'banned': [[]]}, 'a word without tokens'),
  ):
    with pytest.raises(ValueError, match=message):
      sampling.SamplingConfig(**settings)
  for settings in ({'bias': {40: 1.0}}, {'banned': [[1, -3]]}):
    config = sampling.SamplingConfig(**settings)
    with pytest.raises(ValueError, match='the vocabulary has 40 tokens'):
      sampling.rows([config], 1, VOCAB)


def test_generation_keeps_to_them():
  from flax import nnx

  from t2x.models import decoder

  config = decoder.DecoderConfig(vocab_size=VOCAB, num_layers=1, embed_dim=16)
  model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  plain = sampling.SamplingConfig(temperature=0)
  run = lambda config, **kwargs: generate.generate(
    model, [[3, 4, 5]], num_tokens=8, sampling=config, chunk=16, **kwargs
  ).tokens[0]
  first = run(plain)
  config = sampling.SamplingConfig(temperature=0, banned=[first[:1]])
  assert first[0] not in run(config)
  pair = sampling.SamplingConfig(temperature=0, banned=[[5, first[0]]])
  assert run(pair)[0] != first[0], 'The last token of the prompt begins it.'
  assert len(run(plain, eos_id=[7, first[0]])) == 0
  longer = sampling.SamplingConfig(temperature=0, min_tokens=5)
  assert len(run(longer, eos_id=[7, first[0]])) >= 5
  once = sampling.SamplingConfig(temperature=0, frequency_penalty=1e4)
  assert len(set(run(once))) == 8
  with pytest.raises(
    ValueError, match='sampling has 2 settings and there are 1'
  ):
    run([plain, plain])
