"""What a query may see, as a description and never as a (T, S) array.

Shape suffixes: B batch, T query position, S key position.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t2x import zigzag as zigzag_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
  """The keys that each query sees; all conditions hold together.

  Order along the sequence is by index: `q_index_BT` and `k_index_BS` where
  given (a cache, a piece of a sequence), else 0, 1, 2, ... from the start of
  the arrays, which lets blocks that nothing sees be left out at trace time.

  Attributes:
    causal: a query sees keys of its own index and before.
    window: a query sees the `window` latest keys, itself included; both sides
      (|distance| < window) where not causal.
    prefix_B: keys of an index below this are seen by every query (prefix LM).
    q_segments_BT: with `k_segments_BS`, keys of the same segment are seen.
    k_segments_BS: see `q_segments_BT`.
    q_index_BT: index of each query in its sequence; B may be 1.
    k_index_BS: index of each key in its sequence; B may be 1.
    start: index of the first query and the first key, where none is given.
    q_zigzag: devices over which the queries lie in zigzag order
      (t2x/zigzag.py); 1 is the order of the sequence.
    k_zigzag: the same of the keys.
  """

  causal: bool = dataclasses.field(default=False, metadata={'static': True})
  window: int | None = dataclasses.field(
    default=None, metadata={'static': True}
  )
  prefix_B: jax.Array | None = None
  q_segments_BT: jax.Array | None = None
  k_segments_BS: jax.Array | None = None
  q_index_BT: jax.Array | None = None
  k_index_BS: jax.Array | None = None
  start: jax.Array | None = None
  q_zigzag: int = dataclasses.field(default=1, metadata={'static': True})
  k_zigzag: int = dataclasses.field(default=1, metadata={'static': True})

  @property
  def has_static_order(self) -> bool:
    given = self.q_index_BT is not None or self.k_index_BS is not None
    return not given and self.q_zigzag == self.k_zigzag == 1

  @property
  def is_ordered(self) -> bool:
    """Whether the order of tokens matters to what is seen."""
    return self.causal or self.window is not None


def self_attention(
  segments_BT: jax.Array | None, *, causal: bool, zigzag: int = 1
) -> Mask:
  """Returns the mask of a sequence that looks at itself."""
  return Mask(
    causal=causal,
    q_segments_BT=segments_BT,
    k_segments_BS=segments_BT,
    q_zigzag=zigzag,
    k_zigzag=zigzag,
  )


def key_range(mask: Mask, q_start: int, q_end: int, num_keys: int):
  """Returns (start, end) of the keys that any query of a block may see."""
  start, end = 0, num_keys
  if not mask.has_static_order:
    return start, end
  if mask.causal and mask.prefix_B is None:
    end = min(end, q_end)
  if mask.window is not None and mask.prefix_B is None:
    # Queries past the last key's window see nothing, of a range of one key.
    start = min(max(0, q_start - mask.window + 1), num_keys - 1)
    if not mask.causal:
      end = min(end, q_end + mask.window - 1)
  return start, max(end, start + 1)


def specs(mask: Mask, axis: str) -> Mask:
  """Returns how a mesh axis that splits the sequence splits a mask's arrays."""
  split = jax.tree.map(lambda _: P(None, axis), mask)
  prefix = None if mask.prefix_B is None else P()  # A number for each row.
  return dataclasses.replace(split, prefix_B=prefix)


def placed(mask: Mask, num_queries: int, num_keys: int) -> Mask:
  """Returns the mask with zigzag order written out as indices."""

  def index(given, length, devices):
    if devices == 1:
      return given
    return jnp.asarray(zigzag_lib.index(length, devices))[None]

  return dataclasses.replace(
    mask,
    q_index_BT=index(mask.q_index_BT, num_queries, mask.q_zigzag),
    k_index_BS=index(mask.k_index_BS, num_keys, mask.k_zigzag),
    q_zigzag=1,
    k_zigzag=1,
  )


def relative(mask: Mask, q_slice: slice, k_slice: slice) -> jax.Array:
  """Returns key index minus query index: (T, S), or (B, T, S)."""
  q_index, k_index = q_index_of(mask, q_slice), k_index_of(mask, k_slice)
  if q_index.ndim != k_index.ndim:
    q_index, k_index = jnp.atleast_2d(q_index), jnp.atleast_2d(k_index)
  return k_index[..., None, :] - q_index[..., :, None]


def visible(mask: Mask, q_slice: slice, k_slice: slice) -> jax.Array | None:
  """Returns which keys of a block are seen: (T, S), (B, T, S), or None (all).

  This is also the oracle's mask, over one block that holds everything.
  """
  distance = relative(mask, q_slice, k_slice)
  conditions = []
  if mask.causal:
    conditions.append(distance <= 0)
  if mask.window is not None:
    near = distance > -mask.window
    conditions.append(near if mask.causal else near & (distance < mask.window))
  if mask.prefix_B is not None and conditions:
    k_index = jnp.atleast_2d(k_index_of(mask, k_slice))
    in_prefix = k_index < mask.prefix_B[:, None]
    order = _all(conditions)
    order = order[None] if order.ndim == 2 else order
    conditions = [order | in_prefix[:, None, :]]
  if mask.q_segments_BT is not None and mask.k_segments_BS is not None:
    q_segments = mask.q_segments_BT[:, q_slice]
    k_segments = mask.k_segments_BS[:, k_slice]
    conditions.append(q_segments[:, :, None] == k_segments[:, None, :])
  return _all(conditions) if conditions else None


def q_index_of(mask: Mask, part: slice) -> jax.Array:
  """Returns the indices of a block of queries, (T,) or (B, T)."""
  assert mask.q_zigzag == 1, 'call `placed` first'
  return _index(mask, mask.q_index_BT, part)


def k_index_of(mask: Mask, part: slice) -> jax.Array:
  """Returns the indices of a block of keys, (S,) or (B, S)."""
  assert mask.k_zigzag == 1, 'call `placed` first'
  return _index(mask, mask.k_index_BS, part)


def _index(mask: Mask, index: jax.Array | None, part: slice) -> jax.Array:
  if index is not None:
    return index[:, part]
  places = jnp.arange(part.start, part.stop)
  return places if mask.start is None else places + mask.start


def _all(conditions: list[jax.Array]) -> jax.Array:
  result = conditions[0]
  for condition in conditions[1:]:
    if result.ndim < condition.ndim:
      result = result[None]
    elif condition.ndim < result.ndim:
      condition = condition[None]
    result = result & condition
  return result
