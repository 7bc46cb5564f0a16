"""A run whose batch size changes reads on where it was."""

import collections

import numpy as np
import pytest

from t2x.data import batches as batches_lib
from t2x.data import config as config_lib
from t2x.data import corpus as corpus_lib
from t2x.data import history
from t2x.data import input_pipeline
from t2x.data import mixing
from t2x.data import token_store
from t2x.data import tokenizers
from t2x.objectives import causal_lm
from t2x.objectives import masked_lm
from t2x.objectives import mixture
from t2x.objectives import source_target

BUCKETS = config_lib.Pad(buckets=(16, 32, 64))
ONE_GROUP = {
  'packed': {},
  'padded': {'batching': config_lib.Pad()},
  'packed pairs': {'objective': source_target.SourceTarget()},
}


def _corpus(path, lengths, num_streams=1):
  rng = np.random.default_rng(0)
  for i in range(num_streams):
    documents = [np.r_[3, rng.integers(105, 361, n - 2), 1] for n in lengths]
    token_store.write(path, str(i), [(documents, 1)], vocab_size=361)
  streams = tuple(
    token_store.TokenStream(path, str(i)) for i in range(num_streams)
  )
  return corpus_lib.Corpus(
    tokenizer=tokenizers.BytesTokenizer(tokenizers.Bytes()),
    fingerprint='x',
    splits={'train': streams},
  )


def _lengths(num=90, seed=0):
  return np.random.default_rng(seed).integers(3, 65, num)


def _config(batch_size, **settings):
  settings = {'length': 64, **settings}
  return config_lib.DataConfig(batch_size=batch_size, **settings)


def _segments(sizes):
  """Segments of (steps, batch size)."""
  starts = np.cumsum([0, *(steps for steps, _ in sizes)])
  return [
    history.Segment(step=int(start), batch_size=size)
    for start, (_, size) in zip(starts, sizes)
  ]


def _reads(corpus, sizes, make=batches_lib.TrainBatches, hosts=1, **settings):
  """The batches of each segment, each made of the history alone."""
  segments = _segments(sizes)
  for i, (steps, size) in enumerate(sizes):
    config = _config(size, **settings)
    parts = [
      make(corpus, config, seed=3, rows=rows, segments=segments[: i + 1])
      for rows in np.array_split(np.arange(size), hosts)
    ]
    start = segments[i].step
    yield [[part[s] for part in parts] for s in range(start, start + steps)]


def _numbers(corpus, sizes, **settings):
  """Number and visit of the examples that each step of a segment reads."""
  segments = _segments(sizes)
  for i, (steps, size) in enumerate(sizes):
    batches = batches_lib.TrainBatches(
      corpus, _config(size, **settings), seed=3, segments=segments[: i + 1]
    )
    lanes, layout = np.arange(size), batches._make.layout
    reads = [batches._plan.read(number, lanes) for number in range(steps)]
    yield [
      [*zip(layout.examples(r.group, r.rows).tolist(), r.visits.tolist())]
      for r in reads
    ]


def _flat(reads):
  return [row for segment in reads for step in segment for row in step]


def _random_sizes(seed, least=1, most=24):
  rng = np.random.default_rng(seed)
  return [
    (int(rng.integers(0, 12)), int(rng.integers(least, most)))
    for _ in range(rng.integers(2, 7))
  ]


@pytest.mark.parametrize('kind', ONE_GROUP)
def test_any_batch_sizes_read_one_sequence(tmp_path, kind):
  settings = ONE_GROUP[kind]
  pairs = 'objective' in settings
  corpus = _corpus(tmp_path, _lengths(60), 1 + pairs)
  for seed in range(3):
    sizes = _random_sizes(seed)
    found = _flat(_numbers(corpus, sizes, **settings))
    want = _flat(_numbers(corpus, [(len(found), 1)], **settings))
    assert found == want
    assert len({*found}) == len(found)


def test_mixtures_read_one_sequence_of_each_task(tmp_path):
  tasks = tuple(
    mixture.Task(name=name, objective=masked_lm.MaskedLM(), rate=rate)
    for name, rate in (('a', 2.0), ('b', 1.0))
  )
  parts = {}
  for name, num in (('a', 40), ('b', 25)):
    (tmp_path / name).mkdir()
    parts[name] = _corpus(tmp_path / name, _lengths(num))
  corpus = corpus_lib.Corpus(
    tokenizer=parts['a'].tokenizer, fingerprint='x', splits={}, tasks=parts
  )
  settings = {
    'objective': mixture.Mixture(tasks=tasks),
    'make': mixing.MixedBatches,
  }
  one = lambda sizes, hosts=1: [
    tuple((name, *map(int, array[b])) for name, array in sorted(part.items()))
    for segment in _reads(corpus, sizes, hosts=hosts, **settings)
    for step in segment
    for part in step
    for b in range(len(part['inputs']))
  ]
  for seed in range(2):
    sizes = _random_sizes(seed, least=3)
    found = one(sizes, hosts=3)
    assert found == one([(len(found), 1)])


def _in_buckets(sizes_of=(24, 48, 12)):
  """So many documents of each bucket, mixed."""
  lengths = np.repeat((10, 25, 50), sizes_of)
  return np.random.default_rng(0).permutation(lengths)


def test_an_epoch_in_buckets_is_read_once_whatever_the_sizes(tmp_path):
  """Where what is left of each bucket is whole batches."""
  sizes_of, tried = (24, 48, 12), 0
  lengths = _in_buckets(sizes_of)
  corpus = _corpus(tmp_path, lengths)
  for first, second in ((2, 3), (4, 6), (6, 2), (6, 4), (12, 3), (12, 6)):
    for steps in range(1, 84 // first, 5):
      begun, *_ = _numbers(corpus, [(steps, first)], batching=BUCKETS)
      read = collections.Counter(lengths[n] for n, _ in _flat([begun]))
      left = [n - read[at] for n, at in zip(sizes_of, (10, 25, 50))]
      if any(n % second for n in left):
        continue
      tried += 1
      sizes = [(steps, first), (sum(left) // second, second)]
      sizes += [(84 // second, second)]
      reads = [*_numbers(corpus, sizes, batching=BUCKETS)]
      epochs = [_flat(reads[:2]), _flat(reads[2:])]
      for visit, epoch in enumerate(epochs):
        assert sorted(epoch) == [(n, visit) for n in range(84)]
  assert tried > 6


@pytest.mark.parametrize('seed', range(12))
def test_no_row_in_buckets_is_read_twice_in_a_visit_or_left_out(tmp_path, seed):
  """Batch sizes that merge buckets, and sizes that part them again."""
  rng = np.random.default_rng(seed)
  sizes_of = rng.integers(1, 40, 3)
  corpus = _corpus(tmp_path, _in_buckets(sizes_of))
  num = int(sizes_of.sum())
  sizes = [
    (int(rng.integers(0, 9)), int(rng.integers(1, min(num, 20) + 1)))
    for _ in range(4)
  ]
  sizes.append((3 * num, 1))
  found = _flat(_numbers(corpus, sizes, batching=BUCKETS))
  assert len({*found}) == len(found)
  counts = collections.Counter(number for number, _ in found)
  assert len(counts) == num
  # Groups run ahead of each other by roundings, each at most half a batch.
  assert max(counts.values()) - min(counts.values()) <= 2 + len(sizes)


@pytest.mark.parametrize('seed', range(10))
def test_streams_are_dealt_anew(tmp_path, seed):
  settings = {'batching': config_lib.Stream(), 'length': 16}
  corpus = _corpus(tmp_path, _lengths(60, seed))
  sizes = [*_random_sizes(seed), (40, 7)]
  seen = collections.Counter()
  numbers = _numbers(corpus, sizes, **settings)
  layout = batches_lib.TrainBatches(
    corpus, _config(2, **settings), seed=0
  )._make.layout
  (num,) = layout.group_sizes()
  for segment, made in zip(numbers, _reads(corpus, sizes, **settings)):
    before = None
    for rows, (batch,) in zip(segment, made):
      # A visit is over before the next one begins.
      visits = {visit for row, visit in rows if row >= 0}
      for row, visit in rows:
        if row >= 0:
          seen[visit, row] += 1
      assert len(visits) <= 1
      earlier = sum(1 for visit, _ in seen if visit < max(visits, default=0))
      assert earlier == num * max(visits, default=0)
      for b, (row, _) in enumerate(rows):
        goes_on = (
          before is not None
          and before[b][0] == row - 1 >= 0
          and layout.continues(np.array([row]))[0]
        )
        assert batch['continues'][b, 0] == goes_on
      before = rows
      if sum(1 for visit, _ in seen if visit == max(visits)) == num:
        before = None
  assert max(seen.values()) == 1


# --- The history itself. ---


def test_steps_of_a_run_follow_its_batch_sizes():
  segment = lambda step, size: history.Segment(
    step=step, batch_size=size, epoch=120 // size, tokens=size * 10.0
  )
  steps = history.num_steps
  assert steps([segment(0, 4)], epochs=2) == 60
  assert steps([segment(0, 4)], tokens=401) == 11
  parts = [segment(0, 4), segment(20, 8), segment(30, 2)]
  # 80 + 80 of 240 rows, and the rest in twos.
  assert steps(parts, epochs=2) == 30 + 40
  assert steps(parts, tokens=2400) == 30 + 40
  assert steps(parts, tokens=1601) == 31
  assert steps(parts, tokens=1000) == 30
  assert steps([segment(0, 4)], epochs=1e-6) == 1


def test_a_history_goes_on_from_any_checkpoint():
  now = lambda step, size, order='a': history.Segment(
    step=step, batch_size=size, order=order
  )
  parts = history.continued([], now(0, 8))
  assert parts == [now(0, 8)]
  assert history.continued(parts, now(5, 8)) == parts
  parts = history.continued(parts, now(10, 16))
  assert parts == [now(0, 8), now(10, 16)]
  # No step was taken with it.
  assert history.continued(parts, now(10, 8)) == [now(0, 8)]
  assert history.continued(parts, now(10, 4)) == [now(0, 8), now(10, 4)]
  assert history.continued(parts, now(0, 4)) == [now(0, 4)]
  saved = history.to_json(parts, 12)
  assert history.from_json(saved) == parts
  assert history.from_json({'step': 12}) == []
  anew = history.continued(parts, now(12, 16, 'b'))
  assert history.of_one_order(anew) == [now(12, 16, 'b')]
  back = history.continued(anew, now(20, 16))
  assert history.of_one_order(back) == [now(20, 16)]


def test_an_order_is_named_by_what_it_depends_on(tmp_path):
  corpus = _corpus(tmp_path, _lengths())
  name = lambda seed=0, **s: (
    input_pipeline.segment(corpus, _config(8, **s), seed=seed).order
  )
  own = name()
  masked = masked_lm.MaskedLM
  assert own == name(num_threads=3)
  for other in (
    {'seed': 1},
    {'length': 32},
    {'batching': config_lib.Pad()},
    {'batching': config_lib.Stream()},
    {'batching': BUCKETS},
    {'objective': masked()},  # Rows of other tokens.
  ):
    assert name(**other) != own, other
  same = {'objective': masked()}
  assert name(**same) == name(objective=masked(rate=0.4))
  assert name() == name(objective=causal_lm.CausalLM(ahead=1))
