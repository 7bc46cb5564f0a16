"""Several tasks in one run: how often each comes, and what its loss weighs."""

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
  """One task of a mixture; what is None is that of `data`.

  Attributes:
    name: of its metrics.
    objective: what is predicted.
    rate: how often its examples come, beside the other tasks' rates.
    weight: of its losses.
    source: what to read.
    files: of text_files.
    text_field: the field with the text.
    target_field: the field with the target's text, or label.
    duplicates: which documents are dropped as copies.
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
  """Each task's loss has the weight that is given."""

  kind: ClassVar[str] = 'fixed'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uncertainty:
  """Weights of 1 / sigma^2 (Kendall et al., 2018).

  With s = log sigma^2 a task weighs exp(-s), and s follows the gradient of
  exp(-s) L + s / 2, where L is the mean loss of its targets (nats): at rest it
  weighs 1 / (2 L), however often it comes. Given weights are factors besides.

  Attributes:
    learning_rate: of s.
  """

  kind: ClassVar[str] = 'uncertainty'
  learning_rate: float = 0.025


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradNorm:
  """Weights that let all tasks train at one rate (Chen et al., 2018).

  A task's gradient, taken at the features that its heads share, is to have the
  mean norm of all tasks times its inverse training rate (loss over first loss,
  over the mean of that) to the power alpha; the weights follow the gradient of
  the distance, and add up to those that are given. They stay where a batch
  lacks a task. Of a task with several heads the norm is that of all together.

  Attributes:
    alpha: how strongly slow tasks are preferred; 0 makes all norms equal.
    learning_rate: of the weights.
  """

  kind: ClassVar[str] = 'grad_norm'
  alpha: float = 1.5
  learning_rate: float = 0.025


Weighting = Fixed | Uncertainty | GradNorm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
  """Examples of several tasks, in each batch as many as their rates say.

  Attributes:
    tasks: what there is. On the command line `data.objective.tasks.0.rate=2`
      sets a field of the first.
    rates: `fixed` takes each task's `rate`; `proportional` its number of rows,
      at most `cap`, to the power 1 / `temperature`, times `rate` (Raffel et
      al., 2020, section 3.5.2).
    temperature: see `rates`; 1 is in proportion, large ones even.
    cap: see `rates`; None is no limit.
    weighting: how the losses' weights change.
  """

  tasks: tuple[Task, ...] = ()
  rates: Literal['fixed', 'proportional'] = 'fixed'
  temperature: float = 1.0
  cap: int | None = None
  weighting: Weighting = Fixed()

  kind: ClassVar[str] = 'mixture'
  paired: ClassVar[bool] = False
  follows_text: ClassVar[bool] = True

  def __post_init__(self):
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
    return self.tasks[0].objective.has_encoder

  def lengths(self, length: int) -> dict[str, int]:
    """How long the arrays of a batch are, by name: the longest of any task."""
    found = {batch_keys.TASKS: 1}
    for task in self.tasks:
      for name, own in task.objective.lengths(length).items():
        found[name] = max(own, found.get(name, 0))
    return found

  def shares(self, num_rows: list[int]) -> np.ndarray:
    """Returns the share of each task among examples, from its rows."""
    rates = np.array([task.rate for task in self.tasks])
    if self.rates == 'proportional':
      rows = np.minimum(num_rows, self.cap or max(num_rows))
      rates = rates * rows ** (1.0 / self.temperature)
    return rates / rates.sum()


def split(
  examples: np.ndarray, shares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the task of each example, and its number among the task's own.

  Of the first n examples a task has n times its share, up to the number of
  tasks; any example is found without those before it.

  Args:
    examples: their numbers since the start, from 0.
    shares: of the tasks, adding up to 1.
  """
  left = np.asarray(examples, np.int64).copy()
  task = np.full(left.shape, -1)
  number = np.zeros_like(left)
  for k, share in enumerate(shares):
    # Of what earlier tasks leave, one after the other.
    rest = shares[k:].sum()
    own = share / rest if rest > 0 else 0.0
    if k == len(shares) - 1 or own >= 1.0:
      before, after = left, left + 1
    else:
      before = np.floor(left * own + 0.5).astype(np.int64)
      after = np.floor((left + 1) * own + 0.5).astype(np.int64)
    is_own = (task < 0) & (after > before)
    task[is_own], number[is_own] = k, before[is_own]
    left = left - before
  return task, number
