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


def test_rates_and_shares():
  source = _source()
  batch = _examples(masked_lm.MaskedLM(), source)
  chosen = batch['weights'] == 1
  text = source.tokens >= 105
  assert not chosen[~text].any()
  # Within about four standard deviations of the expectation.
  assert chosen[text].mean() == pytest.approx(0.15, abs=0.011)
  inputs, targets = batch['inputs'][chosen], batch['targets'][chosen]
  assert (inputs == 4).mean() == pytest.approx(0.8, abs=0.032)
  assert (inputs == targets).mean() == pytest.approx(0.1, abs=0.024)
  random = inputs[(inputs != 4) & (inputs != targets)]
  assert random.min() >= 105 and random.max() < 1000
  assert len(np.unique(random)) > 150  # Spread over all the 895 text ids.


def test_what_is_not_chosen_is_untouched():
  source = _source()
  batch = _examples(masked_lm.MaskedLM(), source)
  kept = batch['weights'] == 0
  np.testing.assert_array_equal(batch['inputs'][kept], source.tokens[kept])
  np.testing.assert_array_equal(batch['targets'], source.tokens)
  assert batch['positions'][0, [0, 49, 50, 89, 90]].tolist() == [
    0,
    49,
    0,
    39,
    0,
  ]


def test_masks_depend_on_the_key():
  source = _source(4)
  first, same, other = (
    _examples(masked_lm.MaskedLM(), source, seed)['weights']
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
