"""Attention masks: a description of what a query sees, not a (T, S) array.

Shape suffixes: B batch, T query position, S key position.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from t2x.attention import patterns
from t2x.parallel import zigzag as zigzag_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
  """The keys that each query sees.

  `&` and `|` combine masks as they combine patterns. Both sides describe the
  same queries and keys, and segments apply to the combined mask as a whole.

  Tokens are ordered by their index in the sequence: `q_index_BT` and
  `k_index_BS` where given (a cache, a piece of a sequence), else 0, 1, 2, ...
  from the start of the arrays, so that blocks that no query sees can be left
  out at trace time.

  Attributes:
    pattern: keys that are seen by their index; see patterns.py.
    prefix_BS: index at which the prefix of each key's document ends, for
      `patterns.Prefix`; S is 1 where a row has a single prefix.
    q_segments_BT: segment of each query; a query sees only keys of its own
      segment, whatever the pattern is. None, with `k_segments_BS`, is one
      segment.
    k_segments_BS: segment of each key.
    q_ranks_BT: rank of each query; a query sees only keys of its own or a lower
      rank: an order other than that of the sequence (XLNet, Yang et al., 2019).
      None, with `k_ranks_BS`, ignores ranks.
    k_ranks_BS: rank of each key.
    q_index_BT: index of each query in its sequence; B may be 1.
    k_index_BS: index of each key in its sequence; B may be 1.
    start: index of the first query and the first key, where the two above are
      None; None is 0.
    q_zigzag: number of devices over which the queries are in zigzag order
      (t2x/parallel/zigzag.py); 1 is the order of the sequence.
    k_zigzag: number of devices over which the keys are in zigzag order.

  Raises:
    ValueError: one array of a pair is given without the other, or `prefix_BS`
      is given and the pattern shows no prefix.
  """

  pattern: patterns.Pattern = dataclasses.field(
    default=patterns.Everything(), metadata={'static': True}
  )
  prefix_BS: jax.Array | None = None
  q_segments_BT: jax.Array | None = None
  k_segments_BS: jax.Array | None = None
  q_ranks_BT: jax.Array | None = None
  k_ranks_BS: jax.Array | None = None
  q_index_BT: jax.Array | None = None
  k_index_BS: jax.Array | None = None
  start: jax.Array | None = None
  q_zigzag: int = dataclasses.field(default=1, metadata={'static': True})
  k_zigzag: int = dataclasses.field(default=1, metadata={'static': True})

  def __post_init__(self) -> None:
    for name in ('segments', 'ranks'):
      both = f'q_{name}_BT', f'k_{name}_BS'
      given = [n for n in both if getattr(self, n) is not None]
      if len(given) == 1:
        (other,) = set(both) - set(given)
        raise ValueError(
          f'{given[0]} without {other}: a mask compares the two. Give both, or '
          'neither; `mask.cross_attention` fills in the missing one.'
        )
    shows = not self.is_ordered or patterns.has(self.pattern, patterns.Prefix)
    if self.prefix_BS is not None and not shows:
      raise ValueError(
        f'prefix_BS with pattern={self.pattern}, which shows no prefix. Join '
        'it with `mask.with_prefix` by |, or leave prefix_BS out.'
      )

  @property
  def has_static_order(self) -> bool:
    """Whether the arrays are in the order of the sequence, without indices."""
    given = self.q_index_BT is not None or self.k_index_BS is not None
    return not given and self.q_zigzag == self.k_zigzag == 1

  @property
  def is_ordered(self) -> bool:
    """Whether the position of tokens matters to what is seen."""
    return not isinstance(self.pattern, patterns.Everything)

  @property
  def has_segments(self) -> bool:
    """Whether queries see only keys of their own segment."""
    return self.q_segments_BT is not None and self.k_segments_BS is not None

  @property
  def goes_by_rank(self) -> bool:
    """Whether queries see only keys of their own or a lower rank."""
    return self.q_ranks_BT is not None

  @property
  def own_prefix_BS(self) -> jax.Array | None:
    """`prefix_BS` if each key has a value of its own, else None."""
    prefix_BS = self.prefix_BS
    each = prefix_BS is not None and prefix_BS.shape[1] > 1
    return prefix_BS if each else None

  def __and__(self, other: 'Mask | patterns.Pattern') -> 'Mask':
    other = _as_mask(other)
    return _joined(self, other, self.pattern & other.pattern)

  def __or__(self, other: 'Mask | patterns.Pattern') -> 'Mask':
    other = _as_mask(other)
    if self.has_segments != other.has_segments:
      raise ValueError(
        'One side of | has segments and the other has none: segments hold for '
        'a whole mask. Join what the places see with |, then add the segments '
        'with &.'
      )
    return _joined(self, other, self.pattern | other.pattern)


def _as_mask(mask: Mask | patterns.Pattern) -> Mask:
  return mask if isinstance(mask, Mask) else Mask(pattern=mask)


def _joined(left: Mask, right: Mask, pattern: patterns.Pattern) -> Mask:
  """Returns a mask with the arrays of both, which must not conflict."""
  fields: dict[str, Any] = {'pattern': pattern}
  for field in dataclasses.fields(Mask)[1:]:
    a, b = getattr(left, field.name), getattr(right, field.name)
    if a is not field.default and b is not field.default and a is not b:
      raise ValueError(
        f'Both masks have {field.name} of their own; give it to one of them, '
        'or the same array to both.'
      )
    fields[field.name] = b if a is field.default else a
  return Mask(**fields)


def make(
  *,
  causal: bool = False,
  window: int | None = None,
  prefix_B: jax.Array | None = None,
  **arrays: Any,
) -> Mask:
  """Returns a mask of the usual parts: causal & window | prefix.

  Args:
    causal: whether a query sees only its own key and earlier ones.
    window: distance between a query and a key below which it sees the key; None
      is no limit.
    prefix_B: index in each row below which all queries see the keys (prefix
      LM); None is no prefix.
    **arrays: other fields of `Mask`.
  """
  mask = Mask(pattern=patterns.ordered(causal=causal, window=window), **arrays)
  if prefix_B is None:
    return mask
  return _with_prefix_shown(mask, prefix_B[:, None])


def with_prefix(prefix_BS: jax.Array) -> Mask:
  """Returns a mask that shows a prefix alone, to combine with others by |."""
  return Mask(pattern=patterns.Prefix(), prefix_BS=prefix_BS)


def _with_prefix_shown(mask: Mask, prefix_BS: jax.Array) -> Mask:
  """Adds a prefix; a query sees only the prefix of its own segment."""
  pattern = mask.pattern | patterns.Prefix()
  return dataclasses.replace(mask, pattern=pattern, prefix_BS=prefix_BS)


def self_attention(
  segments_BT: jax.Array | None,
  *,
  causal: bool,
  zigzag: int = 1,
  prefix_BS: jax.Array | None = None,
) -> Mask:
  """Returns the mask of a sequence that attends to itself.

  Args:
    segments_BT: segment of each token; None is one segment.
    causal: whether a token sees only itself and earlier tokens.
    zigzag: number of devices over which the tokens are in zigzag order.
    prefix_BS: index at which the prefix of each key's document ends; None is no
      prefix.
  """
  mask = make(
    causal=causal,
    q_segments_BT=segments_BT,
    k_segments_BS=segments_BT,
    q_zigzag=zigzag,
    k_zigzag=zigzag,
  )
  return mask if prefix_BS is None else _with_prefix_shown(mask, prefix_BS)


def cross_attention(
  inputs_BT: jax.Array,
  segments_BT: jax.Array | None,
  source_segments_BS: jax.Array | None,
  *,
  zigzag: int = 1,
) -> Mask:
  """Returns the mask of targets that attend to a source (cross-attention).

  A target sees the source tokens of its own segment. It sees all source tokens
  but padding where the targets have no segments, and all of them where the
  source has none.

  Args:
    inputs_BT: target tokens.
    segments_BT: segment of each target token, or None.
    source_segments_BS: segment of each source token, 0 for padding, or None.
    zigzag: number of devices over which the targets are in zigzag order.
  """
  if source_segments_BS is None:
    return Mask(q_zigzag=zigzag)
  if segments_BT is None:
    segments_BT = jnp.ones(inputs_BT.shape, jnp.int32)
    source_segments_BS = jnp.minimum(source_segments_BS, 1)
  return Mask(
    q_segments_BT=segments_BT,
    k_segments_BS=source_segments_BS,
    q_zigzag=zigzag,
  )


def key_range(
  mask: Mask, q_start: int, q_end: int, num_keys: int
) -> tuple[int, int]:
  """Returns the range of keys that the queries of a block may see.

  Args:
    mask: the mask.
    q_start: position of the block's first query.
    q_end: position after the block's last query.
    num_keys: number of keys in a row.

  Returns:
    Position of the first key, and that after the last one.
  """
  if not mask.has_static_order:
    return 0, num_keys
  keys, at = np.arange(num_keys), lambda i: np.array([i])
  some, _ = mask.pattern.reach((at(q_start), at(q_end - 1)), (keys, keys))
  (seen,) = np.nonzero(some)
  # Queries that see nothing have a range of one key, which `visible` hides.
  return (int(seen[0]), int(seen[-1]) + 1) if len(seen) else (0, 1)


def specs(mask: Mask, axis: str) -> Mask:
  """Returns a mask of the partition specs of its arrays, split along `axis`."""
  split = jax.tree.map(lambda _: P(None, axis), mask)
  if mask.prefix_BS is None or mask.own_prefix_BS is not None:
    return split
  return dataclasses.replace(split, prefix_BS=P())  # A number for each row.


def placed(mask: Mask, num_queries: int, num_keys: int) -> Mask:
  """Returns the mask with zigzag order replaced by explicit indices.

  Args:
    mask: the mask.
    num_queries: number of queries in a row.
    num_keys: number of keys in a row.
  """

  def index(
    given: jax.Array | None, length: int, devices: int
  ) -> jax.Array | None:
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
  """Returns key index minus query index of a block: (T, S), or (B, T, S)."""
  q_index, k_index = _indices(mask, q_slice, k_slice)
  return k_index[..., None, :] - q_index[..., :, None]


def _indices(
  mask: Mask, q_slice: slice, k_slice: slice
) -> tuple[jax.Array, jax.Array]:
  """Returns indices of a block's queries and keys, with equal dimensions."""
  q_index, k_index = q_index_of(mask, q_slice), k_index_of(mask, k_slice)
  if q_index.ndim != k_index.ndim:
    q_index, k_index = jnp.atleast_2d(q_index), jnp.atleast_2d(k_index)
  return q_index, k_index


def visible(mask: Mask, q_slice: slice, k_slice: slice) -> jax.Array | None:
  """Returns whether each query of a block sees each key.

  This is also the mask of the oracle, reference.py, over one block that holds
  everything.

  Args:
    mask: the mask.
    q_slice: positions of the block's queries.
    k_slice: positions of the block's keys.

  Returns:
    A boolean array (T, S) or (B, T, S), or None if all keys are seen.
  """
  conditions = []
  if mask.is_ordered:
    q_index, k_index = _indices(mask, q_slice, k_slice)
    prefix = _prefix_of(mask, k_slice)
    if prefix is not None:
      q_index, k_index = jnp.atleast_2d(q_index), jnp.atleast_2d(k_index)
    q_index, k_index = q_index[..., :, None], k_index[..., None, :]
    conditions.append(mask.pattern.sees(q_index, k_index, prefix))
  if mask.q_segments_BT is not None and mask.k_segments_BS is not None:
    q_segments = mask.q_segments_BT[:, q_slice]
    k_segments = mask.k_segments_BS[:, k_slice]
    conditions.append(q_segments[:, :, None] == k_segments[:, None, :])
  if mask.q_ranks_BT is not None and mask.k_ranks_BS is not None:
    q_ranks = mask.q_ranks_BT[:, q_slice]
    k_ranks = mask.k_ranks_BS[:, k_slice]
    conditions.append(q_ranks[:, :, None] >= k_ranks[:, None, :])
  return _all(conditions) if conditions else None


def _prefix_of(mask: Mask, keys: slice) -> jax.Array | None:
  """Returns the indices at which the prefixes of keys end, (B, 1, S)."""
  if mask.own_prefix_BS is not None:
    return mask.own_prefix_BS[:, None, keys]
  return None if mask.prefix_BS is None else mask.prefix_BS[:, None]


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
