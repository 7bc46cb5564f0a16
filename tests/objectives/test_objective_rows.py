import numpy as np
import pytest

from t2x.objectives import causal_lm
from t2x.objectives import rows as rows_lib
from t2x.objectives import source_target
from t2x.objectives import vocab as vocab_lib

VOCAB = vocab_lib.Vocab(size=200, num_sentinels=20)


def _rows(tokens, segments):
  return rows_lib.Rows(np.array(tokens, np.int32), np.array(segments, np.int32))


def test_positions_restart_in_each_segment():
  segments = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1] * 8, [0] * 8])
  expected = [[0, 1, 2, 0, 0, 1, 0, 0], list(range(8)), [0] * 8]
  np.testing.assert_array_equal(rows_lib.positions(segments), expected)


def test_causal_lm_shifts_by_one_and_stays_inside_documents():
  source = _rows([[3, 30, 31, 1, 3, 40], [41, 1, 3, 50, 0, 0]],
                 [[1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 0, 0]])  # fmt: skip
  batch = causal_lm.CausalLM().examples(
    source, keys=np.zeros(2, np.uint64), vocab=VOCAB, length=5
  )
  assert batch['inputs'].tolist() == [[3, 30, 31, 1, 3], [41, 1, 3, 50, 0]]
  assert batch['targets'].tolist() == [[30, 31, 1, 3, 40], [1, 3, 50, 0, 0]]
  assert batch['weights'].tolist() == [[1, 1, 1, 0, 1], [1, 0, 1, 0, 0]]
  assert batch['segments'].tolist() == [[1, 1, 1, 1, 2], [1, 1, 2, 2, 0]]
  assert batch['positions'].tolist() == [[0, 1, 2, 3, 0], [0, 1, 0, 1, 0]]


def test_source_target_starts_each_target_with_padding():
  source = _rows([[30, 31, 1, 32, 1, 0]], [[1, 1, 1, 2, 2, 0]])
  target = _rows([[40, 1, 41, 42, 1, 0]], [[1, 1, 2, 2, 2, 0]])
  batch = source_target.SourceTarget().examples(
    source, target, keys=np.zeros(1, np.uint64), vocab=VOCAB, length=6
  )
  assert batch['inputs'].tolist() == [[0, 40, 0, 41, 42, 0]]
  assert batch['targets'].tolist() == [[40, 1, 41, 42, 1, 0]]
  assert batch['weights'].tolist() == [[1, 1, 1, 1, 1, 0]]
  assert batch['positions'].tolist() == [[0, 1, 0, 1, 2, 0]]
  assert batch['encoder_inputs'].tolist() == [[30, 31, 1, 32, 1, 0]]
  assert batch['encoder_positions'].tolist() == [[0, 1, 2, 0, 1, 0]]


@pytest.mark.parametrize('num_sentinels', [0, 20])
def test_vocab_ids_do_not_overlap(num_sentinels):
  vocab = vocab_lib.Vocab(size=300, num_sentinels=num_sentinels)
  assert len(vocab.sentinel_ids) == num_sentinels
  assert vocab.first_text_id == 5 + num_sentinels
  assert not set(vocab.sentinel_ids) & set(range(5))
