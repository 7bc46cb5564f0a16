"""Words that texts never hold: compared with a plain search in the texts."""

import itertools

from flax import nnx
import jax
import numpy as np
import pytest

from t2x.decode import banned as banned_lib
from t2x.decode import beams
from t2x.decode import constrained
from t2x.decode import drafts
from t2x.decode import engine as engine_lib
from t2x.decode import generate
from t2x.decode import pieces as pieces_lib
from t2x.decode import sampling as sampling_lib
from t2x.decode import speculative
from t2x.decode import steered
from t2x.models import decoder
from t2x.models import encoder_decoder

Sampling = sampling_lib.SamplingConfig
END = 1
# Letters, cuts of words in all ways, quotes, blanks, halves of characters.
TOKENS = [
  b'', b'', b'a', b'b', b'c', b'ab', b'ba', b'bb', b'abc', b'cab', b'bab',
  b' ', b' a', b' ab', b'"', b'"a', b'"b', b'\n', b'\nb', b'a\n',
  '\u00e9'.encode(), '\u00e9'.encode()[:1], '\u00e9'.encode()[1:],
  b'a' + '\u00e9'.encode()[:1], b'', b'aa', b'caba', b'c"',
]  # fmt: skip
PIECES = pieces_lib.TokenBytes(TOKENS)
V, LENGTH = len(TOKENS), 12


def joined(tokens):
  return b''.join(TOKENS[token] for token in tokens)


def draw_words(rng, num):
  letters = list('aaabbbcc "\n\u00e9')
  size = lambda: rng.integers(1, 6)
  return [''.join(rng.choice(letters, size())) for _ in range(num)]


def draw_prompts(rng, num):
  return [rng.integers(2, V, rng.integers(1, 5)).tolist() for _ in range(num)]


def assert_free(words, prompt, tokens):
  """No word ends within the new part of a text."""
  whole, start = joined([*prompt, *tokens]), len(joined(prompt))
  for word in words:
    found = [i for i in range(len(whole)) if whole.startswith(word.encode(), i)]
    ends = [i + len(word.encode()) for i in found]
    assert not [end for end in ends if end > start], (word, whole, start)
  text = joined(tokens).decode(errors='replace')
  assert not [word for word in words if word in text], (words, text)


def make(seed=0, **settings):
  config = decoder.DecoderConfig(
    vocab_size=V, num_layers=1, embed_dim=8, **settings
  )
  return decoder.Decoder(config, rngs=nnx.Rngs(seed))


@pytest.fixture(scope='module')
def model():
  return make()


def test_states_and_masks_are_those_of_a_naive_search():
  """Thousands of texts, each with every token that might be next."""
  rng = np.random.default_rng(0)
  masked = total = 0
  for _ in range(300):
    words = draw_words(rng, rng.integers(1, 5))
    banned = banned_lib.Banned(words, PIECES)
    prompt = draw_prompts(rng, 1)[0]
    state = banned.start(prompt)
    for _ in range(8):
      bits = np.unpackbits(
        banned.hidden(state).view(np.uint8), bitorder='little'
      )[:V]
      before = joined(prompt)
      for token, piece in enumerate(TOKENS):
        after = before + piece
        ends = any(
          after[:end].endswith(word.encode())
          for word in words
          for end in range(len(before) + 1, len(after) + 1)
        )
        assert bits[token] == ends, (words, before, piece)
      masked, total = masked + bits.sum(), total + V
      # Banned ones too: a prompt may hold what a text may not.
      token = int(rng.integers(V))
      prompt.append(token)
      state = banned.after(state, token)
  assert 0.1 < masked / total < 0.9


def test_the_devices_follow_as_the_host_does():
  rng = np.random.default_rng(1)
  lists = [banned_lib.Banned(draw_words(rng, 3), PIECES) for _ in range(5)]
  given = [*lists, None, lists[0]]
  prompts = draw_prompts(rng, len(given))
  rows = banned_lib.rows(given)
  state_B = np.asarray(rows.start(prompts))
  host = [b and b.start(p) for b, p in zip(given, prompts)]
  fn = jax.jit(lambda rows, state, token: rows.reader.after(state, token))
  for _ in range(30):
    logits_BV = np.asarray(rows(np.zeros((len(given), V), np.float32), state_B))
    for row, (banned, state) in enumerate(zip(given, host)):
      want = np.zeros(V, bool)
      if banned:
        bits = banned.hidden(state).view(np.uint8)
        want = np.unpackbits(bits, bitorder='little')[:V].astype(bool)
      np.testing.assert_array_equal(np.isneginf(logits_BV[row]), want)
    token_B = rng.integers(0, V, len(given)).astype(np.int32)
    state_B = fn(rows, state_B, token_B)
    host = [b and b.after(s, t) for b, s, t in zip(given, host, token_B)]


def settings_of(rng, num, **more):
  """Two lists of words over the rows, each row drawn in its own way."""
  lists = [banned_lib.Banned(draw_words(rng, 4), PIECES) for _ in range(2)]
  kinds = itertools.cycle([
    {'temperature': 0}, {}, {'top_k': 5}, {'top_p': 0.8, 'temperature': 1.5}
  ])  # fmt: skip
  return [
    Sampling(banned_words=lists[i % 2], **next(kinds), **more)
    for i in range(num)
  ]


def test_drawn_texts_in_hundreds(model):
  rng = np.random.default_rng(2)
  count, free = 0, 0
  for seed in range(4):
    prompts = draw_prompts(rng, 64)
    configs = settings_of(rng, 64)
    found = generate.generate(
      model, prompts, num_tokens=LENGTH, sampling=configs, seed=seed,
      eos_id=END,
    )  # fmt: skip
    plain = generate.generate(
      model, prompts, num_tokens=LENGTH, seed=seed, eos_id=END
    )
    for config, prompt, tokens, other in zip(
      configs, prompts, found.tokens, plain.tokens
    ):
      words = [word.decode() for word in config.banned_words.words]
      assert_free(words, prompt, tokens)
      free += any(w in joined(other).decode(errors='replace') for w in words)
      count += 1
  assert count == 256 and free > 100  # Without the ban they are written.


@pytest.mark.parametrize('groups', [1, 2])
def test_beams(model, groups):
  rng = np.random.default_rng(3)
  config = beams.BeamConfig(
    num_beams=4, num_groups=groups, diversity=0.5 * (groups > 1)
  )
  for _ in range(4):
    words = draw_words(rng, 4)
    banned = banned_lib.Banned(words, PIECES)
    prompts = draw_prompts(rng, 8)
    found = generate.beam_search(
      model, prompts, num_tokens=LENGTH, beams=config, num_best=4,
      sampling=Sampling(banned_words=banned), eos_id=END,
    )  # fmt: skip
    for prompt, texts in zip(prompts, found.tokens):
      assert texts
      for tokens in texts:
        assert_free(words, prompt, tokens)


def test_the_engine_writes_as_generate_does(model):
  rng = np.random.default_rng(4)
  prompts = draw_prompts(rng, 16)
  configs = settings_of(rng, 16)
  want = generate.generate(
    model, prompts, num_tokens=LENGTH, sampling=configs, seed=7, eos_id=END
  )
  engine = engine_lib.Engine(
    model, engine_lib.EngineConfig(num_slots=4, max_length=32)
  )
  texts = [
    engine.add(
      engine_lib.Request(
        prompt=prompt, num_tokens=LENGTH, sampling=config, seed=7, row=row,
        ends=(END,),
      )
    )
    for row, (prompt, config) in enumerate(zip(prompts, configs))
  ]  # fmt: skip
  while engine.is_busy:
    engine.step()
  for prompt, config, text in zip(prompts, configs, texts):
    words = [word.decode() for word in config.banned_words.words]
    assert_free(words, prompt, text.tokens)
  assert [text.tokens for text in texts] == want.tokens


class Only:
  """A control that lets some tokens come, and raises one."""

  is_done = False

  def __init__(self, tokens):
    bits = np.zeros(32, bool)
    bits[list(tokens)] = True
    self._bits = np.packbits(bits, bitorder='little').view(np.uint32)

  def allowed(self):
    return self._bits

  def raised(self):
    return {2: 5.0}

  def advance(self, token):
    del token

  def begin(self, prompt):
    del prompt
    return self


def test_beside_a_control(model):
  """With what a control allows, and an error where nothing is left."""
  banned = banned_lib.Banned(['aa', 'ab'], PIECES)
  config = Sampling(banned_words=banned)
  found = constrained.generate(
    model, [[3], [2]], num_tokens=LENGTH, control=Only([2, 3, 4, 5, 25]),
    sampling=config, eos_id=END, max_length=32,
  )  # fmt: skip
  for prompt, tokens in zip(([3], [2]), found.tokens):
    assert set(tokens) <= {2, 3, 4}
    assert_free(['aa', 'ab'], prompt, tokens)
  with pytest.raises(ValueError, match='No token may come next: what is bann'):
    constrained.generate(
      model, [[2]], num_tokens=4, control=Only([2, 5]), sampling=config,
      max_length=32,
    )  # fmt: skip


@pytest.mark.parametrize('kind', ['experts', 'gedi', 'encoder_decoder'])
def test_other_models(kind):
  rng = np.random.default_rng(5)
  if kind == 'experts':
    model = steered.Experts(make(0), make(1), make(2))
  elif kind == 'gedi':
    model = steered.Gedi(make(0), make(1), make(2))
  else:
    config = encoder_decoder.EncoderDecoderConfig(
      vocab_size=V, num_layers=1, embed_dim=8
    )
    model = encoder_decoder.EncoderDecoder(config, rngs=nnx.Rngs(0))
  prompts, configs = draw_prompts(rng, 16), settings_of(rng, 16)
  found = generate.generate(
    model, prompts, num_tokens=LENGTH, sampling=configs, eos_id=END
  )
  for prompt, config, tokens in zip(prompts, configs, found.tokens):
    words = [word.decode() for word in config.banned_words.words]
    assert_free(words, [] if kind == 'encoder_decoder' else prompt, tokens)


def test_a_text_that_nothing_is_left_for_ends(model):
  """Tokens without text are banned by their ids, and there is no end."""
  silent = {i: -np.inf for i, piece in enumerate(TOKENS) if not piece}
  letters = ['b', 'c', ' ', '"', '\n', '\u00e9', 'aaaa']
  # A half of a character is no text, and so is banned by its id as well.
  silent |= {i: -np.inf for i in (21, 22, 23)}
  config = Sampling(
    banned_words=banned_lib.Banned(letters, PIECES), bias=silent
  )
  found = generate.generate(model, [[3], [2]], num_tokens=9, sampling=config)
  assert [joined(tokens) for tokens in found.tokens] == [b'aaa', b'aa']
  assert found.ended == [True, True]
  with pytest.raises(ValueError, match='No text of 9 tokens was found: what'):
    generate.beam_search(model, [[3]], num_tokens=9, sampling=config)


def test_what_cannot_be_is_one_line(model):
  for word, message in (('', 'is empty'), ('\ud800', 'no valid Unicode')):
    with pytest.raises(ValueError, match=message):
      banned_lib.Banned(['a', word], PIECES)
  config = Sampling(banned_words=banned_lib.Banned(['a'], PIECES))
  other = pieces_lib.TokenBytes(TOKENS[:-1])
  small = Sampling(banned_words=banned_lib.Banned(['a'], other))
  with pytest.raises(ValueError, match=f'{V - 1} tokens, and the model has'):
    generate.generate(model, [[3]], num_tokens=4, sampling=small)
  with pytest.raises(ValueError, match=r"banned_words=Banned\(\['a'\]\) dep"):
    speculative.speculate(
      model, [[3]], num_tokens=4, draft=drafts.LookupDraft(), sampling=config
    )
