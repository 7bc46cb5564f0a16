"""Every array of a batch has its line in the table of batch keys."""

import numpy as np
import pytest

from t2x.objectives import batch_keys
from t2x.objectives import mixture


def test_every_objective_makes_arrays_that_are_described():
  made = [cls() for cls in mixture.Single.__args__]
  names = {name for own in made for name in own.lengths(16)}
  assert {'inputs', 'encoder_inputs', 'query_ranks', 'ranks'} <= names
  for name in names:
    assert batch_keys.of(name).meaning.endswith('.')


def test_a_head_has_targets_and_weights_of_its_own():
  assert batch_keys.of('ahead2_targets').dtype == np.int32
  assert batch_keys.of('ahead2_weights').dtype == np.float32
  assert batch_keys.of('weights').dtype == np.float32


def test_an_unknown_name_is_refused():
  with pytest.raises(ValueError, match="'input' is no array of a batch"):
    batch_keys.of('input')


def test_the_encoder_of_an_encoder_decoder_is_the_source_side():
  sources = [key.name for key in batch_keys.KEYS if key.side == 'source']
  assert sorted(sources) == [
    'encoder_inputs',
    'encoder_positions',
    'encoder_segments',
  ]
  assert batch_keys.is_source('encoder_inputs')
  assert not batch_keys.is_source('inputs')


def test_tokens_are_counted_once():
  segments = np.array([[1, 1, 2, 0]])
  both = {'segments': segments, 'encoder_segments': segments}
  assert batch_keys.num_tokens(both) == 6
  # Queries for dropped tokens are tokens, a second stream's are the same ones.
  queries = {'segments': segments, 'query_segments': segments[:, :2]}
  assert batch_keys.num_tokens(queries) == 5
  assert batch_keys.num_tokens({**queries, 'ranks': segments}) == 3
