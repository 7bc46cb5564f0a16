"""What is said to be read and cut, against the batches of an epoch."""

import numpy as np
import pytest

from t2x.data import batches as batches_lib
from t2x.data import config as config_lib
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.data import token_store
from t2x.data import tokenizers
from t2x.objectives import causal_lm
from t2x.objectives import classification
from t2x.objectives import masked_lm
from t2x.objectives import next_sentence
from t2x.objectives import source_target
from t2x.objectives import span_corruption

LENGTH = 24
PAD = config_lib.Pad()
BUCKETS = config_lib.Pad(buckets=(8, 24))
SWAPPED = next_sentence.NextSentence(random=0.0, swapped=1.0)


def _corpus(path, *sides):
  """Documents of so many tokens, their starts and ends included."""
  rng = np.random.default_rng(0)
  for i, lengths in enumerate(sides):
    documents = [
      np.r_[3, rng.integers(*(105, 107) if n == 3 else (105, 361), n - 2), 1]
      for n in lengths
    ]
    token_store.write(path, str(i), [(documents, 1)], vocab_size=361)
  streams = tuple(
    token_store.TokenStream(path, str(i)) for i in range(len(sides))
  )
  return corpus_lib.Corpus(
    tokenizer=tokenizers.BytesTokenizer(tokenizers.Bytes()),
    fingerprint='x',
    splits={'train': streams},
  )


def _config(objective, batching, length=LENGTH):
  return config_lib.DataConfig(
    length=length, batch_size=7, batching=batching, objective=objective
  )


def _epoch(corpus, config):
  batches = batches_lib.EvalBatches(corpus, config, 'train')
  return [batches[i] for i in range(len(batches))]


def _lengths(num=50, seed=0, most=60):
  return np.random.default_rng(seed).integers(4, most, num)


def _count(corpus, config):
  made = batches_lib.BatchMaker(corpus, config, 'train', None)
  return made.layout.count()


@pytest.mark.parametrize('batching', [PAD, BUCKETS], ids=['one', 'buckets'])
@pytest.mark.parametrize('ahead', [0, 1])
def test_documents_that_are_padded(tmp_path, batching, ahead):
  """A row of a causal model has one token more, which is predicted."""
  lengths = _lengths()
  corpus = _corpus(tmp_path, lengths)
  objective = causal_lm.CausalLM() if ahead else masked_lm.MaskedLM()
  config = _config(objective, batching)
  count, room = _count(corpus, config), LENGTH + ahead
  read = sum((b['segments'] > 0).sum() for b in _epoch(corpus, config))
  if ahead:
    read += sum((b['weights'][:, -1] > 0).sum() for b in _epoch(corpus, config))
  over = [n - room for n in lengths if n > room]
  assert count == (read, 50, len(over), sum(over), max(over))
  assert count.tokens + count.lost == sum(lengths)
  text = input_pipeline.token_summary(corpus, config)
  assert text.startswith(f'train: {read:,} tokens of {sum(lengths):,} (')
  assert f'({len(over)} of 50 documents are cut, by ' in text
  assert f'and {max(over)} at most)' in text


@pytest.mark.parametrize(
  'batching', [PAD, BUCKETS, config_lib.Pack()], ids=['one', 'buckets', 'pack']
)
def test_pairs_are_cut_on_both_sides(tmp_path, batching):
  sides = _lengths(), _lengths(seed=1)
  corpus = _corpus(tmp_path, *sides)
  config = _config(source_target.SourceTarget(), batching)
  count = _count(corpus, config)
  read = sum(
    (b[name] > 0).sum()
    for b in _epoch(corpus, config)
    for name in ('segments', 'encoder_segments')
  )
  cut = [[max(int(n) - LENGTH, 0) for n in pair] for pair in zip(*sides)]
  lost = [sum(pair) for pair in cut]
  assert count == (read, 50, np.count_nonzero(lost), sum(lost), max(lost))


def test_texts_with_a_label(tmp_path):
  """Labels are no text; a start token takes a place."""
  lengths = _lengths()
  corpus = _corpus(tmp_path, lengths, [3] * 50)
  config = _config(classification.Classification(), PAD)
  read = sum((b['segments'] > 0).sum() for b in _epoch(corpus, config)) - 50
  over = [n - (LENGTH - 1) for n in lengths if n > LENGTH - 1]
  assert _count(corpus, config) == (
    read,
    50,
    len(over),
    sum(over),
    max(over),
  )


def test_two_sentences(tmp_path):
  """Documents are cut into chunks; a last token alone is no chunk."""
  lengths = _lengths()
  corpus = _corpus(tmp_path, lengths)
  config = _config(SWAPPED, PAD)
  rows = np.concatenate([b['segments'] for b in _epoch(corpus, config)])
  read = (rows > 0).sum() - 3 * rows.any(1).sum()
  count = _count(corpus, config)
  lost = sum(lengths) - 2 * 50 - read
  assert count[:4] == (read, 50, lost, lost) and 0 < lost < 50


def test_full_rows_cut_nothing(tmp_path):
  lengths = _lengths()
  corpus = _corpus(tmp_path, lengths)
  for batching in (config_lib.Pack(), config_lib.Stream()):
    config = _config(causal_lm.CausalLM(), batching)
    predicted = sum(b['weights'].sum() for b in _epoch(corpus, config))
    # Each token but the first of a document is predicted.
    assert _count(corpus, config).tokens == predicted + 50 == sum(lengths)
    text = input_pipeline.token_summary(corpus, config)
    assert text == f'train: {sum(lengths):,} tokens'


@pytest.mark.parametrize('most', [7, 60])
def test_short_documents_that_find_no_room_when_noised(tmp_path, most):
  lengths = _lengths(400, most=most)
  corpus = _corpus(tmp_path, lengths)
  config = _config(
    span_corruption.SpanCorruption(), config_lib.Pack(), length=128
  )
  held = sum(
    (batch[name] >= 105).sum()
    for batch in _epoch(corpus, config)
    for name in ('targets', 'encoder_inputs')
  )
  lost = 1 - held / sum(n - 2 for n in lengths)
  made = batches_lib.BatchMaker(corpus, config, 'train', None)
  assert made.share_lost() == pytest.approx(lost, abs=1e-9)
  assert (lost > 0.2) == (most == 7)
  said = f'about {lost:.1%} of them find no place'
  assert (said in input_pipeline.token_summary(corpus, config)) == (
    lost > 0.0005
  )


def test_a_step_reads_so_many_tokens(tmp_path):
  lengths = _lengths()
  corpus = _corpus(tmp_path, lengths)
  of = lambda *args: input_pipeline.segment(corpus, _config(*args), seed=0)
  assert of(causal_lm.CausalLM(), config_lib.Pack()).tokens == 7 * LENGTH
  padded = of(masked_lm.MaskedLM(), BUCKETS).tokens
  read = sum(min(n, LENGTH) for n in lengths)
  assert padded == pytest.approx(7 * read / 50)
