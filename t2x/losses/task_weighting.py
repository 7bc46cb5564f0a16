"""What the losses of a mixture's tasks weigh, and how that changes.

The state of training carries the weights, so that they go on with a checkpoint.

Shape suffixes: B rows, T position, D embed, K tasks.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from t2x.objectives import classification
from t2x.objectives import mixture

_LOG, _WEIGHTS, _FIRST = 'task_log_variances', 'task_weights', 'task_first'
BY_TASK = 'by_task'  # The last part of the names of sums by task.
SQUARES = 'squares_by_task'
ROWS = 'rows_by_task'
FACTORS = 'task_factors'  # In a batch: the weight of each row's task, (B,).


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tasks:
  """The tasks of a mixture, as a step knows them.

  Attributes:
    names: of the tasks.
    weights: that are given.
    terms: of each, the names of its terms in the loss.
    weighting: how weights change.
  """

  names: tuple[str, ...]
  weights: tuple[float, ...]
  terms: tuple[tuple[str, ...], ...]
  weighting: mixture.Weighting

  @property
  def probes(self) -> bool:
    """Whether gradients of single tasks are asked for."""
    return isinstance(self.weighting, mixture.GradNorm)


def tasks_of(objective: Any) -> Tasks | None:
  """Returns the tasks of an objective, None where it is one."""
  if not isinstance(objective, mixture.Mixture):
    return None
  return Tasks(
    names=tuple(task.name for task in objective.tasks),
    weights=tuple(task.weight for task in objective.tasks),
    terms=tuple(_terms(task.objective) for task in objective.tasks),
    weighting=objective.weighting,
  )


def _terms(objective: Any) -> tuple[str, ...]:
  if isinstance(objective, classification.Classification):
    return (objective.name,)
  names = [f'_{name}' for name in objective.lengths(64)]
  suffix = '_weights'
  return tuple(n[1 : -len(suffix)] for n in names if n.endswith(suffix))


def start(tasks: Tasks) -> dict[str, jax.Array]:
  """Returns what is carried before the first step."""
  match tasks.weighting:
    case mixture.Uncertainty():
      return {_LOG: jnp.zeros(len(tasks.names))}
    case mixture.GradNorm():
      weights_K = jnp.asarray(tasks.weights, jnp.float32)
      return {_WEIGHTS: weights_K, _FIRST: jnp.zeros_like(weights_K)}
  return {}


def factors(tasks: Tasks, carried: dict[str, jax.Array]) -> jax.Array:
  """Returns the weight of each task's loss, (K,)."""
  given_K = jnp.asarray(tasks.weights, jnp.float32)
  match tasks.weighting:
    case mixture.Uncertainty():
      return given_K * jnp.exp(-carried[_LOG])
    case mixture.GradNorm():
      return carried[_WEIGHTS]
  return given_K


def with_factors(tasks: Tasks, batch, carried) -> dict[str, jax.Array]:
  """Returns a batch whose rows know the weights of their tasks."""
  numbers_B = batch[mixture.TASKS][:, 0]
  return {**batch, FACTORS: factors(tasks, carried)[numbers_B]}


def rates(batch, num: int) -> jax.Array:
  """Returns the share of each task in the rows of a batch, (K,)."""
  rows = len(batch[mixture.TASKS])
  return by_task([jnp.full(rows, 1.0 / rows)], batch, num)[0]


def by_task(values_B: list[jax.Array], batch, num: int) -> jax.Array:
  """Returns sums over the rows of each task, one row for each value."""
  return _sums(jnp.stack(values_B), batch[mixture.TASKS][:, 0], num)


def _sums(values_XB: jax.Array, numbers_B: jax.Array, num: int) -> jax.Array:
  """Returns sums by task, (X, K); a product would round on accelerators."""
  is_task_KB = jnp.arange(num)[:, None] == numbers_B[None]
  return jnp.where(is_task_KB[None], values_XB[:, None], 0.0).sum(-1)


@jax.custom_vjp
def probed(
  x_BTD: jax.Array, probes_K: jax.Array, numbers_B: jax.Array
) -> jax.Array:
  """Returns `x_BTD`.

  The gradient of a probe is no gradient: it is the squared norm of that of x,
  of the rows of its task. One backward pass tells all tasks apart, as each row
  is of one.
  """
  del probes_K, numbers_B
  return x_BTD


def _probed_forward(x_BTD, probes_K, numbers_B):
  return x_BTD, (probes_K, numbers_B)


def _probed_backward(residuals, d_BTD):
  probes_K, numbers_B = residuals
  squares_B = jnp.square(d_BTD.astype(jnp.float32)).sum((1, 2))
  return d_BTD, _sums(squares_B[None], numbers_B, len(probes_K))[0], None


probed.defvjp(_probed_forward, _probed_backward)


def updated(
  tasks: Tasks, carried: dict[str, jax.Array], sums: dict[str, Any]
) -> dict[str, jax.Array]:
  """Returns what is carried on after a step.

  Args:
    tasks: of the run.
    carried: before it.
    sums: by task: of each term (3, K) as `cross_entropy.of_terms` has them, and
      the squared norms (K,) where they are asked for.
  """
  terms = [value for value in sums.values() if value.ndim == 2]
  shares = jnp.stack([value[2] for value in terms])
  means = jnp.stack([value[0] / jnp.maximum(value[2], 1e-9) for value in terms])
  loss_K, share_K = means.sum(0), shares.max(0)
  there_K = share_K > 0
  weighting = tasks.weighting
  match weighting:
    case mixture.Uncertainty():
      s_K = carried[_LOG]
      slope_K = 0.5 - jnp.exp(-s_K) * loss_K
      moved_K = s_K - weighting.learning_rate * slope_K
      return {**carried, _LOG: jnp.where(there_K, moved_K, s_K)}
    case mixture.GradNorm():
      first_K = carried[_FIRST]
      first_K = jnp.where((first_K == 0) & there_K, loss_K, first_K)
      weights_K = carried[_WEIGHTS]
      # Of a mean over n rows each has 1 / n of the gradient.
      norm_K = jnp.sqrt(sums[SQUARES] * sums[ROWS])
      norm_K /= jnp.maximum(share_K, 1e-9)
      moved_K = _balanced(weighting, weights_K, norm_K, loss_K / first_K)
      moved_K *= sum(tasks.weights) / moved_K.sum()
      # A batch that lacks a task says nothing of it.
      weights_K = jnp.where(there_K.all(), moved_K, weights_K)
      return {**carried, _WEIGHTS: weights_K, _FIRST: first_K}
  return carried


def _balanced(config: mixture.GradNorm, weights_K, norm_K, left_K):
  """Returns weights after a step towards equal norms (Chen et al., 2018).

  The norm of a task grows with its weight w, so the distance |G - target| has
  the gradient sign(G - target) G / w; norms are taken over their mean.
  """
  rate_K = left_K / left_K.mean()
  norm_K = norm_K / jnp.maximum(norm_K.mean(), 1e-30)
  slope_K = jnp.sign(norm_K - rate_K**config.alpha) * norm_K / weights_K
  moved_K = weights_K - config.learning_rate * slope_K
  return jnp.maximum(moved_K, 1e-3 * weights_K.max())


def metrics(tasks: Tasks, sums: dict[str, Any], factors_K: jax.Array):
  """Returns figures of each task: means of its rows, and its weight.

  TASK/nll (nats) and TASK/accuracy of the main term, TASK/TERM_nll of others;
  NaN where a batch has none of it. TASK/rate is its share of the rows.
  """
  found = {}
  for k, name in enumerate(tasks.names):
    for term in tasks.terms[k]:
      prefix = f'{term}_' if term else ''
      nll, correct, share = sums[f'{prefix}{BY_TASK}'][:, k]
      found[f'{name}/{prefix}nll'] = nll / share
      found[f'{name}/{prefix}accuracy'] = correct / share
    found[f'{name}/weight'] = factors_K[k]
    found[f'{name}/rate'] = sums[ROWS][k]
  return found
