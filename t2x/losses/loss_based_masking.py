"""Loss-based masking: tokens that are hard to predict are masked more often.

The training state holds a moving average of the loss of each token of the
vocabulary. Each step draws its masks from it, on the devices. So the masks are
a function of the seed, the step and the state, and are restored by a
checkpoint.

Shape suffixes: B rows, T tokens of a row, M tokens that are predicted, V
vocabulary.
"""

import math

import jax
import jax.numpy as jnp

from t2x.layers import dropout
from t2x.objectives import masking

NAME = 'token_loss'  # Key in the training state, and in a step's sums.
_SITE = 2**30 + 1  # Site of random numbers, past every layer's.


def start(rows: int) -> jax.Array:
  """Returns the averages before the first step: all tokens equally likely.

  Args:
    rows: number of rows of the token table.
  """
  return jnp.full((rows,), math.log(rows), jnp.float32)


def masked(
  config: masking.ByLoss,
  batch: dict[str, jax.Array],
  loss_V: jax.Array,
  key: jax.Array,
) -> dict[str, jax.Array]:
  """Returns the batch with masks drawn anew.

  The tokens of a row are drawn without replacement, with weights of their
  average losses to the power `config.power`: those with the largest log(weight)
  + Gumbel noise (Efraimidis and Spirakis, 2006). Their number does not change.

  Args:
    config: settings of the masking.
    batch: batch of a masked language model, with the arrays `originals`,
      `noised`, `maskable` and `mask_keys`.
    loss_V: moving average of each token's loss.
    key: random key of the run; `mask_keys` distinguish the examples.
  """
  tokens_BT, may_BT = batch['originals'], batch['maskable'] > 0
  examples_B = batch['mask_keys'][:, 0]
  keys_B = dropout.fold(dropout.row_keys(key, examples_B), _SITE)
  assert keys_B is not None
  draw = lambda key: jax.random.gumbel(key, tokens_BT.shape[1:], jnp.float32)
  loss_BT = jnp.maximum(loss_V[tokens_BT], 1e-6)
  race_BT = config.power * jnp.log(loss_BT) + jax.vmap(draw)(keys_B)
  race_BT = jnp.where(may_BT, race_BT, -jnp.inf)
  weights_BM = batch['weights']
  _, places_BM = jax.lax.top_k(race_BT, weights_BM.shape[1])
  num_B1 = (weights_BM > 0).sum(1, keepdims=True)
  chosen_BM = jnp.arange(weights_BM.shape[1])[None] < num_B1
  # In the order of the row, as the host gives them, unused places last.
  length = tokens_BT.shape[1]
  places_BM = jnp.sort(jnp.where(chosen_BM, places_BM, length), axis=1)
  places_BM = jnp.where(chosen_BM, places_BM, 0).astype(jnp.int32)
  at = jax.vmap(lambda row_T, at_M: row_T[at_M])
  put = jax.vmap(lambda at_M, is_M: jnp.zeros(length).at[at_M].add(is_M))
  is_BT = put(places_BM, chosen_BM.astype(jnp.float32)) > 0
  return batch | {
    'inputs': jnp.where(is_BT, batch['noised'], tokens_BT),
    'targets': at(tokens_BT, places_BM),
    'target_positions': places_BM,
    'weights': chosen_BM.astype(jnp.float32),
  }


def sums_by_token(
  nll_BM: jax.Array, targets_BM: jax.Array, weights_BM: jax.Array, rows: int
) -> jax.Array:
  """Returns the sum of the losses of each token and their number, (2, V).

  Args:
    nll_BM: loss of each prediction.
    targets_BM: target ids.
    weights_BM: weights, 0 for unused places.
    rows: number of rows of the token table, V.
  """
  is_BM = (weights_BM > 0).astype(jnp.float32)
  flat = targets_BM.reshape(-1)
  both = jnp.stack([(nll_BM * is_BM).reshape(-1), is_BM.reshape(-1)])
  return jnp.zeros((2, rows), jnp.float32).at[:, flat].add(both)


def update(
  config: masking.ByLoss, loss_V: jax.Array, sums: jax.Array
) -> jax.Array:
  """Returns the averages after a step; tokens without a loss keep theirs.

  Args:
    config: settings of the masking.
    loss_V: averages before the step.
    sums: (2, V) sums of `sums_by_token` over the step.
  """
  total_V, num_V = sums
  mean_V = total_V / jnp.maximum(num_V, 1.0)
  moved_V = config.decay * loss_V + (1.0 - config.decay) * mean_V
  return jnp.where(num_V > 0, moved_V, loss_V)
