"""Any batch of a corpus, found by its number.

Rows are shuffled by a function of their index, so any step is found without
those before it, and every random draw is keyed by the seed and the number of
the example since the start. A host therefore reads its own rows of any batch
and nothing else, and the batches do not depend on the number of hosts.
"""

import dataclasses
import math

import grain
import numpy as np

from t2x.data import config as config_lib
from t2x.data import corpus as corpus_lib
from t2x.data import rows as rows_lib
from t2x.data import words
from t2x.objectives import noise
from t2x.objectives import vocab as vocab_lib

Batch = dict[str, np.ndarray]

_EVAL_SEED = 0  # The same masks at each evaluation, whatever the run's seed.


class TrainBatches:
  """`batches[step]` is this host's part of the batch of any step.

  With several buckets, an epoch is a shuffled sequence of them, each as often
  as its rows fill a batch.
  """

  def __init__(
    self,
    corpus: corpus_lib.Corpus,
    config: config_lib.DataConfig,
    *,
    seed: int,
    rows: slice | np.ndarray | None = None,
  ):
    self._make = Examples(corpus, config, config.train_split, seed, rows)
    self._batch_size = config.batch_size
    sizes = self._make.layout.group_sizes()
    if sum(sizes) < config.batch_size:
      raise ValueError(
        f'Split {config.train_split!r} has {sum(sizes)} rows of '
        f'data.length={config.length}, less than one batch of '
        f'data.batch_size={config.batch_size}. Give more text, or lower '
        'data.length or data.batch_size.'
      )
    # Rounding up would repeat the rows of small buckets more often.
    whole = math.ceil if len(sizes) == 1 else round
    self._counts = [whole(s / config.batch_size) for s in sizes]
    self.steps_per_epoch = sum(self._counts)
    if self._make.in_order and self.steps_per_epoch < 2:
      raise ValueError(
        f'data.batching=stream: split {config.train_split!r} has {sum(sizes)} '
        f'rows of data.length={config.length}, one for each of data.batch_size='
        f'{config.batch_size}, so none would ever go on. Give more text, or '
        'lower data.length or data.batch_size.'
      )
    # Hashed, as Grain adds the epoch to the seed: with seeds as they are, the
    # second epoch of one run would be the first of another.
    seeds = noise.keys(seed, np.arange(len(sizes) + 1)) >> np.uint64(32)
    self._batch_order = shuffled(self.steps_per_epoch, seeds[0])
    self._row_orders = [shuffled(n, s) for n, s in zip(sizes, seeds[1:])]

  def __getitem__(self, step: int) -> Batch:
    examples = step * self._batch_size + self._make.range
    if self._make.in_order:
      place = step % self.steps_per_epoch  # All begin anew together.
      return self._make.at(place, self.steps_per_epoch, examples)
    group, batch = self._locate(step)
    places = batch * self._batch_size + self._make.range
    order = self._row_orders[group]
    rows = np.array([get(order, i) for i in places])
    return self._make(group, rows, examples)

  def _locate(self, step: int) -> tuple[int, int]:
    """Returns the group of a step, and the batch's number in the group."""
    if len(self._counts) == 1:
      return 0, step
    number = get(self._batch_order, step)
    ends = np.cumsum(self._counts)
    group = int(np.searchsorted(ends, number, side='right'))
    in_group = number - (int(ends[group - 1]) if group else 0)
    return group, step // self.steps_per_epoch * self._counts[group] + in_group


class EvalBatches:
  """`batches[i]` is this host's part of the i-th batch of one pass."""

  def __init__(
    self,
    corpus: corpus_lib.Corpus,
    config: config_lib.DataConfig,
    split: str,
    *,
    rows: slice | np.ndarray | None = None,
  ):
    self._make = Examples(corpus, config, split, _EVAL_SEED, rows)
    self._batch_size = config.batch_size
    self._sizes = self._make.layout.group_sizes()
    self._ends = np.cumsum(
      [math.ceil(s / config.batch_size) for s in self._sizes]
    )

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> Batch:
    examples = index * self._batch_size + self._make.range
    if self._make.in_order:
      return self._make.at(index, len(self), examples)
    group = int(np.searchsorted(self._ends, index, side='right'))
    first = int(self._ends[group - 1]) if group else 0
    rows = (index - first) * self._batch_size + self._make.range
    rows = np.where(rows < self._sizes[group], rows, -1)
    return self._make(group, rows, examples)


class Examples:
  """Makes examples of rows: reads them and applies the objective."""

  def __init__(self, corpus, config, split, seed, rows):
    self._vocab = _vocab(corpus, config)
    self.layout = rows_lib.make(config, corpus.streams(split), self._vocab)
    self.range = _range(rows, config.batch_size)
    self._objective = config.objective
    self.in_order = isinstance(config.batching, config_lib.Stream)
    self._seed = seed

  def at(self, place: int, num: int, examples: np.ndarray) -> Batch:
    """Returns a batch whose row b reads the b-th part of a split in order.

    Args:
      place: of the batch among those of a pass.
      num: batches of a pass, the rows of a part.
      examples: their numbers since the start.
    """
    rows = self.range * num + place
    rows = np.where(rows < self.layout.group_sizes()[0], rows, -1)
    assert isinstance(self.layout, rows_lib.Windows)
    goes_on = self.layout.continues(rows) & (place > 0)
    own = {'continues': goes_on[:, None].astype(np.int32)}
    return self(0, rows, examples) | own

  def __call__(
    self, group: int, rows: np.ndarray, examples: np.ndarray
  ) -> Batch:
    if getattr(self._objective, 'static', False):
      examples = group * 2**40 + rows
    keys = noise.keys(self._seed, examples)
    return self._objective.examples(
      *self.layout.read(group, rows, keys),
      keys=keys,
      vocab=self._vocab,
      length=self.layout.group_lengths()[group],
    )


def _vocab(corpus, config) -> vocab_lib.Vocab:
  """Returns the ids, with what the objective asks of the training text."""
  tokenizer, stream = corpus.tokenizer, corpus.streams(config.train_split)[0]
  lexicon = words.lexicon(config.objective, tokenizer, stream)
  labels = words.labels(config, corpus)
  return dataclasses.replace(tokenizer.vocab, lexicon=lexicon, labels=labels)


def shuffled(num: int, seed: np.uint64) -> grain.MapDataset:
  """An endless sequence: all of range(num), then again in another order."""
  return grain.MapDataset.range(num).shuffle(seed=int(seed)).repeat()


def _range(rows: slice | np.ndarray | None, batch_size: int) -> np.ndarray:
  rows = slice(None) if rows is None else rows
  if isinstance(rows, slice):
    stop = max(rows.stop or 0, batch_size)
    result = np.arange(*rows.indices(stop))
  else:
    result = np.asarray(rows)
  if not result.size or result.min() < 0 or result.max() >= batch_size:
    raise ValueError(
      f'{rows} are not rows of a batch of data.batch_size={batch_size}. Let '
      'each host ask for an equal part of the batch.'
    )
  return result


def get(sequence: grain.MapDataset, index: int | np.integer) -> int:
  value = sequence[int(index)]
  assert value is not None  # Nothing is filtered.
  return value
