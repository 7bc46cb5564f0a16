import numpy as np
import pytest

from t2x.objectives import noise
from t2x.objectives import rows as rows_lib
from t2x.objectives import span_corruption
from t2x.objectives import vocab as vocab_lib

VOCAB = vocab_lib.Vocab(size=1000, num_sentinels=100)
LENGTH = 128


def _source(lengths, num_rows=20):
  """Rows of documents of these many text tokens, with starts and ends."""
  rng = np.random.default_rng(0)
  rows = [
    np.concatenate([np.r_[3, rng.integers(105, 1000, n), 1] for n in lengths])
    for _ in range(num_rows)
  ]
  segments = np.repeat(np.arange(len(lengths)) + 1, np.array(lengths) + 2)
  return rows_lib.Rows(
    np.array(rows, np.int32), np.tile(segments, (num_rows, 1)).astype(np.int32)
  )


def _examples(source, config=None, seed=0):
  config = config or span_corruption.SpanCorruption()
  keys = noise.keys(seed, np.arange(len(source.tokens)))
  return config.examples(source, keys=keys, vocab=VOCAB, length=LENGTH)


def _restore(encoder, decoder):
  """Puts each dropped span where its sentinel stands in the encoder's ids."""
  spans, name = {}, None
  for token in decoder:
    if 5 <= token < 105:
      name = token
      spans[name] = []
    elif token != 1:
      spans[name].append(token)
  assert list(spans) == sorted(spans)
  text = []
  for token in encoder:
    text.extend(spans.pop(token) if 5 <= token < 105 else [token])
  assert not spans
  return text


def _segment(batch, prefix, row, segment):
  name = 'encoder_inputs' if prefix else 'targets'
  return batch[name][row][batch[f'{prefix}segments'][row] == segment].tolist()


@pytest.mark.parametrize('lengths', [[139], [60, 70], [1, 2, 3, 40, 17]])
def test_inputs_and_targets_together_are_the_text(lengths):
  source = _source(lengths)
  batch = _examples(source)
  for row in range(len(source.tokens)):
    for segment in range(1, len(lengths) + 1):
      text = source.tokens[row][source.segments[row] == segment]
      encoder = _segment(batch, 'encoder_', row, segment)
      decoder = _segment(batch, '', row, segment)
      assert encoder[-1] == decoder[-1] == 1
      # The start is left out, and the end stands on both sides.
      assert _restore(encoder, decoder) == text[1:].tolist()


def test_decoder_inputs_are_shifted_targets():
  batch = _examples(_source([60, 70]))
  starts = batch['positions'] == 0
  assert (batch['inputs'][starts] == 0).all()
  inside = ~starts[:, 1:]
  np.testing.assert_array_equal(
    batch['inputs'][:, 1:][inside], batch['targets'][:, :-1][inside]
  )
  np.testing.assert_array_equal(batch['weights'] == 1, batch['segments'] > 0)


def test_rate_and_span_length():
  batch = _examples(_source([139], num_rows=100))
  dropped = (batch['targets'] >= 105).sum()
  spans = ((batch['targets'] >= 5) & (batch['targets'] < 105)).sum()
  assert dropped == 100 * round(0.15 * 139)
  assert dropped / spans == pytest.approx(3.0, abs=0.1)
  # Where the spans lie varies: every place but the first is dropped at times.
  ends = np.argmax(
    (batch['encoder_inputs'] >= 5) & (batch['encoder_inputs'] < 105), 1
  )
  assert ends.min() >= 1 and len(np.unique(ends)) > 10


@pytest.mark.parametrize(
  'length,raw,targets', [(512, 568, 114), (256, 284, 58), (128, 141, 29)]
)
def test_lengths_are_those_of_t5(length, raw, targets):
  # seqio's random_spans_helper(512, 0.15, 3, 1, 1) returns (568, 114).
  config = span_corruption.SpanCorruption()
  assert config.source_length(length) == raw
  assert config.sides(raw) == (length, targets)
  assert config.target_length(length) % 64 == 0
  assert 0 <= config.target_length(length) - targets < 64


def test_what_does_not_fit_is_left_out_on_both_sides():
  source = _source([4] * 23)  # 138 raw tokens; the targets would need 69.
  batch = _examples(source)
  assert batch['targets'].shape == (20, 64)
  for row in range(20):
    kept = set(batch['segments'][row]) - {0}
    assert kept == set(batch['encoder_segments'][row]) - {0}
    assert 15 < len(kept) < 23
    last = max(kept)
    text = source.tokens[row][source.segments[row] == last][1:-1].tolist()
    restored = _restore(
      _segment(batch, 'encoder_', row, last), _segment(batch, '', row, last)
    )
    assert restored[:-1] == text[: len(restored) - 1]


def test_all_partitions_are_equally_likely():
  keys = noise.keys(0, np.arange(3000))
  splits = [
    tuple(span_corruption._partition(5, 3, u)) for u in noise.uniform(keys, 9)
  ]
  values, counts = np.unique(splits, axis=0, return_counts=True)
  assert len(values) == 6 and (values.sum(1) == 5).all() and values.min() == 1
  assert counts.min() > 400  # 500 expected, 20 a standard deviation.


def test_bad_settings():
  with pytest.raises(ValueError, match='rate=1.5 must be between 0 and 1'):
    span_corruption.SpanCorruption(rate=1.5)
  with pytest.raises(ValueError, match='mean_span=0.5 must be at least 1'):
    span_corruption.SpanCorruption(mean_span=0.5)
