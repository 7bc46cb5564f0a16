"""Masking strategies, by counts with confidence bounds."""

import itertools
import math

import numpy as np
import pytest

from t2x.objectives import choosing
from t2x.objectives import lexicon as lexicon_lib
from t2x.objectives import masking
from t2x.objectives import noise

B, T, V, FIRST = 400, 96, 300, 105
NUM = 14
RNG = np.random.default_rng(0)
BEGINS = (np.arange(V) % 5 < 3) | (np.arange(V) < FIRST)  # 3 of 5 begin a word.
LEXICON = lexicon_lib.Lexicon(
  begins_V=BEGINS,
  breaks_V=np.arange(V) < FIRST,
  ends_V=np.zeros(V, bool),
  counts_V=np.where(np.arange(V) % 2, 1, 400),
)
TOKENS = RNG.integers(FIRST, V, (B, T))
SEGMENTS = np.where(np.arange(T) < 40, 1, 2) * np.ones((B, 1), int)
SEGMENTS[:, 90:] = 0
TOKENS[:, 90:] = 0
IS_TEXT = SEGMENTS > 0


def choose(config, tokens=TOKENS, lexicon=LEXICON, seed=0, num=NUM):
  keys = noise.keys(seed, np.arange(len(tokens)))
  num_B = np.full(len(tokens), num)
  segments, is_text = SEGMENTS[: len(tokens)], IS_TEXT[: len(tokens)]
  args = tokens, segments, is_text, num_B, keys, lexicon
  return choosing.choose(config, *args)


def units(config, seed=0, lexicon=LEXICON):
  keys = noise.keys(seed, np.arange(B))
  return choosing.units(config, TOKENS, SEGMENTS, keys, lexicon)


def words():
  """The word of each token, one after the other, by a loop."""
  result = np.zeros((B, T), int)
  for b, t in itertools.product(range(B), range(1, T)):
    new = BEGINS[TOKENS[b, t]] or SEGMENTS[b, t] != SEGMENTS[b, t - 1]
    result[b, t] = result[b, t - 1] + new
  return result


KINDS = {
  'tokens': masking.Tokens(),
  'words': masking.Words(),
  'spans': masking.Spans(),
  'rare': masking.Rare(),
  'hierarchy': masking.Hierarchy(),
}


@pytest.mark.parametrize('name', KINDS)
def test_the_count_is_kept_and_units_are_whole(name):
  config = KINDS[name]
  chosen, unit = choose(config), units(config)
  assert not chosen[~IS_TEXT].any()
  num = chosen.sum(1)
  assert num.max() <= NUM
  # What is left over is less than the smallest unit that is not chosen.
  assert num.mean() > NUM - 0.5
  for row, own in zip(chosen, unit):
    for number in np.unique(own[:90]):
      assert row[own == number].all() or not row[own == number].any()


@pytest.mark.parametrize('name', KINDS)
def test_no_place_is_preferred(name):
  """Each place is chosen as often as others, within 5 deviations."""
  often = np.mean([choose(KINDS[name], seed=s) for s in range(12)], (0, 1))[:90]
  share = NUM / 90
  spread = math.sqrt(share * (1 - share) / (B * 12))
  # Neighbours are chosen together, and runs end where a document does.
  wide = {'tokens': 5, 'words': 7, 'rare': 9}.get(name, 40)
  assert abs(often - often.mean()).max() < wide * spread
  assert often.mean() == pytest.approx(share, rel=0.05)


def test_words_are_those_of_the_marks():
  np.testing.assert_array_equal(units(masking.Words()), words())


def test_runs_are_geometric():
  config = masking.Spans(end=0.2, longest=10)
  run, word = units(config), words()
  lengths = []
  for b in range(B):
    # Runs that a document's end does not cut.
    for number in np.unique(run[b, :40])[:-1]:
      lengths.append(len(np.unique(word[b, :40][run[b, :40] == number])))
  want = 0.2 * 0.8 ** np.arange(10)
  want /= want.sum()
  assert want @ np.arange(1, 11) == pytest.approx(3.8, abs=0.01)
  # The last run of a document is left out, most of all the long ones.
  first = [len(np.unique(word[b, :40][run[b, :40] == 0])) for b in range(B)]
  counts = np.bincount(first, minlength=11)[1:]
  spread = np.sqrt(B * want * (1 - want))
  assert (abs(counts - B * want) < 4 * spread).all()
  assert max(lengths) == 10


def test_levels_of_a_hierarchy_are_drawn_by_their_weights():
  config = masking.Hierarchy(tokens=1, words=2, spans=5)
  levels = [masking.Tokens(), masking.Words(), config.run]
  own = units(config)
  shares = [(own == units(level)).all(1).mean() for level in levels]
  for share, want in zip(shares, (1 / 8, 2 / 8, 5 / 8)):
    assert share == pytest.approx(want, abs=4 * math.sqrt(0.25 / B))


@pytest.mark.parametrize('power', [0.0, 0.5, 1.0])
def test_rare_words_come_more_often(power):
  every = np.ones(V, bool)
  lexicon = lexicon_lib.Lexicon(
    begins_V=every,
    breaks_V=~every,
    ends_V=~every,
    counts_V=LEXICON.counts_V,
  )
  config = masking.Rare(power=power)
  chosen = np.concatenate(
    [choose(config, lexicon=lexicon, seed=s, num=1) for s in range(20)]
  )
  rare = np.tile(TOKENS % 2 == 1, (20, 1)) & np.tile(IS_TEXT, (20, 1))
  num = chosen.sum()
  share = chosen[rare].sum() / num
  # One of about 90 words is drawn: by weights 2^-p and 401^-p.
  rows = rare.sum(1) * 2.0**-power
  want = (rows / (rows + (90 - rare.sum(1)) * 401.0**-power)).mean()
  assert share == pytest.approx(want, abs=4 * math.sqrt(0.25 / num))


def even_alone(tokens_BT, segments_BT, lexicon):
  """A rule: even tokens, those of the second document twice as often."""
  del lexicon
  return (tokens_BT % 2 == 0) * np.where(segments_BT == 2, 2.0, 1.0)


def test_a_rule_of_ones_own():
  every = np.ones(V, bool)
  lexicon = lexicon_lib.Lexicon(
    begins_V=every,
    breaks_V=~every,
    ends_V=~every,
    counts_V=LEXICON.counts_V,
  )
  config = masking.Scored(rule=f'{__name__}:even_alone')
  chosen = np.concatenate(
    [choose(config, lexicon=lexicon, seed=s, num=1) for s in range(20)]
  )
  tokens, segments = np.tile(TOKENS, (20, 1)), np.tile(SEGMENTS, (20, 1))
  assert not chosen[tokens % 2 == 1].any()
  share = chosen[segments == 2].sum() / chosen.sum()
  # 40 tokens of the first, 50 of the second, which weigh twice as much.
  assert share == pytest.approx(100 / 140, abs=4 * math.sqrt(0.25 / 8000))


def negative(tokens_BT, segments_BT, lexicon):
  return -1.0 - 0 * tokens_BT


def nothing_at_all(tokens_BT, segments_BT, lexicon):
  return 0.0 * tokens_BT


def of_two(tokens_BT, segments_BT):
  return 1.0 + 0 * tokens_BT


def test_a_rule_that_chooses_nothing_is_told(caplog):
  rule = f'{__name__}:nothing_at_all'
  for _ in range(2):
    assert not choose(masking.Scored(rule=rule)).any()
  assert caplog.text.count('so none is predicted') == 1


def test_rules_that_cannot_be():
  with pytest.raises(ValueError, match='Name a function of three arguments'):
    masking.Scored(rule=f'{__name__}:of_two')
  with pytest.raises(ValueError, match='not a callable object'):
    masking.Scored(rule=f'{__name__}:V')
  for rule in ('nowhere:rule', f'{__name__}:nothing', 'math'):
    with pytest.raises(ValueError, match=f'rule={rule!r} cannot be imported'):
      masking.Scored(rule=rule)
  with pytest.raises(ValueError, match='the least -1.0; it must return'):
    choose(masking.Scored(rule=f'{__name__}:negative'))


# --- Phrases. ---


def pmi(text, run):
  """log p(run) less the best cut's, by loops over all cuts."""
  count = lambda part: sum(
    text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1)
  )
  log_p = lambda part: math.log(count(part) / (len(text) - len(part) + 1))
  cuts = []
  for bits in itertools.product((0, 1), repeat=len(run) - 1):
    if any(bits):
      ends = [i + 1 for i, bit in enumerate(bits) if bit] + [len(run)]
      parts = [run[a:b] for a, b in zip([0, *ends], ends)]
      cuts.append(sum(map(log_p, parts)))
  return log_p(run) - max(cuts)


def test_phrases_have_the_most_mutual_information():
  rng = np.random.default_rng(1)
  text = rng.integers(FIRST, FIRST + 30, 3000)
  for place in rng.choice(290, 60, replace=False):
    text[10 * place : 10 * place + 3] = 250, 251, 252
  for place in rng.choice(290, 40, replace=False):
    text[10 * place + 5 : 10 * place + 7] = 260, 261
  inside = np.ones(len(text), bool)
  found = lexicon_lib.find_phrases(
    text, inside, longest=3, most=6, least_count=5
  )
  listed = text.tolist()
  scores = {}
  for num in (2, 3):
    runs = {tuple(listed[i : i + num]) for i in range(len(listed) - num + 1)}
    for run in runs:
      often = sum(
        tuple(listed[i : i + num]) == run for i in range(len(listed) - num + 1)
      )
      if often >= 5:
        scores[run] = pmi(listed, list(run))
  best = sorted(scores, key=scores.__getitem__)[-6:]
  assert {(250, 251), (251, 252), (260, 261)} <= set(best)
  for num, known in zip((2, 3), found):
    want = {
      int(lexicon_lib.hashes(np.array(run), num)[0])
      for run in best
      if len(run) == num
    }
    assert {int(h) for h in known} == want


def test_a_phrase_is_one_unit():
  tokens = TOKENS.copy()
  tokens[:, 10:13] = 110, 111, 112
  tokens[:, 39:41] = 110, 111  # Across two documents.
  hashes = lambda *run: lexicon_lib.hashes(np.array(run), len(run))
  lexicon = lexicon_lib.Lexicon(
    begins_V=BEGINS,
    breaks_V=~BEGINS,
    ends_V=~BEGINS,
    counts_V=LEXICON.counts_V,
    phrases=(hashes(110, 111), hashes(110, 111, 112)),
  )
  keys = noise.keys(0, np.arange(B))
  unit = choosing.units(masking.Phrases(), tokens, SEGMENTS, keys, lexicon)
  assert (unit[:, 10] == unit[:, 12]).all()
  assert (unit[:, 12] + 1 == unit[:, 13]).all()
  assert (unit[:, 39] + 1 == unit[:, 40]).all()
  chosen = choose(masking.Phrases(), tokens, lexicon)
  assert (chosen[:, 10] == chosen[:, 11]).all()
  assert chosen[:, 10].any() and not chosen[:, 10].all()


def test_settings_out_of_range():
  with pytest.raises(ValueError, match='masking.end=0; it is a chance above 0'):
    masking.Spans(end=0)
  with pytest.raises(ValueError, match='must not be negative, and not all 0'):
    masking.Hierarchy(tokens=0, words=0, spans=0)
