"""Keywords that are in a text whatever its tokens: against a naive search."""

import itertools
import re

import jax
import numpy as np
import pytest
import test_banned
import test_beams

from t2x.decode import beams
from t2x.decode import generate
from t2x.decode import pieces as pieces_lib
from t2x.decode import word_starts
from t2x.inference import keyword_constraints

LETTERS = list('aab "\n.\u00e9\u201c\u6f22\u20ac1') + [
  '\U00010330',
  '\U0001f642',
]
BYTES = pieces_lib.TokenBytes([bytes([b]) for b in range(256)])


def holds(before, text, word, from_start):
  """Whether a word is in a text after what was before, both bytes."""
  whole = before + text
  for found in re.finditer(b'(?=' + re.escape(word.encode()) + b')', whole):
    start = found.start()
    left = whole[:start].decode(errors='replace')
    free = not (from_start and left and left[-1].isalnum())
    if start >= len(before) and free:
      return True
  return False


def draw(rng, most, letters=LETTERS):
  return ''.join(rng.choice(letters, rng.integers(1, most)))


@pytest.mark.parametrize('from_start', [True, False])
def test_thousands_of_texts_byte_by_byte(from_start):
  """Whole, and with bytes left out or put in, which break characters."""
  rng = np.random.default_rng(0)
  count = found = 0
  for number in range(400):
    # Of few letters, words begin within words.
    letters = LETTERS if number % 2 else ['a', 'a', '"']
    words = [draw(rng, 5, letters) for _ in range(3)]
    made = word_starts.WordFinder(words, [from_start] * 3, BYTES)
    for _ in range(5):
      text = bytearray(draw(rng, 14, letters).encode())
      for _ in range(rng.integers(0, 3)):
        text[int(rng.integers(len(text)))] = int(rng.integers(256))
      text = bytes(text)
      cut = int(rng.integers(len(text) + 1))
      states = made.start(list(text[:cut]))
      for end in range(cut, len(text) + 1):
        want = {
          k for k, word in enumerate(words)
          if holds(text[:cut], text[cut:end], word, from_start)
        }  # fmt: skip
        assert made.found(states) == want, (words, text[:cut], text[cut:end])
        if end < len(text):
          states = made.after(states, text[end])
      count, found = count + 1, found + len(want)
  assert count == 2000 and 200 < found


def test_the_devices_follow_as_the_host_does():
  rng = np.random.default_rng(1)
  words = ['ab', '\u00e9', '" a', 'abab']
  made = word_starts.WordFinder(
    words, [True, True, False, True], test_banned.PIECES
  )
  prompts = test_banned.draw_prompts(rng, 3)
  arrays = word_starts.arrays(made, prompts)
  fn = jax.jit(lambda arrays, state, token: arrays.after(state, token))
  for row, prompt in enumerate(prompts):
    host, state_K = made.start(prompt), np.asarray(arrays.start_BK)[row]
    for token in rng.integers(0, test_banned.V, 40):
      host = made.after(host, int(token))
      state_K = np.asarray(fn(arrays, state_K, token))
      found = set(np.flatnonzero(state_K == arrays.whole_K).tolist())
      assert found == made.found(host)
    assert found


def test_keywords_are_met_by_their_text():
  """Random draws of what is allowed; the end comes when all are there."""
  rng = np.random.default_rng(2)
  words = ['ab', 'cab']
  token = test_banned.TOKENS.index
  forms = [[(token(b' ab'),)], [(token(b' '), token(b'cab'))]]
  texts = word_starts.WordFinder(words, [True, True], test_banned.PIECES)
  early = 0
  for _ in range(200):
    prompt = test_banned.draw_prompts(rng, 1)[0]
    made = keyword_constraints.Keywords(
      forms, num_tokens=30, vocab_size=test_banned.V, ends=(1,), texts=texts,
      strength=0.0,
    ).begin(prompt)  # fmt: skip
    tokens, before = [], test_banned.joined(prompt)
    while len(tokens) < 30:
      bits = np.unpackbits(made.allowed().view(np.uint8), bitorder='little')
      text = test_banned.joined(tokens)
      missing = [
        k for k, word in enumerate(words) if not holds(before, text, word, True)
      ]
      assert made.missing == missing and bits[1] == (not missing)
      if not missing:
        break
      allowed = np.flatnonzero(bits[: test_banned.V])
      tokens.append(int(rng.choice(allowed)))
      made.advance(tokens[-1])
    assert not made.missing
    own = any(tuple(tokens[i : i + 1]) == forms[0][0] for i in range(30))
    early += not own
  assert early > 20  # The word was there without its own tokens.


def test_enough_beams_find_the_best_text_that_holds_a_word():
  """Of all texts, of which many have it in other tokens than its form."""
  end, most, prompt = 2, 4, (1, 3)
  spelled = [b'a', b'b', b'', b'ab', b'"', b' a']
  texts = word_starts.WordFinder(['ab'], [True], pieces_lib.TokenBytes(spelled))
  join = lambda tokens: b''.join(spelled[token] for token in tokens)

  def all_texts():
    others = [t for t in range(6) if t != end]
    for n in range(most):
      yield from ((*text, end) for text in itertools.product(others, repeat=n))
    yield from itertools.product(others, repeat=most)

  def score(text):
    return sum(
      test_beams.next_log_probs(prompt + text[:i])[t]
      for i, t in enumerate(text)
    )

  has = lambda tokens: holds(join(prompt), join(tokens), 'ab', True)

  def in_time(text):
    """Beams that have no room left for the word's own tokens are dropped."""
    parts = [text[:n] for n in range(1, len(text) + 1)]
    return all(has(p) or 2 - (p[-1] == 5) <= most - len(p) for p in parts)

  held = [text for text in all_texts() if has(text) and in_time(text)]
  assert len(held) > sum((5, 1) in zip(t, t[1:]) for t in held) > 0
  best = sorted(held, key=score, reverse=True)[:3]
  found = generate.beam_search(
    test_beams.tiny(), [prompt], num_tokens=most, num_best=3, eos_id=end,
    words=[[(5, 1)]], texts=texts, chunk=16,
    beams=beams.BeamConfig(
      num_beams=150, length_penalty=0.0, early_stopping='never'
    ),
  )  # fmt: skip
  cut = lambda text: [t for t in text if t != end]
  assert found.tokens[0] == [cut(text) for text in best]
