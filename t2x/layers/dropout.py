"""Dropout whose bits belong to rows, so that no layout changes them."""

import jax
import jax.numpy as jnp


def row_keys(key: jax.Array, rows_B: jax.Array) -> jax.Array:
  """Returns one key for each row, from the row's number in the global batch.

  A microbatch or a shard of the batch draws the same bits for a row as the
  whole batch on one device would.
  """
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)


def fold(keys_B: jax.Array | None, number: int | jax.Array):
  """Derives the keys of a place in the model (a layer, a site in it)."""
  if keys_B is None:
    return None
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_B)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
  """Zeroes entries with probability `rate` and scales up the others.

  Args:
    x: (B, ...).
    rate: probability of a zero.
    keys_B: a key for each row, or None for evaluation.
  """
  if keys_B is None or rate == 0.0:
    return x
  draw = lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:])
  keep = jax.vmap(draw)(keys_B)
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
