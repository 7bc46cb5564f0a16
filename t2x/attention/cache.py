"""Key/value caches for decoding token by token.

A cache is a value: adding entries returns a new one. Its arrays have the layout
(B, K, S, H), in which the products of a step read them: a step reads the whole
cache and writes one position of it.

Shape suffixes: B batch, T query position, S slot, K key/value heads, H head
dim.
"""

import dataclasses

import jax
import jax.numpy as jnp

_NEVER = 2**30  # The index of an empty slot: after every query.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Entries:
  """Vectors by row, head and slot, plain or as int8 with a scale for each.

  Attributes:
    data_BKSH: the vectors.
    scale_BKS: float32 factors of int8 vectors; None for other dtypes.
  """

  data_BKSH: jax.Array
  scale_BKS: jax.Array | None = None

  @property
  def size(self) -> int:
    """Number of slots."""
    return self.data_BKSH.shape[2]

  def put(self, new_BTKH: jax.Array, slot_BT: jax.Array) -> 'Entries':
    """Writes vectors into slots.

    Args:
      new_BTKH: vectors to write.
      slot_BT: slot of each vector in its row; a vector whose slot is past the
        last one is dropped.
    """
    new_BKTH = jnp.swapaxes(new_BTKH, 1, 2)
    if self.scale_BKS is None:
      return Entries(data_BKSH=_put(self.data_BKSH, new_BKTH, slot_BT))
    data_BKTH, scale_BKT = _quantized(new_BKTH)
    return Entries(
      data_BKSH=_put(self.data_BKSH, data_BKTH, slot_BT),
      scale_BKS=_put(self.scale_BKS, scale_BKT, slot_BT),
    )

  def put_at(
    self, new_BTKH: jax.Array, page_BT: jax.Array, place_BT: jax.Array
  ) -> 'Entries':
    """Writes vectors into pages, which stand in the place of rows.

    Args:
      new_BTKH: vectors to write.
      page_BT: page of each vector; a vector whose page is past the last one is
        dropped.
      place_BT: slot of each vector in its page.
    """
    if self.scale_BKS is None:
      data_BTKH, scale_BTK = new_BTKH, None
    else:
      data_BTKH, scale_BTK = _quantized(new_BTKH)
    if page_BT.size == 1:  # As in `_put`.
      twice = lambda a: jnp.concatenate([a, a], axis=1)
      data_BTKH, place_BT = twice(data_BTKH), twice(place_BT)
      scale_BTK = None if scale_BTK is None else twice(scale_BTK)
      lost = jnp.full_like(page_BT, len(self.data_BKSH))
      page_BT = jnp.concatenate([page_BT, lost], axis=1)
    write = lambda old, new: old.at[page_BT, :, place_BT].set(
      new.astype(old.dtype), mode='drop'
    )
    return jax.tree.map(
      write, self, Entries(data_BKSH=data_BTKH, scale_BKS=scale_BTK)
    )

  def seen(self, new_BTKH: jax.Array) -> jax.Array:
    """Returns new vectors as `read` returns them after `put`."""
    if self.scale_BKS is None:
      return new_BTKH.astype(self.data_BKSH.dtype)
    data_BTKH, scale_BTK = _quantized(new_BTKH)
    return (data_BTKH * scale_BTK[..., None]).astype(new_BTKH.dtype)

  def read(self, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns all vectors, (B, S, K, H); int8 ones are cast to `dtype`."""
    # The transposition is undone by that of the product that follows.
    data_BSKH = jnp.swapaxes(self.data_BKSH, 1, 2)
    if self.scale_BKS is None:
      return data_BSKH
    scale_BSK = jnp.swapaxes(self.scale_BKS, 1, 2)
    return (data_BSKH * scale_BSK[..., None]).astype(dtype)


def _quantized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns int8 vectors along the last dimension, and their scales.

  The largest entry of a vector becomes 127 (symmetric, as in LLM.int8(),
  Dettmers et al., 2022).
  """
  x = x.astype(jnp.float32)
  scale = jnp.abs(x).max(-1, initial=0.0) / 127
  safe = jnp.where(scale == 0, 1.0, scale)
  return jnp.round(x / safe[..., None]).astype(jnp.int8), scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
  """Keys and values of all positions: index i of the sequence is in slot i.

  Attributes:
    k: keys.
    v: values.
  """

  k: Entries
  v: Entries

  @property
  def capacity(self) -> int:
    """Number of positions in a row."""
    return self.k.size

  def extend(
    self, k_BTKH: jax.Array, v_BTKH: jax.Array, index_BT: jax.Array
  ) -> tuple[jax.Array, jax.Array, None, 'Cache']:
    """Adds keys and values at given indices.

    Args:
      k_BTKH: keys to add.
      v_BTKH: values to add.
      index_BT: index of each in its row; those at or past the capacity are
        dropped, so the caller checks lengths.

    Returns:
      Keys (B, S, K, H) and values (B, S, K, H) of all positions; their indices
      (B, S), or None for 0, 1, 2, ...; and the new cache.
    """
    new = Cache(k=self.k.put(k_BTKH, index_BT), v=self.v.put(v_BTKH, index_BT))
    return *new.read(k_BTKH.dtype), None, new

  def read(self, dtype: jax.typing.DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values, (B, S, K, H); int8 ones are cast to `dtype`."""
    return self.k.read(dtype), self.v.read(dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryCache:
  """Keys and values of the last M tokens of the previous rows (Transformer-XL).

  No gradient flows through them. They are stored before any position encoding,
  since their positions change from row to row.

  Attributes:
    k_BMKH: keys.
    v_BMKH: values.
  """

  k_BMKH: jax.Array
  v_BMKH: jax.Array

  def followed_by(
    self, k_BTKH: jax.Array, v_BTKH: jax.Array
  ) -> tuple[jax.Array, jax.Array, 'MemoryCache']:
    """Appends keys and values of the current rows.

    Args:
      k_BTKH: keys of the current rows.
      v_BTKH: values of the current rows.

    Returns:
      Keys and values of the memory and the current rows, (B, M + T, K, H), and
      the memory of the last M of them.
    """
    join = lambda old, new: jnp.concatenate([old.astype(new.dtype), new], 1)
    k_BSKH, v_BSKH = join(self.k_BMKH, k_BTKH), join(self.v_BMKH, v_BTKH)
    length = self.k_BMKH.shape[1]
    last = lambda a: jax.lax.stop_gradient(a[:, -length:])
    return k_BSKH, v_BSKH, MemoryCache(k_BMKH=last(k_BSKH), v_BMKH=last(v_BSKH))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class WindowCache:
  """The latest keys and values of each row: index i is in slot i modulo S.

  Attributes:
    k: keys.
    v: values.
    index_BS: index in its row of the entry in each slot.
    capacity: number of positions in a row; entries at or past it are dropped,
      as in `Cache`.
  """

  k: Entries
  v: Entries
  index_BS: jax.Array
  capacity: int = dataclasses.field(metadata={'static': True})

  def extend(
    self, k_BTKH: jax.Array, v_BTKH: jax.Array, index_BT: jax.Array
  ) -> tuple[jax.Array, jax.Array, jax.Array, 'WindowCache']:
    """As `Cache.extend`; returns the S entries before and the T new ones."""
    index_BT = jnp.broadcast_to(index_BT, k_BTKH.shape[:2])
    is_real_BT = index_BT < self.capacity
    join = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], 1)
    keys = join(self.k.read(k_BTKH.dtype), self.k.seen(k_BTKH))
    values = join(self.v.read(v_BTKH.dtype), self.v.seen(v_BTKH))
    new_index_BT = jnp.where(is_real_BT, index_BT, _NEVER)
    # Older entries at or after these indices are replaced: see `slack` of
    # `empty`.
    first_B1 = new_index_BT.min(1, keepdims=True)
    old_BS = jnp.where(self.index_BS < first_B1, self.index_BS, _NEVER)
    index = join(old_BS, new_index_BT)
    # Of entries that would share a slot only the latest is written.
    size = self.k.size
    latest_B1 = jnp.where(is_real_BT, index_BT, -1).max(1, keepdims=True)
    kept_BT = is_real_BT & (index_BT > latest_B1 - size)
    slot_BT = jnp.where(kept_BT, index_BT % size, size)
    new = WindowCache(
      k=self.k.put(k_BTKH, slot_BT),
      v=self.v.put(v_BTKH, slot_BT),
      index_BS=_put(self.index_BS[:, None], new_index_BT[:, None], slot_BT)[
        :, 0
      ],
      capacity=self.capacity,
    )
    return keys, values, index, new


def _put(old: jax.Array, new: jax.Array, slot_BT: jax.Array) -> jax.Array:
  """Writes (B, K, T, ...) into the given slots of (B, K, S, ...)."""
  # Mapped over rows: an index array of rows would make the partitioner gather
  # the batch.
  slot_BT = jnp.broadcast_to(slot_BT, (new.shape[0], new.shape[2]))
  if slot_BT.size == 1:
    # A second entry, which is dropped: XLA turns the write of a single one into
    # an update that it fuses with every use, each with a copy of the cache.
    new = jnp.concatenate([new, new], axis=2)
    slot_BT = jnp.concatenate([slot_BT, jnp.full((1, 1), old.shape[2])], 1)
  write = jax.vmap(lambda a, b, slot: a.at[:, slot].set(b, mode='drop'))
  return write(old, new.astype(old.dtype), slot_BT)


def of(
  k_BSKH: jax.Array, v_BSKH: jax.Array, dtype: jax.typing.DTypeLike
) -> Cache:
  """Returns a full cache of the given keys and values, for cross-attention."""
  return Cache(k=_entries(k_BSKH, dtype), v=_entries(v_BSKH, dtype))


def _entries(x_BSKH: jax.Array, dtype: jax.typing.DTypeLike) -> Entries:
  x_BKSH = jnp.swapaxes(x_BSKH, 1, 2)
  if jnp.dtype(dtype) != jnp.int8:
    return Entries(data_BKSH=x_BKSH.astype(dtype))
  data_BKSH, scale_BKS = _quantized(x_BKSH)
  return Entries(data_BKSH=data_BKSH, scale_BKS=scale_BKS)


def empty(
  batch: int,
  capacity: int,
  num_heads: int,
  key_dim: int,
  value_dim: int,
  dtype: jax.typing.DTypeLike,
  reach: int | None = None,
  slack: int = 0,
) -> Cache | WindowCache:
  """Returns a cache of zeros, which the mask hides by their indices.

  Args:
    batch: number of rows.
    capacity: number of positions in a row.
    num_heads: number of key/value heads K.
    key_dim: head dim of the keys.
    value_dim: head dim of the values.
    dtype: dtype of the entries; int8 keeps a scale for each vector too.
    reach: number of tokens from a query back to its farthest key, both
      included; None keeps all.
    slack: largest number of tokens written in one step that may be rejected
      later; a window keeps as many more entries, since the rejected tokens
      overwrite older ones.
  """
  slots = capacity if reach is None else min(reach + slack, capacity)
  k, v = (
    zeros((batch, num_heads, slots, dim), dtype) for dim in (key_dim, value_dim)
  )
  if slots == capacity:
    return Cache(k=k, v=v)
  return WindowCache(
    k=k,
    v=v,
    index_BS=jnp.full((batch, slots), _NEVER, jnp.int32),
    capacity=capacity,
  )


def zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Entries:
  """Returns vectors of zeros of a shape (B, K, S, H); int8 ones with scales."""
  scaled = jnp.dtype(dtype) == jnp.int8
  return Entries(
    data_BKSH=jnp.zeros(shape, dtype),
    scale_BKS=jnp.zeros(shape[:3], jnp.float32) if scaled else None,
  )
