import numpy as np
import pytest

from t2x.objectives import masked_lm
from t2x.objectives import noise
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib

VOCAB = vocab_lib.Vocab(size=1000, num_sentinels=100)


def _source(num_rows=200, length=100):
  tokens = np.random.default_rng(0).integers(105, 1000, (num_rows, length))
  tokens[:, 0], tokens[:, 49], tokens[:, 50] = 3, 1, 3
  tokens[:, 90:] = 0
  segments = np.zeros((num_rows, length), np.int32)
  segments[:, :50], segments[:, 50:90] = 1, 2
  return rows_lib.Rows(tokens.astype(np.int32), segments)


def _examples(config, source, seed=0):
  keys = noise.keys(seed, np.arange(len(source.tokens)))
  return config.examples(source, keys=keys, vocab=VOCAB, length=100)


def _chosen(batch):
  """Where the weights are 1, in the rows' own places; and their targets."""
  rows = batch['inputs'].shape
  chosen, targets = np.zeros(rows, bool), np.zeros(rows, np.int32)
  row, column = np.nonzero(batch['weights'])
  places = batch['target_positions'][row, column]
  chosen[row, places] = True
  targets[row, places] = batch['targets'][row, column]
  assert chosen.sum() == batch['weights'].sum()  # No place twice.
  return chosen, targets


def test_rates_and_shares():
  source = _source()
  batch = _examples(masked_lm.MaskedLM(), source)
  chosen, targets = _chosen(batch)
  text = source.tokens >= 105
  assert not chosen[~text].any()
  # A row has 87 tokens of text: 13 are chosen, anywhere with one chance.
  assert (chosen.sum(1) == 13).all()
  assert batch['targets'].shape == (200, 16)
  often = chosen.mean(0)[text[0]]
  assert often.std() < 0.04 and 0.05 < often.min() and often.max() < 0.26
  inputs, targets = batch['inputs'][chosen], targets[chosen]
  # Within about four standard deviations of the expectation.
  assert (inputs == 4).mean() == pytest.approx(0.8, abs=0.032)
  assert (inputs == targets).mean() == pytest.approx(0.1, abs=0.024)
  random = inputs[(inputs != 4) & (inputs != targets)]
  assert random.min() >= 105 and random.max() < 1000
  assert len(np.unique(random)) > 150  # Spread over all the 895 text ids.


def test_what_is_not_chosen_is_untouched():
  source = _source()
  batch = _examples(masked_lm.MaskedLM(), source)
  chosen, targets = _chosen(batch)
  np.testing.assert_array_equal(
    batch['inputs'][~chosen], source.tokens[~chosen]
  )
  np.testing.assert_array_equal(targets[chosen], source.tokens[chosen])
  assert batch['positions'][0, [0, 49, 50, 89, 90]].tolist() == [
    0,
    49,
    0,
    39,
    0,
  ]


def test_the_last_places_are_empty_where_a_row_has_less_text():
  source = _source(4)
  source.segments[1, 20:], source.tokens[1, 20:] = 0, 0
  batch = _examples(masked_lm.MaskedLM(), source)
  assert batch['weights'].sum(1).tolist() == [13, 3, 13, 13]
  empty = batch['weights'] == 0
  assert not batch['target_positions'][empty].any()


def test_masks_depend_on_the_key():
  source = _source(4)
  first, same, other = (
    _examples(masked_lm.MaskedLM(), source, seed)['target_positions']
    for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(first, same)
  assert (first != other).any()


def test_row_without_text_has_no_weight():
  source = rows_lib.Rows(
    np.array([[3, 1, 0, 0]], np.int32), np.array([[1, 1, 0, 0]], np.int32)
  )
  batch = _examples(masked_lm.MaskedLM(rate=0.99), source)
  assert not batch['weights'].any()


@pytest.mark.parametrize('rate', [0.0, 1.0, -0.1, 15.0])
def test_rate_out_of_range(rate):
  with pytest.raises(ValueError, match=f'rate={rate} must be between 0 and 1'):
    masked_lm.MaskedLM(rate=rate)


def test_shares_out_of_range():
  with pytest.raises(ValueError, match='mask_share=0.8 and random_share=0.3'):
    masked_lm.MaskedLM(random_share=0.3)


def test_a_rate_that_leaves_nothing_to_predict():
  masked_lm.MaskedLM(rate=0.01).check(50)
  with pytest.raises(ValueError, match='rate=0.01 of data.length=49 leaves no'):
    masked_lm.MaskedLM(rate=0.01).check(49)
