"""The weights of the losses of a mixture's tasks, and their updates.

The training state carries the weights, so that a checkpoint restores them.

Shape suffixes: B rows, T position, D embed, K tasks.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from t2x.objectives import batch_keys
from t2x.objectives import classification
from t2x.objectives import mixture

_LOG, _WEIGHTS, _FIRST = 'task_log_variances', 'task_weights', 'task_first'
BY_TASK = 'by_task'  # Suffix of the names of sums by task.
SQUARES = 'squares_by_task'
ROWS = 'rows_by_task'
FACTORS = 'task_factors'  # Batch key of the weight of each row's task, (B,).


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
  """The tasks of a mixture, as far as a training step needs them.

  Attributes:
    names: names of the tasks.
    weights: given weights of the tasks.
    terms: names of each task's terms in the loss.
    weighting: rule by which the weights change.
  """

  names: tuple[str, ...]
  weights: tuple[float, ...]
  terms: tuple[tuple[str, ...], ...]
  weighting: mixture.Weighting

  @property
  def probes(self) -> bool:
    """Whether the weighting needs the gradient norm of each task."""
    return isinstance(self.weighting, mixture.GradNorm)


def tasks_of(objective: mixture.Single | mixture.Mixture) -> Tasks | None:
  """Returns the tasks of a mixture; None for any other objective."""
  if not isinstance(objective, mixture.Mixture):
    return None
  return Tasks(
    names=tuple(task.name for task in objective.tasks),
    weights=tuple(task.weight for task in objective.tasks),
    terms=tuple(_terms(task.objective) for task in objective.tasks),
    weighting=objective.weighting,
  )


def _terms(objective: mixture.Single) -> tuple[str, ...]:
  """Returns the names of an objective's terms in the loss."""
  if isinstance(objective, classification.Classification):
    return (objective.name,)
  names = [f'_{name}' for name in objective.lengths(64)]
  suffix = '_weights'
  return tuple(n[1 : -len(suffix)] for n in names if n.endswith(suffix))


def start(tasks: Tasks) -> dict[str, jax.Array]:
  """Returns the carried state of the weights before the first step."""
  match tasks.weighting:
    case mixture.Uncertainty():
      return {_LOG: jnp.zeros(len(tasks.names))}
    case mixture.GradNorm():
      weights_K = jnp.asarray(tasks.weights, jnp.float32)
      return {_WEIGHTS: weights_K, _FIRST: jnp.zeros_like(weights_K)}
  return {}


def factors(tasks: Tasks, carried: dict[str, jax.Array]) -> jax.Array:
  """Returns the weight of each task's loss, (K,).

  Args:
    tasks: tasks of the run.
    carried: state of the weights.
  """
  given_K = jnp.asarray(tasks.weights, jnp.float32)
  match tasks.weighting:
    case mixture.Uncertainty():
      return given_K * jnp.exp(-carried[_LOG])
    case mixture.GradNorm():
      return carried[_WEIGHTS]
  return given_K


def with_factors(
  tasks: Tasks, batch: dict[str, jax.Array], carried: dict[str, jax.Array]
) -> dict[str, jax.Array]:
  """Returns a batch to which the weight of each row's task is added.

  Args:
    tasks: tasks of the run.
    batch: batch of a mixture.
    carried: state of the weights.
  """
  numbers_B = batch[batch_keys.TASKS][:, 0]
  return {**batch, FACTORS: factors(tasks, carried)[numbers_B]}


def rates(batch: dict[str, jax.Array], num: int) -> jax.Array:
  """Returns the share of each task in the rows of a batch, (K,).

  Args:
    batch: batch of a mixture.
    num: number of tasks, K.
  """
  rows = len(batch[batch_keys.TASKS])
  return by_task([jnp.full(rows, 1.0 / rows)], batch, num)[0]


def by_task(
  values_B: list[jax.Array], batch: dict[str, jax.Array], num: int
) -> jax.Array:
  """Returns the sums of values over the rows of each task, (values, K).

  Args:
    values_B: arrays of one value for each row.
    batch: batch of a mixture.
    num: number of tasks, K.
  """
  return _sums(jnp.stack(values_B), batch[batch_keys.TASKS][:, 0], num)


def _sums(values_XB: jax.Array, numbers_B: jax.Array, num: int) -> jax.Array:
  """Returns sums by task, (X, K); a matrix product would round on devices."""
  is_task_KB = jnp.arange(num)[:, None] == numbers_B[None]
  return jnp.where(is_task_KB[None], values_XB[:, None], 0.0).sum(-1)


@jax.custom_vjp
def with_probes(
  x_BTD: jax.Array, probes_K: jax.Array, numbers_B: jax.Array
) -> jax.Array:
  """Returns the features, and measures the gradient norm of each task.

  The "gradient" of a probe is the squared norm of the gradient of x over the
  rows of the probe's task. One backward pass measures all tasks, since each row
  belongs to one.

  Args:
    x_BTD: features.
    probes_K: zeros, one for each task.
    numbers_B: number of each row's task.
  """
  del probes_K, numbers_B
  return x_BTD


def _probed_forward(
  x_BTD: jax.Array, probes_K: jax.Array, numbers_B: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return x_BTD, (probes_K, numbers_B)


def _probed_backward(
  residuals: tuple[jax.Array, jax.Array], d_BTD: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  probes_K, numbers_B = residuals
  squares_B = jnp.square(d_BTD.astype(jnp.float32)).sum((1, 2))
  return d_BTD, _sums(squares_B[None], numbers_B, len(probes_K))[0], None


with_probes.defvjp(_probed_forward, _probed_backward)


def update(
  tasks: Tasks, carried: dict[str, jax.Array], sums: dict[str, Any]
) -> dict[str, jax.Array]:
  """Returns the carried state of the weights after a step.

  Args:
    tasks: tasks of the run.
    carried: state before the step.
    sums: sums by task: those of each term (3, K), as `cross_entropy.of_terms`
      returns them, and the squared norms (K,) if the weighting needs them.
  """
  terms = [value for value in sums.values() if value.ndim == 2]
  shares = jnp.stack([value[2] for value in terms])
  means = jnp.stack([value[0] / jnp.maximum(value[2], 1e-9) for value in terms])
  loss_K, share_K = means.sum(0), shares.max(0)
  is_present_K = share_K > 0
  weighting = tasks.weighting
  match weighting:
    case mixture.Uncertainty():
      s_K = carried[_LOG]
      slope_K = 0.5 - jnp.exp(-s_K) * loss_K
      moved_K = s_K - weighting.learning_rate * slope_K
      return {**carried, _LOG: jnp.where(is_present_K, moved_K, s_K)}
    case mixture.GradNorm():
      first_K = carried[_FIRST]
      first_K = jnp.where((first_K == 0) & is_present_K, loss_K, first_K)
      weights_K = carried[_WEIGHTS]
      # In a mean over n rows, each row has 1 / n of the gradient.
      norm_K = jnp.sqrt(sums[SQUARES] * sums[ROWS])
      norm_K /= jnp.maximum(share_K, 1e-9)
      moved_K = _balanced(weighting, weights_K, norm_K, loss_K / first_K)
      moved_K *= sum(tasks.weights) / moved_K.sum()
      # A batch that lacks a task changes no weight.
      weights_K = jnp.where(is_present_K.all(), moved_K, weights_K)
      return {**carried, _WEIGHTS: weights_K, _FIRST: first_K}
  return carried


def _balanced(
  config: mixture.GradNorm,
  weights_K: jax.Array,
  norm_K: jax.Array,
  left_K: jax.Array,
) -> jax.Array:
  """Returns weights after a step towards equal norms (Chen et al., 2018).

  The norm G of a task's gradient is proportional to its weight w, so the
  distance |G - target| has the gradient sign(G - target) G / w. Norms are
  divided by their mean.

  Args:
    config: settings of the weighting.
    weights_K: weights before the step.
    norm_K: gradient norm of each task.
    left_K: loss of each task, divided by its first loss.
  """
  rate_K = left_K / left_K.mean()
  norm_K = norm_K / jnp.maximum(norm_K.mean(), 1e-30)
  slope_K = jnp.sign(norm_K - rate_K**config.alpha) * norm_K / weights_K
  moved_K = weights_K - config.learning_rate * slope_K
  return jnp.maximum(moved_K, 1e-3 * weights_K.max())


def metrics(
  tasks: Tasks, sums: dict[str, Any], factors_K: jax.Array
) -> dict[str, jax.Array]:
  """Returns the metrics of each task: means over its rows, weight and rate.

  They are TASK/nll (nats) and TASK/accuracy for the main term, TASK/TERM_nll
  and TASK/TERM_accuracy for other terms, NaN if a batch has no rows of the
  task. TASK/weight is the weight of its losses, TASK/rate its share of the
  rows.

  Args:
    tasks: tasks of the run.
    sums: sums by task, as for `update`.
    factors_K: weight of each task's loss.
  """
  metrics = {}
  for k, name in enumerate(tasks.names):
    for term in tasks.terms[k]:
      prefix = f'{term}_' if term else ''
      nll, correct, share = sums[f'{prefix}{BY_TASK}'][:, k]
      metrics[f'{name}/{prefix}nll'] = nll / share
      metrics[f'{name}/{prefix}accuracy'] = correct / share
    metrics[f'{name}/weight'] = factors_K[k]
    metrics[f'{name}/rate'] = sums[ROWS][k]
  return metrics
