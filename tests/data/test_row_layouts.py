"""Rows against plain loops over documents."""

import pickle

import numpy as np
import pytest

from t2x.data import config as config_lib
from t2x.data import rows as rows_lib
from t2x.data import token_store
from t2x.objectives import causal_lm
from t2x.objectives import masked_lm
from t2x.objectives import noise
from t2x.objectives import source_target
from t2x.objectives import vocab as vocab_lib

LENGTHS = [5, 2, 17, 3, 30, 2, 9, 8, 8, 21]


def _documents(lengths=LENGTHS, seed=0):
  rng = np.random.default_rng(seed)
  return [np.r_[3, rng.integers(105, 300, n - 2), 1] for n in lengths]


def _stream(path, documents, name='0'):
  chunks = [(documents[:1], 7), (documents[1:], 11)]
  token_store.write(path, name, chunks, vocab_size=300)
  return token_store.TokenStream(path, name)


def _config(**changes):
  return config_lib.DataConfig(
    **{'length': 8, 'batch_size': 2, **changes}  # pyright: ignore
  )


def _read_all(layout, group=0):
  return _read(layout, group, np.arange(layout.group_sizes()[group]))


def _read(layout, group, rows):
  return layout.read(group, rows, noise.keys(0, rows))


def _make(config, streams):
  return rows_lib.make(config, streams, vocab_lib.Vocab(size=300))


def test_stream_gives_back_what_was_written(tmp_path):
  documents = _documents()
  stream = _stream(tmp_path, documents)
  np.testing.assert_array_equal(stream.tokens, np.concatenate(documents))
  assert stream.tokens.dtype == np.uint16
  assert np.diff(stream.offsets).tolist() == LENGTHS
  assert (stream.num_tokens, stream.num_bytes) == (sum(LENGTHS), 18)
  token_store.write(tmp_path, 'big', [(documents, 1)], vocab_size=70_000)
  assert token_store.TokenStream(tmp_path, 'big').tokens.dtype == np.uint32


def test_stream_pickles_as_its_path(tmp_path):
  stream = _stream(tmp_path, _documents([10_000, 2]))
  assert len(stream.tokens) == 10_002
  data = pickle.dumps(stream)
  assert len(data) < 500
  np.testing.assert_array_equal(pickle.loads(data).tokens, stream.tokens)


def test_windows_against_a_loop_over_tokens(tmp_path):
  documents = _documents()
  layout = _make(_config(), (_stream(tmp_path, documents),))
  (rows,) = _read_all(layout)
  flat = [(t, d) for d, ids in enumerate(documents) for t in ids]
  num_rows = 0
  while num_rows * 8 < len(flat) - 1:
    window = flat[num_rows * 8 : num_rows * 8 + 9]
    for i in range(9):
      token, segment = 0, 0
      if i < len(window):
        token = window[i][0]
        segment = len({d for _, d in window[: i + 1]})
      assert rows.tokens[num_rows, i] == token
      assert rows.segments[num_rows, i] == segment
    num_rows += 1
  assert layout.group_sizes() == (num_rows,) == (len(rows.tokens),)


@pytest.mark.parametrize('length', [1, 4, 8, 52, 104, 105, 200])
def test_every_token_is_predicted_exactly_once(tmp_path, length):
  documents = _documents()
  config = _config(length=length)
  layout = _make(config, (_stream(tmp_path, documents),))
  (rows,) = _read_all(layout)
  batch = causal_lm.CausalLM().examples(
    rows, keys=np.zeros(0), vocab=None, length=length
  )
  predicted = batch['targets'][batch['weights'] == 1].tolist()
  assert predicted == [t for ids in documents for t in ids[1:]]


def test_masked_windows_hold_every_token_once(tmp_path):
  documents = _documents()
  config = _config(objective=masked_lm.MaskedLM())
  (rows,) = _read_all(_make(config, (_stream(tmp_path, documents),)))
  assert rows.tokens.shape[1] == 8
  held = rows.tokens[rows.segments > 0]
  np.testing.assert_array_equal(held, np.concatenate(documents))


def test_minus_one_is_an_empty_row(tmp_path):
  streams = (_stream(tmp_path, _documents()),)
  for batching in (config_lib.Pack(), config_lib.Pad()):
    layout = _make(_config(batching=batching), streams)
    (rows,) = _read(layout, 0, np.array([1, -1]))
    assert rows.segments[0].any()
    assert not rows.segments[1].any() and not rows.tokens[1].any()


def test_padding_gives_each_document_a_row_of_the_smallest_bucket(tmp_path):
  documents = _documents()
  config = _config(length=16, batching=config_lib.Pad(buckets=(4, 8, 16)))
  layout = _make(config, (_stream(tmp_path, documents),))
  assert layout.group_lengths() == (4, 8, 16)
  assert layout.group_sizes() == (4, 3, 3)  # A row holds one token more.
  seen = []
  for group, length in enumerate(layout.group_lengths()):
    (rows,) = _read_all(layout, group)
    assert rows.tokens.shape[1] == length + 1
    for tokens, segments in zip(*rows):
      num = segments.sum()
      assert segments.tolist() == [1] * num + [0] * (length + 1 - num)
      seen.append(tokens[:num].tolist())
  assert sorted(seen) == sorted(ids[:17].tolist() for ids in documents)


def test_bucket_with_less_than_a_batch_joins_the_next(tmp_path):
  streams = (_stream(tmp_path, _documents()),)
  batching = config_lib.Pad(buckets=(1, 2, 4, 8, 16, 32))
  layout = _make(_config(length=32, batch_size=3, batching=batching), streams)
  assert layout.group_lengths() == (2, 8, 32)
  assert layout.group_sizes() == (3, 4, 3)
  assert sum(layout.group_sizes()) == len(LENGTHS)


def _pairs(path):
  sources = _documents([4, 9, 3, 20, 2, 2, 6, 7])
  targets = _documents([6, 2, 3, 4, 12, 2, 4, 2], seed=1)
  streams = _stream(path, sources, '0'), _stream(path, targets, '1')
  return sources, targets, streams


def test_packed_pairs_are_whole_aligned_and_in_order(tmp_path):
  sources, targets, streams = _pairs(tmp_path)
  config = _config(length=10, objective=source_target.SourceTarget())
  layout = _make(config, streams)
  source, target = _read_all(layout)
  found = []
  for row in range(len(source.tokens)):
    for segment in range(1, source.segments[row].max() + 1):
      found.append(
        tuple(
          side.tokens[row][side.segments[row] == segment].tolist()
          for side in (source, target)
        )
      )
  expected = [
    (s[:10].tolist(), t[:10].tolist()) for s, t in zip(sources, targets)
  ]
  assert found == expected
  # Greedy: the first pair of a row had no room in the row before.
  assert layout.group_sizes() == (7,)


def test_padded_pairs_go_by_the_longer_side(tmp_path):
  _, _, streams = _pairs(tmp_path)
  config = _config(
    length=16,
    batch_size=1,
    objective=source_target.SourceTarget(),
    batching=config_lib.Pad(buckets=(4, 8, 16)),
  )
  layout = _make(config, streams)
  assert layout.group_sizes() == (2, 3, 3)
  source, target = _read_all(layout)
  assert source.tokens.shape == target.tokens.shape == (2, 4)
