"""Keys and values kept from earlier positions; a value, never mutated.

Shape suffixes: B batch, T query position, S capacity, K key/value heads, H
head dim.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
  """Keys and values by index in the sequence, `capacity` of them a row."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array

  def write(self, k_BTKH, v_BTKH, index_BT: jax.Array) -> 'Cache':
    """Returns the cache with T new entries at each row's own indices.

    Indices at or past the capacity are dropped: the caller checks lengths.
    """
    # Mapped over rows: an index array of rows would make the partitioner
    # gather the batch.
    put = jax.vmap(lambda old, new, index: old.at[index].set(new, mode='drop'))
    k_BTKH = k_BTKH.astype(self.k_BSKH.dtype)
    v_BTKH = v_BTKH.astype(self.v_BSKH.dtype)
    return Cache(
      k_BSKH=put(self.k_BSKH, k_BTKH, index_BT),
      v_BSKH=put(self.v_BSKH, v_BTKH, index_BT),
    )


def empty(
  batch: int,
  capacity: int,
  num_heads: int,
  key_dim: int,
  value_dim: int,
  dtype: jnp.dtype,
) -> Cache:
  """Returns a cache of zeros; a mask by index keeps them unseen."""
  zeros = lambda dim: jnp.zeros((batch, capacity, num_heads, dim), dtype)
  return Cache(k_BSKH=zeros(key_dim), v_BSKH=zeros(value_dim))
