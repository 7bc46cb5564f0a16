"""Steered decoders against their formulas, the whole text at every step."""

from flax import nnx
import jax.numpy as jnp
import numpy as np
import pytest
import test_generate

from t2x.decode import beams
from t2x.decode import decoding_weights
from t2x.decode import drafts
from t2x.decode import engine as engine_lib
from t2x.decode import generate
from t2x.decode import sampling
from t2x.decode import speculative
from t2x.decode import steered
from t2x.layers import position
from t2x.models import decoder

GREEDY = sampling.SamplingConfig(temperature=0)
PROMPTS = test_generate.PROMPTS
VOCAB = test_generate.VOCAB


def make(seed, **changes):
  shared = test_generate.SHARED | test_generate.DECODERS['learned'] | changes
  return decoder.Decoder(decoder.DecoderConfig(**shared), rngs=nnx.Rngs(seed))


@pytest.fixture(scope='module')
def models():
  return [
    make(0),
    make(1, num_layers=1, logit_soft_cap=2.0),
    make(2, embed_dim=16),
  ]


def log_softmax(z):
  z = np.asarray(z, np.float64)
  z = z - z.max(-1, keepdims=True)
  return z - np.log(np.exp(z).sum(-1, keepdims=True))


def last(model, tokens):
  """Logits after a text, of the whole text, padded to one length."""
  row = np.zeros((1, 64), np.int32)
  row[0, : len(tokens)] = tokens
  return np.asarray(test_generate.forward(model, row, {}))[0, : len(tokens)]


def greedy(prompt, num, logits_of):
  tokens = []
  for _ in range(num):
    tokens.append(int(np.argmax(logits_of([*prompt, *tokens], len(prompt)))))
  return tokens


@pytest.mark.parametrize('has_anti', [True, False])
def test_experts_are_their_formula(models, has_anti):
  base, expert, anti = models
  anti = anti if has_anti else None
  joined = steered.Experts(base, expert, anti, strength=1.5)

  def logits_of(tokens, _):
    z, wanted, unwanted = (
      last(m, tokens)[-1] for m in (base, expert, anti or base)
    )
    return z + 1.5 * (wanted - unwanted)

  found = generate.generate(joined, PROMPTS, num_tokens=8, sampling=GREEDY)
  plain = generate.generate(base, PROMPTS, num_tokens=8, sampling=GREEDY)
  for prompt, tokens in zip(PROMPTS, found.tokens):
    assert tokens == greedy(prompt, 8, logits_of)
  assert found.tokens != plain.tokens
  np.testing.assert_allclose(
    joined(jnp.array([PROMPTS[1]]))[0, -1],
    logits_of(PROMPTS[1], 0),
    atol=1e-4,
  )


def test_no_strength_leaves_the_base(models):
  base, expert, anti = models
  plain = generate.generate(base, PROMPTS, num_tokens=6, seed=3)
  for joined in (
    steered.Experts(base, expert, anti, strength=0.0),
    steered.Gedi(base, expert, anti, strength=0.0),
  ):
    found = generate.generate(joined, PROMPTS, num_tokens=6, seed=3)
    assert found.tokens == plain.tokens


@pytest.mark.parametrize('prefix', [((), ()), ((7, 8), (9, 8))])
def test_gedi_is_its_formula(models, prefix):
  base, wanted, other = models
  if prefix[0]:
    other = wanted
  joined = steered.Gedi(
    base,
    wanted,
    other,
    wanted_prefix=prefix[0],
    other_prefix=prefix[1],
    strength=4.0,
    sharpness=2.0,
  )

  def logits_of(tokens, num_prompt):
    """Equations 4 and 5, from the whole text each time."""
    sums = []
    for model, before in zip((wanted, other), prefix):
      log_probs = log_softmax(last(model, [*before, *tokens]))
      start = len(before) + num_prompt
      said = sum(
        log_probs[i - 1, token]
        for i, token in enumerate([*before, *tokens])
        if i >= start
      )
      sums.append(said + log_probs[-1])
    count = len(tokens) - num_prompt + 1
    ratio = 2.0 * (sums[1] - sums[0]) / count
    log_class = -np.log1p(np.exp(ratio))
    return log_softmax(last(base, tokens)[-1]) + 4.0 * log_class

  found = generate.generate(joined, PROMPTS, num_tokens=8, sampling=GREEDY)
  plain = generate.generate(base, PROMPTS, num_tokens=8, sampling=GREEDY)
  for prompt, tokens in zip(PROMPTS, found.tokens):
    assert tokens == greedy(prompt, 8, logits_of)
  assert found.tokens != plain.tokens


def test_prepared_models_write_the_same(models):
  plain = steered.Experts(*models)
  fast = decoding_weights.prepare(
    steered.Experts(*map(decoding_weights.prepare, models))
  )
  write = lambda model: generate.generate(model, PROMPTS, num_tokens=6, seed=1)
  assert write(plain).tokens == write(fast).tokens


def test_beams_find_the_likeliest_steered_text(models):
  """One beam is greedy, and of many the best is no worse."""
  for joined in (steered.Experts(*models), steered.Gedi(*models, strength=3.0)):
    greedy = generate.generate(joined, PROMPTS, num_tokens=5, sampling=GREEDY)
    one, many = (
      generate.beam_search(
        joined, PROMPTS, num_tokens=5, beams=beams.BeamConfig(num_beams=num)
      )
      for num in (1, 6)
    )
    assert [texts[0] for texts in one.tokens] == greedy.tokens
    assert all(b[0] >= a[0] - 1e-5 for a, b in zip(one.scores, many.scores))


def test_experts_are_served(models):
  joined = steered.Experts(*models)
  config = engine_lib.EngineConfig(num_slots=4, page_size=8, chunks=(16,))
  engine = engine_lib.Engine(joined, config)
  texts = [
    engine.add(engine_lib.Request(prompt=prompt, num_tokens=8, sampling=GREEDY))
    for prompt in PROMPTS
  ]
  while engine.is_busy:
    engine.step()
  found = generate.generate(joined, PROMPTS, num_tokens=8, sampling=GREEDY)
  assert [text.tokens for text in texts] == found.tokens


def test_what_cannot_steer_is_refused(models):
  base, expert, _ = models
  with pytest.raises(ValueError, match='one tokenizer in common'):
    steered.Experts(base, make(1, vocab_size=VOCAB + 1))
  with pytest.raises(ValueError, match='of one length'):
    steered.Gedi(base, expert, expert, wanted_prefix=[1])
  with pytest.raises(ValueError, match='plain'):
    steered.Experts(base, steered.Experts(base, expert))
  with pytest.raises(ValueError, match='not served'):
    engine_lib.Engine(steered.Gedi(base, expert, expert))


def test_speculation_and_single_tokens_are_refused(models):
  for joined in (steered.Experts(*models), steered.Gedi(*models)):
    with pytest.raises(ValueError, match='which speculation does not run'):
      speculative.speculate(
        joined, PROMPTS, num_tokens=4, draft=drafts.LookupDraft()
      )
  with pytest.raises(ValueError, match='chunk=1; Gedi'):
    generate.generate(joined, PROMPTS, num_tokens=4, chunk=1)


def test_the_fewest_positions_count(models):
  base, expert, _ = models
  few = make(3, position=position.Learned(max_length=20, std=0.5))
  assert steered.Experts(base, few).config.max_length == 20
  joined = steered.Gedi(
    base, few, few, wanted_prefix=[1, 2], other_prefix=[3, 2]
  )
  assert joined.config.max_length == 18
  with pytest.raises(ValueError, match='a sequence may hold 18'):
    generate.generate(joined, [[1] * 15], num_tokens=4)
  rotary = make(4, position=position.Rotary())
  assert steered.Experts(rotary, few).config.max_length == 20
