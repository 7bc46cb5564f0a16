"""Drafted tokens change neither a greedy text nor what is drawn."""

import functools
import itertools

from flax import nnx
import jax
import numpy as np
import pytest
from scipy import stats

from t2x.decode import drafts
from t2x.decode import generate
from t2x.decode import sampling
from t2x.decode import speculative
from t2x.layers import attention_config
from t2x.layers import linear
from t2x.layers import param
from t2x.layers import position
from t2x.models import decoder
from t2x.models import encoder_decoder

VOCAB = 23
GREEDY = sampling.SamplingConfig(temperature=0)
HEADS = attention_config.Dense(num_heads=2, head_dim=8)
PROMPTS = [[7, 3, 9, 7, 3], list(range(1, 18)), [5] * 10 + list(range(12, 22))]
run = functools.partial(generate.generate, chunk=16)
speculate = functools.partial(speculative.speculate, chunk=16)


@functools.cache
def make(seed=0, **settings):
  config = decoder.DecoderConfig(
    **{
      'vocab_size': VOCAB,
      'num_layers': 2,
      'embed_dim': 16,
      'attention': HEADS,
      'position': position.Rotary(),
      'init': param.Init(std=0.4),
      **settings,
    }
  )
  return decoder.Decoder(config, rngs=nnx.Rngs(seed))


def local():
  pattern = (HEADS, attention_config.Local(num_heads=2, head_dim=8, window=5))
  return make(attention_pattern=pattern, logit_soft_cap=2.0)


def small():
  return make(seed=1, num_layers=1)


DRAFTS = {
  'model': lambda: (make(), drafts.ModelDraft(model=small(), num=3)),
  'itself': lambda: (make(), drafts.ModelDraft(model=make(), num=4)),
  'window': lambda: (local(), drafts.ModelDraft(model=local(), num=6)),
  'other_window': lambda: (local(), drafts.ModelDraft(model=small(), num=6)),
  'heads': lambda: (make(ahead=(1.0, 1.0)), drafts.HeadsDraft()),
  'lookup': lambda: (make(), drafts.LookupDraft(num=4, match=1)),
}


@pytest.mark.parametrize('name', list(DRAFTS))
def test_a_greedy_text_is_the_models_own(name):
  model, draft = DRAFTS[name]()
  want = run(model, PROMPTS, num_tokens=24, sampling=GREEDY)
  got = speculate(model, PROMPTS, num_tokens=24, sampling=GREEDY, draft=draft)
  assert got.tokens == want.tokens
  for ours, theirs in zip(got.log_probs, want.log_probs):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
  num = drafts.num_drafted(draft, model)
  assert all(a <= p for a, p in zip(got.accepted, got.proposed))
  if name in ('itself', 'window'):
    # It would have written the same; the last pass is cut by the limit.
    for accepted, proposed in zip(got.accepted, got.proposed):
      assert proposed - num < accepted <= proposed
      assert accepted == 24 - got.passes + (24 % (num + 1) != 0)
    assert got.passes == -(-24 // (num + 1))
  else:
    assert got.passes <= 24


def test_int8_windows_do_not_depend_on_how_many_tokens_run_at_a_time():
  model, draft = DRAFTS['window']()
  ask = dict(num_tokens=24, sampling=GREEDY, cache_dtype='int8')
  want = run(model, PROMPTS, **ask)
  got = speculate(model, PROMPTS, draft=draft, **ask)
  assert got.tokens == want.tokens
  for ours, theirs in zip(got.log_probs, want.log_probs):
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize('name', ['model', 'lookup'])
def test_ends_and_limits(name):
  model, draft = DRAFTS[name]()
  whole = run(model, PROMPTS, num_tokens=20, sampling=GREEDY)
  end = whole.tokens[0][7]
  kwargs = dict(sampling=GREEDY, eos_id=end)
  for num in (1, 2, 5, 20):
    want = run(model, PROMPTS, num_tokens=num, **kwargs)
    got = speculate(model, PROMPTS, num_tokens=num, draft=draft, **kwargs)
    assert got.tokens == want.tokens and got.ended == want.ended


def test_a_text_that_repeats_its_prompt_is_found_there():
  """Of a model that copies: its text goes round in a circle."""
  model = make()
  start = run(model, [[3, 4]], num_tokens=60, sampling=GREEDY).tokens[0]
  prompt = [[3, 4, *start]]
  got = speculate(
    model, prompt, num_tokens=30, sampling=GREEDY, draft=drafts.LookupDraft()
  )
  assert got.tokens == run(model, prompt, num_tokens=30, sampling=GREEDY).tokens
  assert got.passes < 15 and sum(got.accepted) > 15


@functools.cache
def joint(model, prompt, settings, num):
  """Returns the exact probability of every text of `num` tokens."""
  config = dict(settings)
  found = {}
  texts = list(itertools.product(range(6), repeat=num))
  rows = np.array([[*prompt, *text] for text in texts])
  logits = np.asarray(jax.jit(lambda m, x: m(x))(model, rows))
  own = sampling.rows([sampling.SamplingConfig(**config)], len(texts), 6)
  for i in range(num):
    at = logits[:, len(prompt) - 1 + i]
    probs = jax.nn.softmax(sampling.apply_truncation(at, own))
    for text, row in zip(texts, np.asarray(probs, np.float64)):
      found[text] = found.get(text, 1.0) * row[text[i]]
  return found


SIX = dict(vocab_size=6, vocab_multiple=2, init=param.Init(std=0.3))


FORMS = [{}, {'temperature': 0.7, 'top_k': 4}, {'top_p': 0.8}]
exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
  ('name', 'settings'),
  [
    ('model', FORMS[0]),
    exhaustive('model', FORMS[1]),
    ('heads', FORMS[2]),
    ('lookup', FORMS[1]),
    exhaustive('model', FORMS[2]),
    exhaustive('heads', FORMS[0]),
    exhaustive('heads', FORMS[1]),
    exhaustive('lookup', FORMS[0]),
    exhaustive('lookup', FORMS[2]),
  ],
  ids=str,
)
def test_what_is_drawn_has_the_models_distribution(name, settings):
  model = make(**SIX, ahead=(1.0, 1.0))
  draft = {
    'model': drafts.ModelDraft(model=make(seed=1, num_layers=1, **SIX), num=2),
    'heads': drafts.HeadsDraft(),
    'lookup': drafts.LookupDraft(num=2, match=1),
  }[name]
  prompt, num, rows = (1, 4, 1), 3, 8192
  got = speculate(
    model,
    [prompt] * rows,
    num_tokens=num,
    draft=draft,
    sampling=sampling.SamplingConfig(**settings),
    seed=3,
  )
  exact = joint(model, prompt, tuple(settings.items()), num)
  counts = dict.fromkeys(exact, 0)
  for text in got.tokens:
    counts[tuple(text)] += 1
  # Rare texts together, as the test wants five of each.
  common = [t for t in exact if exact[t] * rows >= 5]
  seen = [counts[t] for t in common]
  want = [exact[t] * rows for t in common]
  seen, want = [*seen, rows - sum(seen)], [*want, rows - sum(want)]
  if want[-1] < 1e-3:
    assert seen.pop() == 0
    want.pop()
  result = stats.chisquare(seen, np.array(want) / sum(want) * sum(seen))
  assert result.pvalue > 1e-3
  share = sum(got.accepted) / sum(got.proposed)
  assert 0.05 < share < 0.98, 'Tokens stay and are refused.'


def test_a_row_draws_the_same_alone_and_in_any_batch():
  model, draft = DRAFTS['model']()
  keys = jax.random.split(jax.random.key(4), len(PROMPTS))
  config = sampling.SamplingConfig(temperature=0.8)
  draw = functools.partial(
    speculate, model, num_tokens=12, draft=draft, sampling=config
  )
  together = draw(PROMPTS, keys_B=keys).tokens
  for i, prompt in enumerate(PROMPTS):
    assert draw([prompt], keys_B=keys[i : i + 1]).tokens[0] == together[i]


def test_forced_acceptance_for_timings():
  model, draft = DRAFTS['model']()
  got = speculate(
    model, PROMPTS * 20, num_tokens=40, draft=draft, sampling=GREEDY, forced=0.8
  )
  # Of three in a row, each counts only if those before it stayed.
  want = (0.8 + 0.8**2 + 0.8**3) / 3
  assert abs(sum(got.accepted) / sum(got.proposed) - want) < 0.03


def test_messages():
  model = make()
  ask = functools.partial(speculate, num_tokens=4)
  lookup = drafts.LookupDraft()
  with pytest.raises(ValueError, match='the model has none'):
    ask(model, [[1]], draft=drafts.HeadsDraft())
  other = make(vocab_size=24)
  with pytest.raises(ValueError, match='vocabulary of 24 tokens and the model'):
    ask(model, [[1]], draft=drafts.ModelDraft(model=other))
  with pytest.raises(ValueError, match='it drafts 1 to 63 tokens'):
    ask(model, [[1]], draft=drafts.LookupDraft(num=0))
  lin = make(attention=linear.Linear(num_heads=2, head_dim=8))
  with pytest.raises(ValueError, match='a state of constant size, from which'):
    ask(lin, [[1]], draft=lookup)
  config = sampling.SamplingConfig(repetition_penalty=1.1)
  with pytest.raises(ValueError, match='repetition_penalty=1.1 depends on the'):
    ask(model, [[1]], draft=lookup, sampling=config)
  t5 = encoder_decoder.EncoderDecoder(
    encoder_decoder.EncoderDecoderConfig(vocab_size=9, num_layers=1),
    rngs=nnx.Rngs(0),
  )
  with pytest.raises(ValueError, match='EncoderDecoder cannot check drafts'):
    ask(t5, [[1]], draft=lookup)
