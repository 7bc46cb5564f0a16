"""Keys and values kept from earlier positions; values, never mutated.

They lie with a head's positions side by side, (B, K, S, H), as the products of
a step read them: a step reads all of a cache and writes one position of it.

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
    scale_BKS: what int8 vectors are multiplied by, float32; else None.
  """

  data_BKSH: jax.Array
  scale_BKS: jax.Array | None = None

  @property
  def size(self) -> int:
    return self.data_BKSH.shape[2]

  def put(self, new_BTKH: jax.Array, slot_BT: jax.Array) -> 'Entries':
    """Writes at each row's own slots; what is past the end is lost."""
    new_BKTH = jnp.swapaxes(new_BTKH, 1, 2)
    if self.scale_BKS is None:
      return Entries(data_BKSH=_put(self.data_BKSH, new_BKTH, slot_BT))
    data_BKTH, scale_BKT = _quantized(new_BKTH)
    return Entries(
      data_BKSH=_put(self.data_BKSH, data_BKTH, slot_BT),
      scale_BKS=_put(self.scale_BKS, scale_BKT, slot_BT),
    )

  def put_at(self, new_BTKH, page_BT, place_BT) -> 'Entries':
    """Writes at places of pages; what is past the last page is lost."""
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
    """Returns new vectors as `read` would after `put`."""
    if self.scale_BKS is None:
      return new_BTKH.astype(self.data_BKSH.dtype)
    data_BTKH, scale_BTK = _quantized(new_BTKH)
    return (data_BTKH * scale_BTK[..., None]).astype(new_BTKH.dtype)

  def read(self, dtype) -> jax.Array:
    """Returns (B, S, K, H)."""
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
  """Keys and values by index in the sequence, `capacity` of them a row."""

  k: Entries
  v: Entries

  @property
  def capacity(self) -> int:
    return self.k.size

  def extend(self, k_BTKH, v_BTKH, index_BT: jax.Array):
    """Adds T entries at each row's own indices.

    Indices at or past the capacity are dropped: the caller checks lengths.

    Returns:
      Keys, values and their indices (B, S), or None for 0, 1, 2, ..., of all
      positions; and the new cache.
    """
    new = Cache(k=self.k.put(k_BTKH, index_BT), v=self.v.put(v_BTKH, index_BT))
    return *new.read(k_BTKH.dtype), None, new

  def read(self, dtype) -> tuple[jax.Array, jax.Array]:
    """Returns keys and values (B, S, K, H)."""
    return self.k.read(dtype), self.v.read(dtype)


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
    k: keys.
    v: values.
    index_BS: where the entry of each slot stands in its row.
    capacity: entries at or past it are dropped, as in `Cache`.
  """

  k: Entries
  v: Entries
  index_BS: jax.Array
  capacity: int = dataclasses.field(metadata={'static': True})

  def extend(self, k_BTKH, v_BTKH, index_BT: jax.Array):
    """As `Cache.extend`; the keys are those of before and the new ones."""
    index_BT = jnp.broadcast_to(index_BT, k_BTKH.shape[:2])
    is_real_BT = index_BT < self.capacity
    join = lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], 1)
    keys = join(self.k.read(k_BTKH.dtype), self.k.seen(k_BTKH))
    values = join(self.v.read(v_BTKH.dtype), self.v.seen(v_BTKH))
    new_index_BT = jnp.where(is_real_BT, index_BT, _NEVER)
    # What was written there before did not count: see `slack` of `empty`.
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


def _put(old, new, slot_BT):
  """Writes (B, K, T, ...) at each row's own slots of (B, K, S, ...)."""
  # Mapped over rows: an index array of rows would make the partitioner gather
  # the batch.
  slot_BT = jnp.broadcast_to(slot_BT, (new.shape[0], new.shape[2]))
  if slot_BT.size == 1:
    # A second one that is lost: XLA turns the write of a single entry into an
    # update that it fuses with every use, each with a copy of the cache.
    new = jnp.concatenate([new, new], axis=2)
    slot_BT = jnp.concatenate([slot_BT, jnp.full((1, 1), old.shape[2])], 1)
  write = jax.vmap(lambda a, b, slot: a.at[:, slot].set(b, mode='drop'))
  return write(old, new.astype(old.dtype), slot_BT)


def of(k_BSKH: jax.Array, v_BSKH: jax.Array, dtype) -> Cache:
  """Returns a cache that is full, of another sequence's keys and values."""
  return Cache(k=_entries(k_BSKH, dtype), v=_entries(v_BSKH, dtype))


def _entries(x_BSKH: jax.Array, dtype) -> Entries:
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
  dtype: jnp.dtype,
  reach: int | None = None,
  slack: int = 0,
) -> Cache | WindowCache:
  """Returns a cache of zeros; a mask by index keeps them unseen.

  Args:
    batch: rows.
    capacity: positions of a row.
    num_heads: K.
    key_dim: H of keys.
    value_dim: H of values.
    dtype: of the entries; int8 keeps a scale for each vector too.
    reach: positions back to the farthest key that is seen; None for all.
    slack: tokens written at a time that may turn out not to count: a window
      keeps as many more, whose places they take.
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


def zeros(shape: tuple[int, ...], dtype) -> Entries:
  """Returns vectors of zeros, (B, K, S, H)."""
  scaled = jnp.dtype(dtype) == jnp.int8
  return Entries(
    data_BKSH=jnp.zeros(shape, dtype),
    scale_BKS=jnp.zeros(shape[:3], jnp.float32) if scaled else None,
  )
