"""Rows of two sentences, read back and found in their documents."""

import dataclasses

import numpy as np
import pytest

from t2x.data import config as config_lib
from t2x.data import input_pipeline
from t2x.data import sentences
from t2x.data import token_store
from t2x.objectives import lexicon
from t2x.objectives import masked_lm
from t2x.objectives import next_sentence
from t2x.objectives import noise
from t2x.objectives import vocab as vocab_lib

DOT, SIZE, LENGTH = 105, 9000, 32


def documents():
  """40 of 1 to 12 sentences; no word comes twice."""
  rng = np.random.default_rng(0)
  words = iter(range(DOT + 1, SIZE))
  found = []
  for _ in range(40):
    ids = [vocab_lib.BOS]
    for _ in range(rng.integers(1, 12)):
      ids += [*(next(words) for _ in range(rng.integers(3, 10))), DOT]
    if not found:  # No sentence ends, and it is longer than a row.
      ids[1:] = [next(words) for _ in range(3 * LENGTH)]
    found.append(np.array([*ids, vocab_lib.EOS], np.uint32))
  return found


@pytest.fixture(scope='module')
def stream(tmp_path_factory):
  path = tmp_path_factory.mktemp('stream')
  token_store.write(path, '0', [(documents(), 1)], vocab_size=SIZE)
  return token_store.TokenStream(path, '0')


def vocab():
  zeros = np.zeros(SIZE, bool)
  ends = zeros.copy()
  ends[DOT] = True
  known = lexicon.Lexicon(
    begins_V=zeros, breaks_V=zeros, ends_V=ends, counts_V=zeros.astype(int)
  )
  return vocab_lib.Vocab(size=SIZE, lexicon=known)


def config(**objective):
  own = next_sentence.NextSentence(**objective)
  batching = config_lib.Pad()
  return config_lib.DataConfig(length=LENGTH, objective=own, batching=batching)


def pairs(stream, visits=40, **objective):
  """Yields A, B and whether B is wrong, of every row, many times."""
  layout = sentences.SentencePairs(config(**objective), stream, vocab())
  (num,) = layout.group_sizes()
  for visit in range(visits):
    keys = noise.keys(visit, np.arange(num))
    source, types, wrong = layout.read(0, np.arange(num), keys)
    for tokens, segments, own, is_wrong in zip(*source, types, wrong):
      ids, own = tokens[segments == 1], own[segments == 1]
      assert not tokens[segments == 0].any()
      assert ids[0] == vocab_lib.BOS and own[0] == 0
      end = np.flatnonzero(ids == vocab_lib.EOS)
      assert len(end) == 2 and end[1] == len(ids) - 1
      assert (own == (np.arange(len(ids)) > end[0])).all()
      first, second = ids[1 : end[0]], ids[end[0] + 1 : -1]
      if [DOT] not in (first.tolist(), second.tolist()):  # It is everywhere.
        yield first, second, is_wrong


def found(ids):
  """Where a text stands: (document, place)."""
  for number, document in enumerate(documents()):
    for i in range(len(document) - len(ids) + 1):
      if (document[i : i + len(ids)] == ids).all():
        return number, i
  raise AssertionError(ids)


def test_what_follows_and_what_comes_from_other_documents(stream):
  wrong = []
  for first, second, is_wrong in pairs(stream, visits=4):
    (a, start), (b, place) = found(first), found(second)
    follows = a == b and place == start + len(first)
    assert follows != is_wrong and (a == b) != is_wrong
    # A is cut after a sentence, unless it had but one.
    lone = DOT not in np.r_[first, second][:-1] and not is_wrong
    assert first[-1] == DOT or lone or is_wrong
    wrong.append(is_wrong)
  assert abs(np.mean(wrong) - 0.5) < 4 * 0.5 / len(wrong) ** 0.5


def test_sentence_order(stream):
  for first, second, is_wrong in pairs(stream, visits=2, random=0, swapped=1):
    (a, start), (b, place) = found(first), found(second)
    assert a == b
    expected = start + len(first) if not is_wrong else start - len(second)
    assert place == expected


def test_hard_negatives_are_elsewhere_in_the_document(stream):
  apart, swapped = 0, 0
  for first, second, is_wrong in pairs(stream, visits=3, random=0, hard=1):
    (a, start), (b, place) = found(first), found(second)
    assert a == b
    if is_wrong:
      assert place != start + len(first)
      is_swapped = place == start - len(second)
      swapped, apart = swapped + is_swapped, apart + (not is_swapped)
  assert apart > 50 and swapped > 10  # Some documents are one chunk.


def test_weights_of_negatives_by_counts(stream):
  shares = {'random': 2.0, 'hard': 0.0, 'swapped': 1.0, 'positive': 0.25}
  kinds = []
  for first, second, is_wrong in pairs(stream, visits=4, **shares):
    other = found(first)[0] != found(second)[0]
    kinds.append('positive' if not is_wrong else 'random' if other else 'other')
  num = len(kinds)
  for kind, share in {'positive': 0.25, 'random': 0.5, 'other': 0.25}.items():
    bound = 4 * (share * (1 - share) / num) ** 0.5
    assert abs(kinds.count(kind) / num - share) < bound


def test_every_token_is_in_a_row_once_an_epoch(stream):
  layout = sentences.SentencePairs(config(), stream, vocab())
  starts, stops, document = layout._chunks.T
  expected = [
    (o + 1, p - 1) for o, p in zip(stream.offsets[:-1], stream.offsets[1:])
  ]
  assert (starts < stops).all() and (stops - starts <= LENGTH - 3).all()
  for number, (start, stop) in enumerate(expected):
    own = document == number
    assert starts[own][0] == start and stop - stops[own][-1] <= 1
    assert (starts[own][1:] == stops[own][:-1]).all()


def test_masks_are_of_both_sentences(stream):
  objective = config().objective
  layout = sentences.SentencePairs(config(), stream, vocab())
  keys = noise.keys(0, np.arange(20))
  source = layout.read(0, np.arange(20), keys)
  batch = objective.examples(*source, keys=keys, vocab=vocab(), length=LENGTH)
  lengths = objective.lengths(LENGTH)
  assert {n: a.shape for n, a in batch.items()} == {
    name: (20, own) for name, own in lengths.items()
  }
  assert (batch['sentence_weights'] == 1).all()
  places = batch['target_positions'][batch['weights'] == 1]
  rows = np.nonzero(batch['weights'])[0]
  types = batch['token_types'][rows, places]
  assert 0 < types.mean() < 1
  assert (batch['targets'][batch['weights'] == 1] >= DOT).all()
  empty = layout.read(0, np.array([-1]), keys[:1])
  nothing = objective.examples(
    *empty, keys=keys[:1], vocab=vocab(), length=LENGTH
  )
  assert not nothing['sentence_weights'].any() and not nothing['weights'].any()


def test_messages(tmp_path):
  token_store.write(tmp_path, '0', [(documents()[:1], 1)], vocab_size=SIZE)
  lone = token_store.TokenStream(tmp_path, '0')
  with pytest.raises(ValueError, match='has 1 document.*random=0 and hard'):
    sentences.SentencePairs(config(), lone, vocab())
  sentences.SentencePairs(config(random=0, hard=1), lone, vocab())
  with pytest.raises(ValueError, match='not all 0'):
    config(random=0)
  with pytest.raises(ValueError, match='nothing to tell'):
    config(positive=1.0)
  packed = dataclasses.replace(config(), batching=config_lib.Pack())
  with pytest.raises(ValueError, match=r'batching=pad, without buckets\.$'):
    input_pipeline.check(packed)
  with pytest.raises(ValueError, match='no room for two sentences'):
    input_pipeline.check(dataclasses.replace(config(), length=6))
  masked = masked_lm.MaskedLM(rate=0.01)
  with pytest.raises(ValueError, match='leaves no'):
    input_pipeline.check(config(masked=masked))
