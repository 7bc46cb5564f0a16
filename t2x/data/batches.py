"""Training and evaluation batches of a corpus, each found by its number.

Rows are shuffled by a function of their index, so the batch of any step is
found without computing those before it. Every random draw is keyed by the seed,
by the number of the example in the split, and by how often the example was read
before. A host therefore reads only its own rows of a batch, and an example
depends neither on the number of hosts nor on the batch that it is in.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from t2x.data import config as config_lib
from t2x.data import corpus as corpus_lib
from t2x.data import history
from t2x.data import in_order
from t2x.data import layouts as layouts_lib
from t2x.data import order
from t2x.data import rows as rows_lib
from t2x.data import words
from t2x.objectives import batch_keys
from t2x.objectives import denoising
from t2x.objectives import noise
from t2x.objectives import vocab as vocab_lib

Batch = dict[str, np.ndarray]


class TrainBatches:
  """The training batches of one corpus, indexed by step.

  `batches[step]` holds the rows of a batch that this host reads. With several
  buckets, each batch comes from one of them: an epoch is a shuffled sequence of
  buckets, in which each occurs as often as its rows fill a batch.

  Attributes:
    steps_per_epoch: steps in which every row is read once.
    order: values that decide the order of the rows, besides the seed and the
      corpus.
    tokens_a_row: average number of tokens in a row.
  """

  def __init__(
    self,
    corpus: corpus_lib.Corpus,
    config: config_lib.DataConfig,
    *,
    seed: int,
    rows: slice | np.ndarray | None = None,
    segments: Sequence[history.Segment] = (),
  ):
    """Starts at the first step of the last segment, or at step 0.

    Args:
      corpus: the tokenised corpus.
      config: the settings that the corpus was prepared with.
      seed: seed of the order of rows and of every random draw.
      rows: rows of the batch that this host reads; see
        `input_pipeline.train_batches`.
      segments: segments of one order, the last of which has
        `config.batch_size`; none for a run that has had one batch size only.

    Raises:
      ValueError: if the split has too few rows.
    """
    self._make = BatchMaker(corpus, config, config.train_split, rows, seed=seed)
    sizes = self._make.layout.group_sizes()
    if sum(sizes) < config.batch_size:
      raise ValueError(
        f'Split {config.train_split!r} has {sum(sizes)} rows of '
        f'data.length={config.length}, less than one batch of '
        f'data.batch_size={config.batch_size}. Give more text, or lower '
        'data.length or data.batch_size.'
      )
    sizes = [s.batch_size for s in segments] or [config.batch_size]
    assert sizes[-1] == config.batch_size
    self._start = segments[-1].step if segments else 0
    steps = history.lengths(segments)
    streams = corpus.streams(config.train_split)
    if self._make.in_order:
      self._plan = _in_order(self._make.layout, sizes, steps)
    else:
      layouts = [
        rows_lib.make(
          dataclasses.replace(config, batch_size=size),
          streams,
          self._make.vocab,
        )
        for size in sizes
      ]
      self._plan = _shuffled(layouts, sizes, steps, seed)
    self.steps_per_epoch = self._plan.epoch
    self.order = self._make.layout.order, self._make.in_order
    self.tokens_a_row = self._make.tokens_a_row
    if self._make.in_order and self.steps_per_epoch < 2:
      (num,) = self._make.layout.group_sizes()
      raise ValueError(
        f'data.batching=stream: split {config.train_split!r} has {num} '
        f'rows of data.length={config.length}, one for each of data.batch_size='
        f'{config.batch_size}, so none would ever go on. Give more text, or '
        'lower data.length or data.batch_size.'
      )

  def __getitem__(self, step: int) -> Batch:
    return self._make(self._plan.read(step - self._start, self._make.range))


def _in_order(
  layout: layouts_lib.RowLayout, sizes: Sequence[int], steps: Sequence[int]
) -> in_order.InOrder:
  """Returns the plan for the last of several batch sizes, in text order."""
  (num,) = layout.group_sizes()
  plan = in_order.InOrder(num, sizes[0])
  for size, length in zip(sizes[1:], steps, strict=True):
    plan = in_order.InOrder(num, size, *plan.rest(length))
  return plan


def _shuffled(
  layouts: Sequence[layouts_lib.RowLayout],
  sizes: Sequence[int],
  steps: Sequence[int],
  seed: int,
) -> order.Shuffled:
  """Returns the plan for the last of several batch sizes, in random order."""
  plan = rests = None
  for i, (layout, size) in enumerate(zip(layouts, sizes, strict=True)):
    if plan is not None:
      rests = plan.rests(steps[i - 1])
      old = layouts[i - 1]
      if isinstance(old, rows_lib.Padded):
        assert isinstance(layout, rows_lib.Padded)
        old, new = ([*map(x.documents, range(len(x)))] for x in (old, layout))
        rests = order.dealt(rests, plan, old, new)
    groups = layout.group_sizes()
    # Hashed, as Grain adds the epoch to the seed: with seeds as they are, the
    # second epoch of one run would be the first of another.
    seeds = noise.keys(seed, np.arange(len(groups) + 1)) >> np.uint64(32)
    plan = order.Shuffled(groups, size, seeds, rests)
  assert plan is not None
  return plan


class EvalBatches:
  """The batches of one pass over a split for evaluation, indexed from 0.

  `batches[i]` holds the rows of the i-th batch that this host reads. Rows are
  in the order of the split, and empty rows fill the last batch of each bucket.
  """

  def __init__(
    self,
    corpus: corpus_lib.Corpus,
    config: config_lib.DataConfig,
    split: str,
    *,
    rows: slice | np.ndarray | None = None,
    task: str = '',
  ):
    # The same masks at each evaluation, whatever the run's seed.
    self._make = BatchMaker(corpus, config, split, rows, task=task)
    self._batch_size = config.batch_size
    self._sizes = self._make.layout.group_sizes()
    self._ends = np.cumsum(
      [math.ceil(s / config.batch_size) for s in self._sizes]
    )
    if self._make.in_order:
      self._plan = in_order.InOrder(self._sizes[0], config.batch_size)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> Batch:
    lanes = self._make.range
    if self._make.in_order:
      return self._make(self._plan.read(index, lanes))
    group = int(np.searchsorted(self._ends, index, side='right'))
    first = int(self._ends[group - 1]) if group else 0
    rows = (index - first) * self._batch_size + lanes
    rows = np.where(rows < self._sizes[group], rows, -1)
    return self._make(order.apart(group, rows))


class BatchMaker:
  """Makes batches from rows: reads their tokens and applies the objective.

  The random numbers of an example are a function of the seed, of its number in
  the split and of how often it was read before. They depend neither on its
  batch nor on the length of its row.

  Attributes:
    vocab: the tokenizer's special ids, with the lexicon and the labels that the
      objective needs.
    layout: the rows of the split.
    range: numbers of the rows of a batch that this host reads.
    in_order: whether each row continues the row above it in the batch before.
  """

  def __init__(
    self,
    corpus: corpus_lib.Corpus,
    config: config_lib.DataConfig,
    split: str,
    rows: slice | np.ndarray | None,
    *,
    seed: int | None = None,
    task: str = '',
  ):
    """Opens a split of a corpus.

    Args:
      corpus: the tokenised corpus of one task.
      config: the settings that the corpus was prepared with.
      split: name of the split.
      rows: rows of the batch that this host reads, a slice or their numbers;
        None for all.
      seed: seed of training; None for evaluation, whose random numbers are the
        same whatever the run's seed.
      task: name of the task in a mixture, empty without one.
    """
    self.vocab = _vocab(corpus, config)
    streams, full = corpus.streams(split), seed is not None
    self.layout = rows_lib.make(config, streams, self.vocab, full=full)
    self.range = _range(rows, config.batch_size)
    self._objective: Any = config.objective  # The objective of one task.
    self.in_order = isinstance(config.batching, config_lib.Stream)
    self._is_full = config_lib.is_full(config)
    purpose = 'evaluation' if seed is None else 'training'
    self._seed = noise.seed_of_name(seed or 0, f'{purpose} {task}')

  @property
  def tokens_a_row(self) -> float:
    """The average number of tokens in a row; its length if rows are full."""
    if self._is_full:
      return self.layout.group_lengths()[0]
    return self.layout.count().tokens / sum(self.layout.group_sizes())

  def share_lost(self, num: int = 256) -> float:
    """Returns the share of the text that noising leaves out of full rows.

    Many short documents need more room for their end tokens and sentinels than
    one long document, and tokens that do not fit are left out of the row.

    Args:
      num: number of rows, evenly spaced in the split, that the share is
        estimated from.
    """
    objective = self._objective
    if not (
      objective.has_encoder and isinstance(self.layout, rows_lib.Windows)
    ):
      return 0.0
    (size,) = self.layout.group_sizes()
    rows = np.unique(np.linspace(0, size - 1, num).astype(np.int64))
    # Full rows draw nothing as they are read.
    (source,) = self.layout.read(0, rows, np.zeros(len(rows), np.int64))
    batch = self(order.apart(0, rows))
    is_text = self.vocab.is_text
    num_kept = (is_text(batch['targets']) & (batch['segments'] > 0)).sum()
    # The targets of denoising are the whole document.
    if not isinstance(objective, denoising.Denoising):
      is_token = batch['encoder_segments'] > 0
      num_kept += (is_text(batch['encoder_inputs']) & is_token).sum()
    num_text = (is_text(source.tokens) & (source.segments > 0)).sum()
    return 1.0 - float(num_kept) / max(float(num_text), 1.0)

  def __call__(self, read: order.Read) -> Batch:
    examples = self.layout.examples(read.group, read.rows)
    keys = noise.keys(self._seed, examples)
    if not self._objective.draws_once:
      keys = noise.keys_of_visits(keys, read.visits)
    batch = self._objective.examples(
      *self.layout.read(read.group, read.rows, keys),
      keys=keys,
      vocab=self.vocab,
      length=self.layout.group_lengths()[read.group],
    )
    if not self.in_order:
      return batch
    assert isinstance(self.layout, rows_lib.Windows)
    goes_on = read.goes_on & self.layout.continues(read.rows)
    return batch | {batch_keys.CONTINUES: goes_on[:, None].astype(np.int32)}


def _vocab(
  corpus: corpus_lib.Corpus, config: config_lib.DataConfig
) -> vocab_lib.Vocab:
  """Returns the vocabulary with the lexicon and labels of the objective."""
  tokenizer, stream = corpus.tokenizer, corpus.streams(config.train_split)[0]
  lexicon = words.lexicon(config.objective, tokenizer, stream)
  labels = words.labels(config, corpus)
  return dataclasses.replace(tokenizer.vocab, lexicon=lexicon, labels=labels)


def _range(rows: slice | np.ndarray | None, batch_size: int) -> np.ndarray:
  """Returns the numbers of the rows of a batch that this host reads."""
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
