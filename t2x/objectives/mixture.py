"""Mixtures of tasks: their sampling rates and the weights of their losses."""

import dataclasses
from typing import ClassVar
from typing import Literal

import numpy as np

from t2x import field_checks
from t2x.objectives import batch_keys
from t2x.objectives import causal_lm
from t2x.objectives import classification
from t2x.objectives import denoising
from t2x.objectives import masked_lm
from t2x.objectives import masking
from t2x.objectives import next_sentence
from t2x.objectives import permutation
from t2x.objectives import prefix_lm
from t2x.objectives import source_target
from t2x.objectives import span_corruption
from t2x.objectives import ul2

Single = (
  causal_lm.CausalLM
  | prefix_lm.PrefixLM
  | masked_lm.MaskedLM
  | next_sentence.NextSentence
  | permutation.Permutation
  | span_corruption.SpanCorruption
  | denoising.Denoising
  | ul2.UL2
  | source_target.SourceTarget
  | classification.Classification
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
  """One task of a mixture; fields that are None have the values of `data`.

  Attributes:
    name: name of the task in metrics.
    objective: the training objective of the task.
    rate: sampling rate of the task's examples, relative to the other tasks.
    weight: weight of the task's losses.
    source: source of the corpus, as `data.source`.
    files: globs of the files of text_files, as `data.files`.
    text_field: name of the field with the text.
    target_field: name of the field with the target text or label.
    duplicates: documents that are dropped as copies, as `data.duplicates`.
  """

  name: str = ''
  objective: Single = masked_lm.MaskedLM()
  rate: float = 1.0
  weight: float = 1.0
  source: str | None = None
  files: str | None = None
  text_field: str | None = None
  target_field: str | None = None
  duplicates: Literal['exact', 'near', 'none'] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fixed:
  """Constant weights of the tasks' losses, as given."""

  kind: ClassVar[str] = 'fixed'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uncertainty:
  """Weights of 1 / sigma^2 (Kendall et al., 2018).

  With s = log sigma^2, the weight of a task is exp(-s), and s follows the
  gradient of exp(-s) L + s / 2, where L is the mean loss of the task's targets
  in nats. At the minimum the weight is 1 / (2 L), whatever the task's rate. The
  given weights multiply it.

  Attributes:
    learning_rate: learning rate of s.
  """

  kind: ClassVar[str] = 'uncertainty'
  learning_rate: float = 0.025


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradNorm:
  """GradNorm: weights that let all tasks train at one rate (Chen et al., 2018).

  The target norm of a task's gradient, taken at the features that the heads
  share, is the mean norm of all tasks times the task's relative inverse
  training rate to the power alpha. That rate is its loss over its first loss,
  divided by the mean of this ratio over tasks. The weights follow the gradient
  of the distance to the target, and add up to the sum of the given weights. A
  batch that lacks a task does not change them. The norm of a task with several
  heads is that of all its heads together.

  Attributes:
    alpha: strength with which slow tasks are preferred; 0 makes all norms
      equal.
    learning_rate: learning rate of the weights.
  """

  kind: ClassVar[str] = 'grad_norm'
  alpha: float = 1.5
  learning_rate: float = 0.025


Weighting = Fixed | Uncertainty | GradNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """Several tasks in one run, mixed within each batch by their rates.

  Attributes:
    tasks: the tasks. On the command line, `data.objective.tasks.0.rate=2` sets
      a field of the first.
    rates: rule of the sampling rates. `fixed` uses each task's `rate`;
      `proportional` uses its number of rows, at most `cap`, to the power 1 /
      `temperature`, times `rate` (Raffel et al., 2020, section 3.5.2).
    temperature: temperature of proportional rates; 1 samples in proportion to
      the rows, and a large value samples all tasks equally.
    cap: largest number of rows in proportional rates; None for no limit.
    weighting: rule by which the weights of the losses change.
  """

  tasks: tuple[Task, ...] = ()
  rates: Literal['fixed', 'proportional'] = 'fixed'
  temperature: float = 1.0
  cap: int | None = None
  weighting: Weighting = Fixed()

  kind: ClassVar[str] = 'mixture'
  paired: ClassVar[bool] = False
  follows_text: ClassVar[bool] = True

  def __post_init__(self) -> None:
    field_checks.positive(self, 'data.objective.', 'temperature')
    field_checks.least(self, 'data.objective.', cap=1)
    names = [task.name for task in self.tasks]
    if len(names) < 2 or '' in names or len({*names}) < len(names):
      raise ValueError(
        f'data.objective.tasks has the names {names}: a mixture is of two '
        'tasks or more, each with a name of its own.'
      )
    for what in ('rate', 'weight'):
      values = [getattr(task, what) for task in self.tasks]
      if min(values) < 0 or sum(values) <= 0:
        raise ValueError(
          f'data.objective.tasks: {what} of {dict(zip(names, values))} must '
          'not be negative, nor add up to 0.'
        )
    used = [min(task.rate, task.weight) for task in self.tasks]
    if isinstance(self.weighting, GradNorm) and min(used) <= 0:
      raise ValueError(
        f'data.objective.weighting=grad_norm: rate and weight of each of '
        f'{names} must be above 0, since weights grow by factors. Leave a task '
        'out, or set weighting=fixed.'
      )
    sides = {task.objective.has_encoder for task in self.tasks}
    if len(sides) > 1:
      raise ValueError(
        'data.objective.tasks: some objectives have an encoder and a decoder, '
        f'and some have one of them ({self._kinds()}). One model trains all.'
      )
    for task in self.tasks:
      if isinstance(task.objective.token_masking, masking.ByLoss):
        raise ValueError(
          f'data.objective.tasks: masking=by_loss of {task.name!r} is for a '
          'run of one task. Choose another masking.'
        )

  def _kinds(self) -> str:
    return ', '.join(f'{t.name}: {t.objective.kind}' for t in self.tasks)

  @property
  def token_masking(self) -> None:
    """Tasks choose masked tokens by themselves."""
    return None

  @property
  def has_encoder(self) -> bool:
    """Whether the tasks need an encoder and a decoder."""
    return self.tasks[0].objective.has_encoder

  def lengths(self, length: int) -> dict[str, int]:
    """Returns the length of a row in each array, the longest of any task."""
    lengths = {batch_keys.TASKS: 1}
    for task in self.tasks:
      for name, task_length in task.objective.lengths(length).items():
        lengths[name] = max(task_length, lengths.get(name, 0))
    return lengths

  def shares(self, num_rows: list[int]) -> np.ndarray:
    """Returns the share of each task among the examples of a run, (tasks,).

    Args:
      num_rows: number of rows of each task.
    """
    rates = np.array([task.rate for task in self.tasks])
    if self.rates == 'proportional':
      rows = np.minimum(num_rows, self.cap or max(num_rows))
      rates = rates * rows ** (1.0 / self.temperature)
    return rates / rates.sum()


def split(
  examples: np.ndarray, shares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the task of each example, and its number among that task's.

  Of the first n examples a task has n times its share, up to an error below the
  number of tasks. Any example is found without computing those before it.

  Args:
    examples: numbers of the examples since the start, from 0.
    shares: share of each task; they add up to 1.
  """
  left = np.asarray(examples, np.int64).copy()
  task = np.full(left.shape, -1)
  number = np.zeros_like(left)
  for k, share in enumerate(shares):
    # The share of the examples that the tasks before leave.
    rest = shares[k:].sum()
    part = share / rest if rest > 0 else 0.0
    if k == len(shares) - 1 or part >= 1.0:
      before, after = left, left + 1
    else:
      before = np.floor(left * part + 0.5).astype(np.int64)
      after = np.floor((left + 1) * part + 0.5).astype(np.int64)
    is_own = (task < 0) & (after > before)
    task[is_own], number[is_own] = k, before[is_own]
    left = left - before
  return task, number
