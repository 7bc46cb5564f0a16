"""Words that a search must find: against all texts there are."""

import functools
import itertools

import numpy as np
import pytest
import test_beams
import test_generate

from t2x.decode import beams
from t2x.decode import generate
from t2x.decode import sampling

PROMPTS = test_generate.PROMPTS
exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)


def holds(text, words):
  has = lambda form: any(
    tuple(text[i : i + len(form)]) == tuple(form) for i in range(len(text))
  )
  return all(any(has(form) for form in word) for word in words)


WORDS = {
  'one': [[(4,)]],
  'two_tokens': [[(4, 4)]],
  'two_words': [[(5,)], [(0, 3)]],
  'forms': [[(5, 5, 5), (1, 5)]],
  'all_of_it': [[(3, 4), (5, 5)], [(0, 1)]],
}


@pytest.mark.parametrize(
  ('name', 'alpha'),
  [
    ('one', 0.0),
    ('two_tokens', 1.0),
    ('two_words', 0.0),
    ('forms', 1.0),
    ('all_of_it', 1.0),
    exhaustive('one', 1.0),
    exhaustive('two_tokens', 0.0),
    exhaustive('two_words', 1.0),
    exhaustive('forms', 0.0),
    exhaustive('all_of_it', 0.0),
  ],
)
def test_enough_beams_find_the_best_text_that_holds_them(name, alpha):
  end, most, prompt, words = 2, 4, (1, 3), WORDS[name]

  def texts():
    others = [t for t in range(6) if t != end]
    for n in range(most):
      yield from ((*text, end) for text in itertools.product(others, repeat=n))
    yield from itertools.product(others, repeat=most)

  def score(text):
    total = sum(
      test_beams.next_log_probs(prompt + text[:i])[t]
      for i, t in enumerate(text)
    )
    return total / len(text) ** alpha

  held = [text for text in texts() if holds(text, words)]
  best = sorted(held, key=score, reverse=True)[:3]
  found = generate.beam_search(
    test_beams.tiny(), [prompt], num_tokens=most, num_best=3, eos_id=end,
    words=words, chunk=16,
    beams=beams.BeamConfig(
      num_beams=150, length_penalty=alpha, early_stopping='never'
    ),
  )  # fmt: skip
  cut = lambda text: [t for t in text if t != end]
  assert found.tokens[0] == [cut(text) for text in best]
  np.testing.assert_allclose(
    found.scores[0], [score(t) for t in best], atol=1e-4
  )


@pytest.mark.parametrize('seed', [*range(5), *map(exhaustive, range(5, 12))])
@pytest.mark.parametrize('num_beams', [1, 3])
def test_few_beams_still_find_texts_that_hold_them(seed, num_beams):
  """Words at random that overlap, and hardly more tokens than they need."""
  rng = np.random.default_rng(seed)
  words = [
    [
      tuple(rng.integers(1, 5, rng.integers(1, 4)).tolist())
      for _ in range(rng.integers(1, 3))
    ]
    for _ in range(rng.integers(1, 4))
  ]
  least = sum(min(map(len, word)) for word in words)
  found = generate.beam_search(
    test_generate.make(),
    PROMPTS,
    num_tokens=least + int(rng.integers(0, 4)),
    words=words,
    eos_id=7,
    beams=beams.BeamConfig(num_beams=num_beams),
  )
  for texts in found.tokens:
    assert texts and all(holds(text, words) for text in texts)


def test_a_search_without_words_is_as_before():
  """A word that is there anyway costs nothing: enough beams find the same."""
  search = lambda **options: generate.beam_search(
    test_generate.make(), PROMPTS[:1], num_tokens=6, num_best=1,
    beams=beams.BeamConfig(num_beams=8), **options,
  )  # fmt: skip
  plain = search()
  (text,) = plain.tokens[0]
  with_words = search(words=[[tuple(text[2:4])]])
  assert with_words.tokens == plain.tokens
  np.testing.assert_allclose(with_words.scores, plain.scores, atol=1e-5)


def test_banned_words_and_penalties_hold_too():
  words = [[(5, 9)], [(11,)]]
  found = generate.beam_search(
    test_generate.make(), PROMPTS, num_tokens=8, words=words,
    beams=beams.BeamConfig(num_beams=4),
    sampling=sampling.SamplingConfig(banned=[(3,), (9, 11)]),
  )  # fmt: skip
  for texts in found.tokens:
    for text in texts:
      assert holds(text, words) and 3 not in text
      assert not holds(text, [[(9, 11)]])


def test_words_of_like_sizes_share_a_program():
  search = lambda words: generate.beam_search(
    test_generate.make(), PROMPTS, num_tokens=9, words=words,
    beams=beams.BeamConfig(num_beams=4),
  )  # fmt: skip
  search([[(5, 9)], [(11,)]])
  before = beams.search._cache_size()
  search([[(8, 1)], [(13,)]])
  search([[(8,)], [(1, 2)]])
  assert beams.search._cache_size() == before


def test_words_without_room_are_refused():
  search = lambda **options: generate.beam_search(
    test_generate.make(), PROMPTS, num_tokens=3, **options
  )
  with pytest.raises(ValueError, match='4 tokens, and the text may have 3'):
    search(words=[[(1, 2)], [(3, 4)]])
  with pytest.raises(ValueError, match='No text of 3 tokens was found'):
    search(words=[[(4,)]], sampling=sampling.SamplingConfig(banned=[(4,)]))
  with pytest.raises(ValueError, match='has no tokens'):
    search(words=[[()]])
  with pytest.raises(ValueError, match='num_groups=2 with words'):
    search(
      words=[[(1,)]],
      beams=beams.BeamConfig(num_beams=4, num_groups=2, diversity=0.5),
    )
