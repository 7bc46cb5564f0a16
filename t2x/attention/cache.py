"""Keys and values kept from earlier positions; values, never mutated.

Shape suffixes: B batch, T query position, S slot, K key/value heads, H head
dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

_NEVER = 2**30  # The index of an empty slot: after every query.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
  """Keys and values by index in the sequence, `capacity` of them a row."""

  k_BSKH: jax.Array
  v_BSKH: jax.Array

  @property
  def capacity(self) -> int:
    return self.k_BSKH.shape[1]

  def extend(self, k_BTKH, v_BTKH, index_BT: jax.Array):
    """Adds T entries at each row's own indices.

    Indices at or past the capacity are dropped: the caller checks lengths.

    Returns:
      Keys, values and their indices (B, S), or None for 0, 1, 2, ..., of all
      positions; and the new cache.
    """
    new = Cache(
      k_BSKH=_put(self.k_BSKH, k_BTKH, index_BT),
      v_BSKH=_put(self.v_BSKH, v_BTKH, index_BT),
    )
    return new.k_BSKH, new.v_BSKH, None, new


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
  """Keys and values of the last tokens of the rows before, without gradient.

  They are kept as they come, before they are told where they stand.
  """

  k_BMKH: jax.Array
  v_BMKH: jax.Array

  def followed_by(self, k_BTKH, v_BTKH):
    """Returns keys and values of both, and the memory of the last of them."""
    join = lambda old, new: jnp.concatenate([old.astype(new.dtype), new], 1)
    k_BSKH, v_BSKH = join(self.k_BMKH, k_BTKH), join(self.v_BMKH, v_BTKH)
    length = self.k_BMKH.shape[1]
    last = lambda a: jax.lax.stop_gradient(a[:, -length:])
    return k_BSKH, v_BSKH, Memory(k_BMKH=last(k_BSKH), v_BMKH=last(v_BSKH))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowCache:
  """The latest keys and values of each row: that of index i in slot i modulo S.

  Attributes:
    k_BSKH: keys.
    v_BSKH: values.
    index_BS: where the entry of each slot stands in its row.
    capacity: entries at or past it are dropped, as in `Cache`.
  """

  k_BSKH: jax.Array
  v_BSKH: jax.Array
  index_BS: jax.Array
  capacity: int = dataclasses.field(metadata={'static': True})

  def extend(self, k_BTKH, v_BTKH, index_BT: jax.Array):
    """As `Cache.extend`; the keys are those of before and the new ones."""
    index_BT = jnp.broadcast_to(index_BT, k_BTKH.shape[:2])
    is_real_BT = index_BT < self.capacity
    k_BTKH = k_BTKH.astype(self.k_BSKH.dtype)
    v_BTKH = v_BTKH.astype(self.v_BSKH.dtype)
    join = lambda old, new: jnp.concatenate([old, new], axis=1)
    keys = join(self.k_BSKH, k_BTKH)
    values = join(self.v_BSKH, v_BTKH)
    new_index_BT = jnp.where(is_real_BT, index_BT, _NEVER)
    index = join(self.index_BS, new_index_BT)
    # Of entries that would share a slot only the latest is written.
    size = self.k_BSKH.shape[1]
    latest_B1 = jnp.where(is_real_BT, index_BT, -1).max(1, keepdims=True)
    kept_BT = is_real_BT & (index_BT > latest_B1 - size)
    slot_BT = jnp.where(kept_BT, index_BT % size, size)
    new = WindowCache(
      k_BSKH=_put(self.k_BSKH, k_BTKH, slot_BT),
      v_BSKH=_put(self.v_BSKH, v_BTKH, slot_BT),
      index_BS=_put(self.index_BS, new_index_BT, slot_BT),
      capacity=self.capacity,
    )
    return keys, values, index, new


def _put(old, new, index_BT):
  """Writes entries at each row's own places; those past the end are lost."""
  # Mapped over rows: an index array of rows would make the partitioner gather
  # the batch.
  index_BT = jnp.broadcast_to(index_BT, new.shape[:2])
  write = jax.vmap(lambda a, b, index: a.at[index].set(b, mode='drop'))
  return write(old, new.astype(old.dtype), index_BT)


def empty(
  batch: int,
  capacity: int,
  num_heads: int,
  key_dim: int,
  value_dim: int,
  dtype: jnp.dtype,
  reach: int | None = None,
) -> Cache | WindowCache:
  """Returns a cache of zeros; a mask by index keeps them unseen.

  Args:
    batch: rows.
    capacity: positions of a row.
    num_heads: K.
    key_dim: H of keys.
    value_dim: H of values.
    dtype: of the entries.
    reach: positions back to the farthest key that is seen; None for all.
  """
  slots = capacity if reach is None else min(reach, capacity)
  zeros = lambda dim: jnp.zeros((batch, slots, num_heads, dim), dtype)
  if slots == capacity:
    return Cache(k_BSKH=zeros(key_dim), v_BSKH=zeros(value_dim))
  return WindowCache(
    k_BSKH=zeros(key_dim),
    v_BSKH=zeros(value_dim),
    index_BS=jnp.full((batch, slots), _NEVER, jnp.int32),
    capacity=capacity,
  )
