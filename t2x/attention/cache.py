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

  @property
  def capacity(self) -> int:
    return self.k_BSKH.shape[-3]

  def write(self, k_BTKH, v_BTKH, index_BT: jax.Array) -> 'Cache':
    """Returns the cache with T new entries at each row's own indices.

    Indices at or past the capacity are dropped: the caller checks lengths.
    """
    rows_B1 = jnp.arange(index_BT.shape[0])[:, None]
    put = lambda old, new: old.at[rows_B1, index_BT].set(
      new.astype(old.dtype), mode='drop'
    )
    return Cache(
      k_BSKH=put(self.k_BSKH, k_BTKH), v_BSKH=put(self.v_BSKH, v_BTKH)
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
