"""Batches of a mixture of tasks; each row is an example of one task."""

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
  """The training batches of a mixture, indexed by step.

  `batches[step]` holds the rows of a batch that this host reads. Each task
  reads its rows in a random order of its own, all of them before any comes
  again. The order depends neither on the number of hosts nor on the tasks'
  rates.

  Attributes:
    steps_per_epoch: steps that read as many rows as all tasks have.
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
    """Takes the arguments of `batches.TrainBatches`.

    Raises:
      ValueError: if a task has no rows.
    """
    assert isinstance(config.objective, mixture.Mixture)
    parts = config_lib.parts(config)
    self._parts = [
      batches_lib.BatchMaker(
        corpus.tasks[name], part, part.train_split, rows, seed=seed, task=name
      )
      for name, part in parts.items()
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
    # Number of examples in the segments before.
    self._past = sum(n * s.batch_size for n, s in zip(steps, segments))

  def __getitem__(self, step: int) -> batches_lib.Batch:
    examples = self._past + (step - self._start) * self._config.batch_size
    examples = examples + self._parts[0].range
    tasks, numbers = mixture.split(examples, self._shares)
    batch = empty(self._config, len(examples))
    for task, part in enumerate(self._parts):
      (places,) = np.nonzero(tasks == task)
      if len(places):
        rows, visits = self._groups[task].at(numbers[places])
        fill(batch, places, task, part(order.apart(0, rows, visits)))
    return batch


class TaskBatches:
  """The batches of one pass over one task's split, indexed from 0.

  They have the arrays of a mixture's batches. Takes the arguments of
  `batches.EvalBatches`.
  """

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
    task_batch = self._batches[index]
    num = len(task_batch['inputs'])
    batch = empty(self._config, num)
    fill(batch, np.arange(num), self._number, task_batch)
    return batch


def empty(config: config_lib.DataConfig, num: int) -> batches_lib.Batch:
  """Returns a batch of zeros that has the arrays of every task.

  Args:
    config: settings of the mixture.
    num: number of rows.
  """
  lengths = config.objective.lengths(config.length)
  return {
    name: np.zeros((num, length), batch_keys.of(name).dtype)
    for name, length in lengths.items()
  }


def fill(
  batch: batches_lib.Batch,
  places: np.ndarray,
  task: int,
  rows: batches_lib.Batch,
) -> None:
  """Writes the rows of one task into a mixture's batch.

  Arrays that the task lacks stay 0 in these rows, and so do their weights.

  Args:
    batch: the batch of the mixture, changed in place.
    places: places of the rows in the batch.
    task: number of the task.
    rows: the rows, a batch of the task.
  """
  batch[batch_keys.TASKS][places] = task
  for name, array in rows.items():
    batch[name][places, : array.shape[1]] = array
