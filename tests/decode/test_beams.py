"""Beam search: token for token that of transformers, and of plain Python."""

import functools
import itertools

import extras
from flax import nnx
import jax
import numpy as np
import pytest

from t2x.decode import beams as beams_lib
from t2x.decode import generate
from t2x.decode import sampling
from t2x.interop import configs
from t2x.interop import names
from t2x.layers import param
from t2x.models import decoder

VOCAB = 41
PROMPTS = [[3, 9, 11], list(range(10, 20)), [5, 6]]
Config = beams_lib.BeamConfig


@functools.cache
def theirs(kind):
  torch = extras.need('torch', extra='reference')
  transformers = extras.need('transformers', extra='reference')
  torch.manual_seed(0)
  ids = dict(eos_token_id=None, pad_token_id=0, bos_token_id=None)
  if kind == 'gpt2':
    config = transformers.GPT2Config(
      vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=3, n_positions=64,
      resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **ids,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
  else:
    config = transformers.T5Config(
      vocab_size=VOCAB, d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3,
      dropout_rate=0, decoder_start_token_id=0, **ids,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.add_(0.15 * torch.randn_like(parameter))
  return model.eval()


@functools.cache
def ours(kind):
  model = theirs(kind)
  family, config = configs.to_t2x(model.config.to_dict())
  state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
  return names.to_t2x(family, config, state)


@functools.cache
def end_of(kind):
  """A token that a likely text holds, so that some texts end early."""
  greedy = sampling.SamplingConfig(temperature=0)
  found = generate.generate(
    ours(kind), PROMPTS[:1], num_tokens=8, sampling=greedy, chunk=16
  )
  return found.tokens[0][4]


def their_beams(kind, prompt, num_best, **kwargs):
  import torch

  found = theirs(kind).generate(
    torch.tensor([prompt]),
    num_return_sequences=num_best,
    return_dict_in_generate=True,
    output_scores=True,
    do_sample=False,
    eos_token_id=end_of(kind),
    **kwargs,
  )
  skip = len(prompt) if kind == 'gpt2' else 1
  texts = [row[skip:].tolist() for row in found.sequences]
  end = end_of(kind)
  cut = lambda row: row[: row.index(end)] if end in row else row
  return [cut(row) for row in texts], found.sequences_scores.tolist()


@pytest.mark.reference
@pytest.mark.parametrize('kind', ['gpt2', 't5'])
@pytest.mark.parametrize(
  'num_beams, penalty, early',
  [
    (1, 1.0, 'heuristic'),
    (2, 1.0, 'first'),
    (4, 1.0, 'heuristic'),
    (4, 0.0, 'never'),
    (4, 2.0, 'never'),
    (5, -1.0, 'heuristic'),
    (3, 2.5, 'first'),
  ],
)
def test_texts_and_scores_are_those_of_transformers(
  kind, num_beams, penalty, early
):
  names = {'heuristic': False, 'first': True, 'never': 'never'}
  got = generate.beam_search(
    ours(kind),
    PROMPTS,
    num_tokens=12,
    beams=Config(
      num_beams=num_beams, length_penalty=penalty, early_stopping=early
    ),
    num_best=num_beams,
    eos_id=end_of(kind),
    chunk=16,
  )
  if num_beams == 1:  # They search greedily then, and report no scores.
    greedy = sampling.SamplingConfig(temperature=0)
    want = generate.generate(
      ours(kind), PROMPTS, num_tokens=12, sampling=greedy, chunk=16,
      eos_id=end_of(kind),
    )  # fmt: skip
    assert [texts[0] for texts in got.tokens] == want.tokens
    return
  ended = 0
  for i, prompt in enumerate(PROMPTS):
    texts, scores = their_beams(
      kind, prompt, num_beams, num_beams=num_beams, max_new_tokens=12,
      length_penalty=penalty, early_stopping=names[early],
    )  # fmt: skip
    assert got.tokens[i] == texts
    np.testing.assert_allclose(got.scores[i], scores, atol=1e-4)
    ended += sum(len(text) < 12 for text in texts)
  assert ended, 'No text ended, so nothing of what follows from it was seen.'


@pytest.mark.reference
@pytest.mark.parametrize('kind', ['gpt2', 't5'])
def test_processors_are_those_of_transformers(kind):
  words = [[11], [3, 4]]
  settings = sampling.SamplingConfig(
    repetition_penalty=1.4, min_tokens=4, banned=words
  )
  got = generate.beam_search(
    ours(kind), PROMPTS, num_tokens=10, beams=Config(num_beams=3), num_best=2,
    sampling=settings, eos_id=end_of(kind), chunk=16,
  )  # fmt: skip
  for i, prompt in enumerate(PROMPTS):
    texts, scores = their_beams(
      kind, prompt, 2, num_beams=3, max_new_tokens=10, min_new_tokens=4,
      repetition_penalty=1.4, bad_words_ids=words,
    )  # fmt: skip
    assert got.tokens[i] == texts
    np.testing.assert_allclose(got.scores[i], scores, atol=1e-4)


# --- Against every text there is, and against plain Python. ---


@functools.cache
def tiny():
  config = decoder.DecoderConfig(
    vocab_size=6, num_layers=1, embed_dim=16, init=param.Init(std=0.5)
  )
  return decoder.Decoder(config, rngs=nnx.Rngs(0))


@functools.cache
def next_log_probs(tokens):
  row = np.zeros((1, 16), np.int32)
  row[0, : len(tokens)] = tokens
  return np.asarray(of_tiny()(row)[0, len(tokens) - 1])


@functools.cache
def of_tiny():
  """Compiled once, as hundreds of texts are asked for."""
  model = tiny()
  return jax.jit(lambda row: jax.nn.log_softmax(model(row)))


@pytest.mark.parametrize('form', ['power', 'gnmt'])
@pytest.mark.parametrize('alpha', [0.0, 1.0])
def test_enough_beams_find_the_best_of_all_texts(form, alpha):
  end, most, prompt = 2, 4, (1, 3)

  def texts():
    others = [t for t in range(6) if t != end]
    for n in range(most):
      yield from ((*text, end) for text in itertools.product(others, repeat=n))
    yield from itertools.product(others, repeat=most)

  def score(text):
    total = sum(
      next_log_probs(prompt + text[:i])[t] for i, t in enumerate(text)
    )
    n = len(text)
    return total / ((5 + n) / 6 if form == 'gnmt' else n) ** alpha

  best = sorted(texts(), key=score, reverse=True)[:3]
  found = generate.beam_search(
    tiny(), [prompt], num_tokens=most, num_best=3, eos_id=end, chunk=16,
    beams=Config(
      num_beams=150, length_penalty=alpha, length_form=form,
      early_stopping='never',
    ),
  )  # fmt: skip
  cut = lambda text: [t for t in text if t != end]
  assert found.tokens[0] == [cut(text) for text in best]
  np.testing.assert_allclose(
    found.scores[0], [score(t) for t in best], atol=1e-4
  )


def naive_groups(prompt, groups, width, diversity, num_tokens):
  """Vijayakumar et al. 2018, algorithm 1, without an end token."""
  beams = [[((), 0.0)] for _ in range(groups)]
  for _ in range(num_tokens):
    taken = np.zeros(6)
    for g in range(groups):
      options = [
        ((*text, t), total + next_log_probs(prompt + text)[t] - diversity * n)
        for text, total in beams[g]
        for t, n in enumerate(taken)
      ]
      options.sort(key=lambda option: -option[1])
      beams[g] = options[:width]
      for text, _ in beams[g]:
        taken[text[-1]] += 1
  everyone = [option for group in beams for option in group]
  return sorted(everyone, key=lambda option: -option[1])


@pytest.mark.parametrize('diversity', [0.3, 2.0])
def test_groups_keep_away_from_each_other(diversity):
  prompt = (1, 3)
  found = generate.beam_search(
    tiny(), [prompt, (4,)], num_tokens=4, num_best=6, chunk=16,
    beams=Config(
      num_beams=6, num_groups=3, diversity=diversity, length_penalty=0.0
    ),
  )  # fmt: skip
  want = naive_groups(prompt, 3, 2, diversity, 4)
  assert found.tokens[0] == [list(text) for text, _ in want]
  np.testing.assert_allclose(found.scores[0], [s for _, s in want], atol=1e-4)
  plain = generate.beam_search(
    tiny(), [prompt], num_tokens=4, num_best=6, chunk=16,
    beams=Config(num_beams=6, length_penalty=0.0),
  )  # fmt: skip
  assert plain.tokens != found.tokens[:1]


def test_a_prompt_finds_the_same_alone_and_among_others():
  search = functools.partial(
    generate.beam_search, ours('gpt2'), num_tokens=9, num_best=3, chunk=16,
    beams=Config(num_beams=3), eos_id=end_of('gpt2'),
  )  # fmt: skip
  together = search(PROMPTS)
  for i, prompt in enumerate(PROMPTS):
    assert search([prompt]).tokens[0] == together.tokens[i]


def test_one_program_for_all_lengths():
  before = beams_lib.search._cache_size()
  for prompt, num in (([4], 5), ([4, 5, 1], 7), ([2] * 30, 3)):
    generate.beam_search(tiny(), [prompt], num_tokens=num, eos_id=2)
  assert beams_lib.search._cache_size() == before + 1


def test_messages():
  for settings, message in (
    ({'num_beams': 0}, 'num_beams=0, num_groups=1; both are 1 or more'),
    ({'num_beams': 4, 'num_groups': 3}, 'num_beams=4 are not 3 groups'),
    ({'num_groups': 2}, 'diversity=0.0 with num_groups=2'),
    ({'length_form': 'log'}, "length_form='log'; it is one of power, gnmt"),
    ({'early_stopping': True}, 'early_stopping=True; it is one of'),
  ):
    with pytest.raises(ValueError, match=message):
      Config(**settings)
  with pytest.raises(ValueError, match='num_best=5, and the search keeps'):
    generate.beam_search(tiny(), [[1]], num_tokens=2, num_best=5)
  drawing = sampling.SamplingConfig(top_k=3)
  with pytest.raises(ValueError, match='beam_search draws nothing'):
    generate.beam_search(tiny(), [[1]], num_tokens=2, sampling=drawing)


def test_only_texts_that_there_are_come_back():
  found = generate.beam_search(
    tiny(), [[1, 3]], num_tokens=1, num_best=9, beams=Config(num_beams=9),
    chunk=16,
  )  # fmt: skip
  assert sorted(found.tokens[0]) == [[t] for t in range(6)]
  assert min(found.scores[0]) > -100 and len(found.ended[0]) == 6


def test_rows_that_pad_the_batch_do_not_keep_a_search_going():
  """One prompt whose text ends at once, and three rows of padding."""
  ends = list(range(6))
  steps = []
  original = beams_lib.decode_loop.next_logits

  def counted(*args):
    jax.debug.callback(lambda: steps.append(1))
    return original(*args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(beams_lib.decode_loop, 'next_logits', counted)
    beams_lib.search.clear_cache()
    generate.beam_search(
      tiny(), [[1, 3]], num_tokens=9, eos_id=ends[:5], chunk=16,
      beams=Config(num_beams=2, early_stopping='first'),
    )  # fmt: skip
    jax.effects_barrier()
  beams_lib.search.clear_cache()
  assert 1 <= len(steps) <= 3
