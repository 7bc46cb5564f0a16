"""Batches are functions of (seed, step), whoever asks for them."""

import dataclasses
import itertools

import numpy as np
import pytest

from t2x.data import batches as batches_lib
from t2x.data import config as config_lib
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.data import token_store
from t2x.data import tokenizers
from t2x.objectives import causal_lm
from t2x.objectives import denoising
from t2x.objectives import masked_lm
from t2x.objectives import masking
from t2x.objectives import prefix_lm
from t2x.objectives import source_target
from t2x.objectives import span_corruption
from t2x.objectives import ul2

VARIANTS = {
  'causal': {},
  'causal_padded': {'batching': config_lib.Pad(buckets=(16, 32, 64))},
  'prefix': {'objective': prefix_lm.PrefixLM()},
  'masked': {'objective': masked_lm.MaskedLM()},
  'masked runs': {
    'objective': masked_lm.MaskedLM(masking=masking.Hierarchy(phrases=1.0))
  },
  'span': {'objective': span_corruption.SpanCorruption()},
  'span_padded': {
    'objective': span_corruption.SpanCorruption(),
    'batching': config_lib.Pad(buckets=(32, 64)),
  },
  'denoising': {'objective': denoising.Denoising(rotate=0.5, mask=0.1)},
  'ul2_padded': {
    'objective': ul2.UL2(),
    'batching': config_lib.Pad(buckets=(32, 64)),
  },
  'pairs': {'objective': source_target.SourceTarget()},
  'pairs_padded': {
    'objective': source_target.SourceTarget(),
    'batching': config_lib.Pad(buckets=(32, 64)),
  },
}


def _config(**changes):
  return config_lib.DataConfig(**{'length': 64, 'batch_size': 8, **changes})


def _corpus(path, num_streams=1, num_documents=100):
  rng = np.random.default_rng(0)
  for i in range(num_streams):
    documents = [
      np.r_[3, rng.integers(105, 361, rng.integers(1, 80)), 1]
      for _ in range(num_documents)
    ]
    token_store.write(path, str(i), [(documents, 1)], vocab_size=361)
  streams = tuple(
    token_store.TokenStream(path, str(i)) for i in range(num_streams)
  )
  return corpus_lib.Corpus(
    tokenizer=tokenizers.BytesTokenizer(tokenizers.Bytes()),
    fingerprint='x',
    splits={'train': streams, 'validation': streams},
  )


@pytest.fixture(params=VARIANTS)
def variant(request, tmp_path):
  config = _config(**VARIANTS[request.param])
  return _corpus(tmp_path, 1 + config.objective.paired), config


def _assert_equal(batch, other):
  assert batch.keys() == other.keys()
  for name in batch:
    np.testing.assert_array_equal(batch[name], other[name], err_msg=name)


def _take(iterator, num):
  taken = list(itertools.islice(iterator, num))
  iterator.close()
  return taken


def _join(parts):
  return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}


@pytest.mark.parametrize('num_hosts', [1, 2, 4])
def test_hosts_together_make_the_global_batch(variant, num_hosts):
  corpus, config = variant
  each = config.batch_size // num_hosts
  rows = [slice(h * each, (h + 1) * each) for h in range(num_hosts)]
  for make in (
    lambda r: input_pipeline.train_batches(corpus, config, seed=1, rows=r),
    lambda r: input_pipeline.eval_batches(corpus, config, 'validation', rows=r),
  ):
    whole = _take(make(None), 6)
    parts = [_take(make(r), 6) for r in rows]
    for step, batch in enumerate(whole):
      _assert_equal(batch, _join([p[step] for p in parts]))


def test_batches_match_their_spec(variant):
  corpus, config = variant
  spec = input_pipeline.batch_spec(config)
  lengths = set()
  for batch in _take(input_pipeline.train_batches(corpus, config, seed=0), 12):
    assert batch.keys() == spec.keys()
    lengths.add(batch['inputs'].shape[1])
    for name, (shape, dtype) in spec.items():
      assert batch[name].dtype == dtype, name
      assert batch[name].shape[0] == shape[0]
      assert batch[name].shape[1] <= shape[1]
  assert max(lengths) == spec['inputs'][0][1]


def test_targets_have_weight_in_segments_only(variant):
  corpus, config = variant
  for batch in _take(input_pipeline.train_batches(corpus, config, seed=0), 4):
    assert batch['weights'].any()
    segments = batch['segments']
    if 'target_positions' in batch:
      segments = np.take_along_axis(segments, batch['target_positions'], 1)
    assert not batch['weights'][segments == 0].any()
    assert not batch['inputs'][batch['segments'] == 0].any()


def test_start_step_continues_the_sequence(variant):
  corpus, config = variant
  whole = _take(input_pipeline.train_batches(corpus, config, seed=2), 9)
  late = _take(
    input_pipeline.train_batches(corpus, config, seed=2, start_step=6), 3
  )
  for batch, other in zip(whole[6:], late):
    _assert_equal(batch, other)


def test_seed_changes_the_order(variant):
  corpus, config = variant
  first, again, other = (
    _take(input_pipeline.train_batches(corpus, config, seed=s), 3)
    for s in (1, 1, 2)
  )
  for a, b in zip(first, again):
    _assert_equal(a, b)
  assert any(
    a['targets'].shape != b['targets'].shape
    or (a['targets'] != b['targets']).any()
    for a, b in zip(first, other)
  )


def _epoch_rows(corpus, config, epoch, seed=0):
  batches = batches_lib.TrainBatches(corpus, config, seed=seed)
  num = batches.steps_per_epoch
  made = [batches[epoch * num + i]['targets'] for i in range(num)]
  return [tuple(row) for batch in made for row in batch]


def test_an_epoch_is_all_rows_once_and_the_next_another_order(tmp_path):
  corpus = _corpus(tmp_path)
  config = _config(length=16)
  evaluated = input_pipeline.eval_batches(corpus, config, 'train')
  rows = [tuple(r) for b in evaluated for r in b['targets'] if r.any()]
  # So many rows a batch that an epoch ends with a batch.
  size = next(n for n in range(5, len(rows)) if len(rows) % n == 0)
  config = dataclasses.replace(config, batch_size=size)
  orders = [_epoch_rows(corpus, config, epoch) for epoch in range(3)]
  orders.append(_epoch_rows(corpus, config, 0, seed=1))
  for order in orders:
    assert sorted(order) == sorted(rows)
  assert len({tuple(o) for o in orders}) == 4


def test_epochs_of_buckets_visit_all_rows_evenly(tmp_path):
  corpus = _corpus(tmp_path)
  batching = config_lib.Pad(buckets=(16, 32, 64))
  config = _config(batching=batching, batch_size=4)
  batches = batches_lib.TrainBatches(corpus, config, seed=0)
  num_epochs = 8
  made = [batches[i] for i in range(num_epochs * batches.steps_per_epoch)]
  visits = {}
  for row in (tuple(r[r > 0]) for b in made for r in b['targets']):
    visits[row] = visits.get(row, 0) + 1
  assert len(visits) == 100
  assert abs(np.mean(list(visits.values())) - num_epochs) < 1
  assert min(visits.values()) >= num_epochs - 2
  lengths = [b['inputs'].shape[1] for b in made]
  assert lengths != sorted(lengths)  # Buckets take turns.


class _Counting:
  """An array that counts what is read of it."""

  def __init__(self, array):
    self.array = array
    self.num_read = 0

  def __getitem__(self, index):
    result = self.array[index]
    self.num_read += np.size(result)
    return result


def test_seeking_reads_nothing_but_its_own_rows(tmp_path):
  corpus = _corpus(tmp_path)
  config = _config(length=16)
  (stream,) = corpus.splits['train']
  counting = stream.__dict__['tokens'] = _Counting(stream.tokens)
  reads = []
  for step in (0, 1_000_000, 10**12):
    counting.num_read = 0
    batches = batches_lib.TrainBatches(corpus, config, seed=0, rows=slice(2, 4))
    batches[step]
    reads.append(counting.num_read)
  assert reads == [2 * 17] * 3


def test_rows_with_gaps_are_those_of_the_batch(tmp_path):
  corpus = _corpus(tmp_path)
  config = _config(length=16)
  whole = batches_lib.TrainBatches(corpus, config, seed=0)[3]
  rows = np.array([0, config.batch_size - 1])
  part = batches_lib.TrainBatches(corpus, config, seed=0, rows=rows)[3]
  for name, array in whole.items():
    np.testing.assert_array_equal(part[name], array[rows])
  with pytest.raises(ValueError, match='are not rows of a batch of data.batch'):
    batches_lib.TrainBatches(corpus, config, seed=0, rows=rows + 1)


def _unmasked(batch):
  """Yields the tokens of each row as they were, and the masked places."""
  for row in range(len(batch['inputs'])):
    real = batch['weights'][row] == 1
    places = batch['target_positions'][row, real]
    tokens = batch['inputs'][row].copy()
    tokens[places] = batch['targets'][row, real]
    yield tuple(tokens), tuple(places)


def test_masks_change_from_epoch_to_epoch_but_not_in_evaluation(tmp_path):
  corpus = _corpus(tmp_path)
  config = _config(objective=masked_lm.MaskedLM())
  batches = batches_lib.TrainBatches(corpus, config, seed=0)
  masks = {}
  for step in range(2 * batches.steps_per_epoch):
    batch = batches[step]
    for tokens, places in _unmasked(batch):
      masks.setdefault(tokens, set()).add(places)
  assert max(map(len, masks.values())) > 1
  first, second = (
    _take(input_pipeline.eval_batches(corpus, config, 'validation'), 9)
    for _ in range(2)
  )
  for a, b in zip(first, second):
    _assert_equal(a, b)


def test_static_masks_stay_with_their_rows(tmp_path):
  corpus = _corpus(tmp_path)
  config = _config(objective=masked_lm.MaskedLM(static=True))
  batches = batches_lib.TrainBatches(corpus, config, seed=0)
  masks = {}
  for step in range(3 * batches.steps_per_epoch):
    batch = batches[step]
    for tokens, places in _unmasked(batch):
      masks.setdefault(tokens, set()).add(places)
  assert len(masks) > 20
  assert max(map(len, masks.values())) == 1


def test_no_two_examples_of_a_run_share_a_mask(tmp_path):
  corpus = _corpus(tmp_path)
  (stream,) = corpus.splits['train']
  # One document without an end, so that only chance tells masks apart.
  stream.__dict__['tokens'] = np.full(len(stream.tokens), 200)
  config = _config(objective=masked_lm.MaskedLM())
  batches = batches_lib.TrainBatches(corpus, config, seed=0)
  masks = np.concatenate(
    [batches[step]['target_positions'] for step in range(50)]
  )
  full = masks[masks.any(axis=1)]
  assert len(np.unique(full, axis=0)) == len(full)


def test_evaluation_is_one_pass_with_an_empty_end(tmp_path):
  corpus = _corpus(tmp_path)
  config = _config()
  made = list(input_pipeline.eval_batches(corpus, config, 'validation'))
  (stream,) = corpus.splits['validation']
  weight = sum(b['weights'].sum() for b in made)
  assert weight == stream.num_tokens - stream.num_documents
  num_rows = -(-(stream.num_tokens - 1) // 64)
  assert num_rows % 8 and len(made) == -(-num_rows // 8)
  used = made[-1]['segments'].any(axis=1)
  assert used.tolist() == [i < num_rows % 8 for i in range(8)]
  assert (
    len(
      list(input_pipeline.eval_batches(corpus, config, 'train', max_batches=2))
    )
    == 2
  )
  assert len(
    list(
      input_pipeline.eval_batches(corpus, config, 'train', max_batches=10**6)
    )
  ) == len(made)


def test_evaluation_of_buckets_covers_every_document(tmp_path):
  corpus = _corpus(tmp_path)
  config = _config(length=128, batching=config_lib.Pad(buckets=(16, 32, 128)))
  made = list(input_pipeline.eval_batches(corpus, config, 'validation'))
  assert sum(b['segments'].any(axis=1).sum() for b in made) == 100
  assert {b['inputs'].shape[1] for b in made} == {16, 32, 128}


def test_threads_do_not_change_the_batches(tmp_path):
  corpus = _corpus(tmp_path)
  plain, threaded = (
    _take(
      input_pipeline.train_batches(corpus, _config(num_threads=n), seed=0), 20
    )
    for n in (0, 3)
  )
  for a, b in zip(plain, threaded):
    _assert_equal(a, b)


def test_too_small_for_a_batch(tmp_path):
  corpus = _corpus(tmp_path, num_documents=2)
  with pytest.raises(
    ValueError,
    match=r"'train' has \d rows of data.length=64, less than one batch of "
    'data.batch_size=8. Give more text, or lower',
  ):
    input_pipeline.train_batches(corpus, _config(), seed=0)


def test_unknown_split(tmp_path):
  corpus = _corpus(tmp_path)
  with pytest.raises(
    ValueError, match=r"Unknown split 'test'; .*\['train', 'validation'\]"
  ):
    input_pipeline.eval_batches(corpus, _config(), 'test')


def test_rows_outside_the_batch(tmp_path):
  corpus = _corpus(tmp_path)
  for rows in (slice(4, 12), slice(3, 3)):
    with pytest.raises(ValueError, match='not rows of a batch of .*=8'):
      input_pipeline.train_batches(corpus, _config(), seed=0, rows=rows)


def test_objective_defaults_to_next_token():
  assert _config().objective == causal_lm.CausalLM()
