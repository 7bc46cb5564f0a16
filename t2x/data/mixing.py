"""Batches of a mixture: each row is of one task, found by its number."""

from collections.abc import Sequence
import math

import numpy as np

from t2x.data import batches as batches_lib
from t2x.data import config as config_lib
from t2x.data import corpus as corpus_lib
from t2x.data import history
from t2x.data import order
from t2x.objectives import batch_keys
from t2x.objectives import mixture
from t2x.objectives import noise


class MixedBatches:
  """`batches[step]` is this host's part of the batch of any step.

  A task goes through its rows in an order of its own, once before any comes
  again. As for one task, nothing depends on the number of hosts; nor does what
  is read depend on rates.
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
    """Arguments as for `batches.TrainBatches`."""
    assert isinstance(config.objective, mixture.Mixture)
    parts = config_lib.parts(config)
    self._parts = [
      batches_lib.Examples(
        corpus.tasks[name], own, own.train_split, rows, seed=seed, task=name
      )
      for name, own in parts.items()
    ]
    sizes = [part.layout.group_sizes()[0] for part in self._parts]
    for name, size in zip(parts, sizes):
      if not size:
        raise ValueError(
          f'Task {name!r} has no row in split {config.train_split!r}. Give it '
          'more text, or leave it out of data.objective.tasks.'
        )
    self.steps_per_epoch = math.ceil(sum(sizes) / config.batch_size)
    self._shares = shares = config.objective.shares(sizes)
    orders = [part.layout.order for part in self._parts]
    self.order = [*parts], [*shares], orders
    tokens = [part.tokens_a_row for part in self._parts]
    self.tokens_a_row = float(shares @ tokens)
    seeds = noise.keys(seed, np.arange(len(sizes))) >> np.uint64(32)
    self._groups = [order.Group(n, s) for n, s in zip(sizes, seeds)]
    self._config = config
    self._start = segments[-1].step if segments else 0
    steps = history.lengths(segments)
    # Examples of the steps before.
    self._past = sum(n * s.batch_size for n, s in zip(steps, segments))

  def __getitem__(self, step: int) -> batches_lib.Batch:
    examples = self._past + (step - self._start) * self._config.batch_size
    examples = examples + self._parts[0].range
    tasks, numbers = mixture.split(examples, self._shares)
    batch = empty(self._config, len(examples))
    for task, part in enumerate(self._parts):
      (own,) = np.nonzero(tasks == task)
      if len(own):
        rows, visits = self._groups[task].at(numbers[own])
        fill(batch, own, task, part(order.apart(0, rows, visits)))
    return batch


class TaskBatches:
  """`batches[i]` is this host's part of one pass over one task's split."""

  def __init__(
    self,
    corpus: corpus_lib.Corpus,
    config: config_lib.DataConfig,
    split: str,
    task: str,
    *,
    rows: slice | np.ndarray | None = None,
  ):
    parts = config_lib.parts(config)
    self._config, self._number = config, [*parts].index(task)
    self._batches = batches_lib.EvalBatches(
      corpus.tasks[task], parts[task], split, rows=rows, task=task
    )

  def __len__(self) -> int:
    return len(self._batches)

  def __getitem__(self, index: int) -> batches_lib.Batch:
    own = self._batches[index]
    num = len(own['inputs'])
    batch = empty(self._config, num)
    fill(batch, np.arange(num), self._number, own)
    return batch


def empty(config: config_lib.DataConfig, num: int) -> batches_lib.Batch:
  """Returns rows of nothing, with the arrays of every task."""
  lengths = config.objective.lengths(config.length)
  return {
    name: np.zeros((num, own), batch_keys.of(name).dtype)
    for name, own in lengths.items()
  }


def fill(
  batch: batches_lib.Batch,
  places: np.ndarray,
  task: int,
  rows: batches_lib.Batch,
) -> None:
  """Puts rows of a task into a batch; what it has not weighs nothing."""
  batch[batch_keys.TASKS][places] = task
  for name, array in rows.items():
    batch[name][places, : array.shape[1]] = array
