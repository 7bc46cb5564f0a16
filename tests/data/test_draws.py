"""What is drawn for an example depends on the seed and the example alone."""

import dataclasses
import functools

import numpy as np
import pytest

from t2x.data import batches as batches_lib
from t2x.data import config as config_lib
from t2x.data import corpus as corpus_lib
from t2x.data import history
from t2x.data import mixing
from t2x.data import token_store
from t2x.data import tokenizers
from t2x.objectives import causal_lm
from t2x.objectives import classification
from t2x.objectives import denoising
from t2x.objectives import masked_lm
from t2x.objectives import masking
from t2x.objectives import mixture
from t2x.objectives import next_sentence
from t2x.objectives import permutation
from t2x.objectives import prefix_lm
from t2x.objectives import source_target
from t2x.objectives import span_corruption
from t2x.objectives import ul2

MASKED = masked_lm.MaskedLM
OBJECTIVES = {
  'causal': causal_lm.CausalLM(ahead=1),
  'prefix': prefix_lm.PrefixLM(),
  'masked': MASKED(),
  'static': MASKED(static=True),
  'dropped': MASKED(rate=0.5, dropped=True),
  'dropped most': MASKED(rate=0.75, dropped=True),
  'words': MASKED(masking=masking.Words()),
  'spans': MASKED(rate=0.3, masking=masking.Spans()),
  'phrases': MASKED(masking=masking.Phrases(least_count=2)),
  'hierarchy': MASKED(masking=masking.Hierarchy(phrases=1.0)),
  'rare': MASKED(masking=masking.Rare()),
  'by loss': MASKED(masking=masking.ByLoss()),
  'span corruption': span_corruption.SpanCorruption(),
  'denoising': denoising.Denoising(rotate=0.5, mask=0.1, delete=0.1),
  'ul2': ul2.UL2(),
  'permutation': permutation.Permutation(),
  'pairs': source_target.SourceTarget(),
  'sentences': next_sentence.NextSentence(hard=1.0, swapped=1.0),
  'classes': classification.Classification(),
}
BUCKETS = (16, 32, 64)
PACK, STREAM, PAD = config_lib.Pack(), config_lib.Stream(), config_lib.Pad()
IN_BUCKETS = config_lib.Pad(buckets=BUCKETS)


def _batchings(objective):
  if isinstance(objective, config_lib.ONE_A_ROW):
    return [PAD]
  more = [STREAM] if objective.follows_text else []
  return [PACK, PAD, IN_BUCKETS, *more]


CASES = {
  f'{name}, {batching.kind}{" in buckets" * (batching == IN_BUCKETS)}': (
    objective,
    batching,
  )
  for name, objective in OBJECTIVES.items()
  for batching in _batchings(objective)
}


@functools.cache
def _streams(directory):
  """Texts of 3 to 67 tokens, the 16th to 18th just as long as a bucket."""
  rng = np.random.default_rng(0)
  sizes = [*rng.integers(1, 66, 50), *range(13, 17), *range(29, 33), 62, 63]
  for name, numbers in (('0', sizes), ('1', sizes[::-1]), ('labels', [1] * 60)):
    documents = [
      np.r_[3, rng.integers(*(105, 107) if n == 1 else (105, 361), n), 1]
      for n in numbers
    ]
    token_store.write(directory, name, [(documents, 1)], vocab_size=361)
  return {
    n: token_store.TokenStream(directory, n) for n in ('0', '1', 'labels')
  }


def _corpus(directory, objective):
  streams = _streams(directory)
  names = ['0', '1'][: 1 + objective.paired]
  if isinstance(objective, classification.Classification):
    names = ['0', 'labels']
  own = tuple(streams[name] for name in names)
  return corpus_lib.Corpus(
    tokenizer=tokenizers.BytesTokenizer(tokenizers.Bytes()),
    fingerprint='x',
    splits={'train': own},
  )


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('draws')


def _config(objective, batching, batch_size):
  return config_lib.DataConfig(
    length=64, batch_size=batch_size, batching=batching, objective=objective
  )


def _shares(batch_size, hosts):
  """The rows of a batch that each host makes."""
  return np.array_split(np.arange(batch_size), hosts)


def _short(row):
  """An example's arrays without what pads them."""
  found = {}
  num = np.append(np.flatnonzero(row['weights']), -1).max() + 1
  few = ('targets', 'weights', 'target_positions')
  if len(row['weights']) == len(row['inputs']) and 'query_places' not in row:
    # A last token without a target has a place in longer rows alone.
    few = row if 'encoder_inputs' not in row else ()
  row = {
    name: array[:num] if name in few or 'query' in name else array
    for name, array in row.items()
  }
  for name, array in row.items():
    if name == 'continues':  # Of the part that a row reads.
      continue
    if name == 'noised':
      array = array * (row['segments'] > 0)
    filled = np.flatnonzero(array)
    end = filled[-1] + 1 if len(filled) else 0
    found[name] = array[:end].tolist()
  return repr(sorted(found.items()))


def _rows(batch):
  """The rows of a batch that hold anything, and their places."""
  for b in range(len(batch['inputs'])):
    row = {name: array[b] for name, array in batch.items()}
    if any(row[n].any() for n in row if 'segments' in n):
      yield b, _short(row)


def _examples(batches, numbers):
  """Every example of some batches, in any order."""
  return sorted(row for n in numbers for _, row in _rows(batches[n]))


def _visits(batches, steps):
  """Number and visit of each example of some steps -> the example."""
  found = {}
  for step in steps:
    read = batches._plan.read(step, batches._make.range)
    numbers = batches._make.layout.examples(read.group, read.rows)
    for b, row in _rows(batches[step]):
      assert found.setdefault((numbers[b], read.visits[b]), row) == row
  return found


@pytest.mark.parametrize('case', CASES)
def test_an_evaluation_draws_the_same_in_any_batch(directory, case):
  objective, batching = CASES[case]
  corpus = _corpus(directory, objective)
  found = []
  for batch_size, hosts in ((4, 1), (8, 3), (9, 1), (16, 1)):
    examples = []
    for rows in _shares(batch_size, hosts):
      config = _config(objective, batching, batch_size)
      batches = batches_lib.EvalBatches(corpus, config, 'train', rows=rows)
      examples += _examples(batches, range(len(batches)))
    found.append(sorted(examples))
  assert len(found[0]) > 20
  for other in found[1:]:
    assert other == found[0]


@pytest.mark.parametrize('case', CASES)
def test_training_draws_the_same_in_any_batch(directory, case):
  objective, batching = CASES[case]
  corpus = _corpus(directory, objective)
  found = []
  for batch_size, hosts in ((4, 1), (6, 3), (16, 1)):
    examples = {}
    for rows in _shares(batch_size, hosts):
      config = _config(objective, batching, batch_size)
      batches = batches_lib.TrainBatches(corpus, config, seed=3, rows=rows)
      examples |= _visits(batches, range(batches.steps_per_epoch))
    found.append(examples)
  for other in found[1:]:
    both = other.keys() & found[0].keys()
    assert len(both) > 0.8 * len(found[0])
    assert all(other[key] == found[0][key] for key in both)


@pytest.mark.parametrize('name', OBJECTIVES)
def test_a_longer_row_changes_nothing(directory, name):
  objective = OBJECTIVES[name]
  if isinstance(objective, config_lib.ONE_A_ROW):
    pytest.skip('Rows of one length.')
  corpus, found = _corpus(directory, objective), []
  for buckets in (BUCKETS, (32, 64), (64,)):
    config = _config(objective, config_lib.Pad(buckets=buckets), 8)
    batches = batches_lib.EvalBatches(corpus, config, 'train')
    found.append(_examples(batches, range(len(batches))))
  assert found[0] == found[1] == found[2]


def test_tasks_and_splits_draw_apart(directory):
  """And each as it does in any batch."""
  same = {'objective': MASKED(), 'source': 'x'}
  tasks = tuple(mixture.Task(name=n, **same) for n in 'ab')
  corpus = _corpus(directory, MASKED())
  corpus = dataclasses.replace(corpus, tasks={'a': corpus, 'b': corpus})
  found = {'a': [], 'b': []}
  trained = []
  for batch_size, hosts in ((4, 1), (12, 3)):
    config = _config(mixture.Mixture(tasks=tasks), PACK, batch_size)
    for task in found:
      batches = mixing.TaskBatches(corpus, config, 'train', task)
      found[task].append(_examples(batches, range(len(batches))))
    examples = []
    for rows in _shares(batch_size, hosts):
      batches = mixing.MixedBatches(corpus, config, seed=0, rows=rows)
      examples += _examples(batches, range(96 // batch_size))
    trained.append(sorted(examples))
  for one, other in found.values():
    assert one == other
  assert trained[0] == trained[1]
  masks = [{text.replace("('tasks', [1])", "('tasks', [])") for text in own[0]}
           for own in found.values()]  # fmt: skip
  assert not masks[0] & masks[1]
  evaluated = {text for own in found.values() for text in own[0]}
  assert not evaluated & set(trained[0])


def test_a_visit_draws_anew(directory):
  corpus = _corpus(directory, MASKED())
  config = _config(MASKED(), PAD, 60)
  batches = batches_lib.TrainBatches(corpus, config, seed=0)
  visits = [set(_examples(batches, [step])) for step in range(3)]
  # A few short texts may draw the same mask twice.
  assert all(len(visits[0] & other) < 12 for other in visits[1:])
  config = _config(MASKED(static=True), PAD, 60)
  batches = batches_lib.TrainBatches(corpus, config, seed=0)
  visits = [_examples(batches, [step]) for step in range(3)]
  assert visits[0] == visits[1] == visits[2]


def test_another_batch_size_draws_the_same(directory):
  """Of rows that a run reads after it has changed its batch size."""
  corpus = _corpus(directory, MASKED())
  whole = batches_lib.TrainBatches(corpus, _config(MASKED(), PAD, 6), seed=0)
  want = _examples(whole, range(4, 20))
  segments = [
    history.Segment(step=0, batch_size=6),
    history.Segment(step=4, batch_size=12),
  ]
  config = _config(MASKED(), PAD, 12)
  batches = batches_lib.TrainBatches(corpus, config, seed=0, segments=segments)
  assert _examples(batches, range(4, 12)) == want
