"""Attention over a sequence split between devices, by all-to-all exchanges.

Each device of a mesh axis holds a piece of every row. An all-to-all exchange
gives it whole rows of some of the heads instead, and a second one gives its
piece back (Jacobs et al., 2023, "DeepSpeed Ulysses").

Shape suffixes: B batch, T query position, S key position, N query heads, K
key/value heads, G query heads per key/value head, H head dim. C is the number
of devices.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t2x.attention import dense
from t2x.attention import kernels
from t2x.attention import mask as mask_lib
from t2x.parallel import manual_sharding
from t2x.parallel import sharding


def repeats(num_heads: int, num_kv_heads: int, devices: int, parts: int) -> int:
  """Returns how many copies of each key/value head let the heads divide.

  Args:
    num_heads: number of query heads N.
    num_kv_heads: number of key/value heads K.
    devices: number of devices C that exchange heads.
    parts: number of parts into which tensor parallelism splits the heads.

  Raises:
    ShardingError: no number of copies lets the heads divide.
  """
  need = devices * parts
  per_head = num_heads // num_kv_heads
  for copies in range(1, per_head + 1):
    if per_head % copies == 0 and num_kv_heads * copies % need == 0:
      return copies
  raise sharding.ShardingError(
    f'attention.num_heads={num_heads} (num_kv_heads={num_kv_heads}) cannot be '
    f'dealt to {need} devices (mesh.context={devices}, heads over {parts}): '
    'all-to-all attention needs a multiple of that many heads. Choose '
    'rules.context_attention=ring (on stages with pipeline.uniform=true), or '
    'a smaller mesh.context.'
  )


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  axis: str,
  options: dense.AttentionOptions = dense.AttentionOptions(),
) -> jax.Array:
  """Attends as `context.attend` in rows that a mesh axis splits.

  The tokens of a row are in the order of the sequence.

  Args:
    q_BTNH: queries, split along the sequence.
    k_BSKH: keys, split along the sequence.
    v_BSKH: values, split along the sequence.
    mask: description of the keys that each query sees.
    axis: mesh axis that splits the sequence.
    options: the options of `dense.attend`.

  Raises:
    ShardingError: the heads do not divide.
  """

  def whole_rows(
    options: dense.AttentionOptions,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    mask: mask_lib.Mask,
    heads_KG: jax.Array,
  ) -> jax.Array:
    bias, dropout = options.bias, options.dropout
    options = dataclasses.replace(
      options,
      bias=bias and _HeadBias(bias, heads_KG.reshape(-1).astype(jnp.float32)),
      dropout=dropout and dropout.of_heads(heads_KG),
    )
    return kernels.attend(q, k, v, mask, options)

  return apply(whole_rows, options, q_BTNH, k_BSKH, v_BSKH, mask, axis)


def apply(
  fn: Callable[..., jax.Array],
  extra: Any,
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  axis: str,
) -> jax.Array:
  """Applies `fn` to whole rows, on each device to some of the heads.

  Args:
    fn: function of `extra`, queries, keys, values, the mask and the numbers of
      the query heads (K, G), that returns (B, T, N, H).
    extra: pytree that every device has whole.
    q_BTNH: queries, split along the sequence.
    k_BSKH: keys, split along the sequence.
    v_BSKH: values, split along the sequence.
    mask: description of the keys that each query sees.
    axis: mesh axis that splits the sequence.

  Returns:
    The result of `fn` (B, T, N, H), split along the sequence.

  Raises:
    ShardingError: the heads do not divide.
  """
  sizes = jax.sharding.get_abstract_mesh().shape
  parts = math.prod(sizes[a] for a in manual_sharding.auto_axes('kv_heads'))
  N, K = q_BTNH.shape[2], k_BSKH.shape[2]
  copies = repeats(N, K, sizes[axis], parts)
  k_BSKH, v_BSKH = (jnp.repeat(a, copies, 2) for a in (k_BSKH, v_BSKH))
  split = P(None, axis)
  mask_spec = mask_lib.specs(mask, axis)
  return jax.shard_map(
    functools.partial(_exchange, fn, axis),
    in_specs=(P(), split, split, split, mask_spec),
    out_specs=split,
    axis_names={axis},
    check_vma=False,
  )(extra, q_BTNH, k_BSKH, v_BSKH, mask)


def _exchange(
  fn: Callable[..., jax.Array],
  axis: str,
  extra: Any,
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
) -> jax.Array:
  C, rank = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
  N, K = q_BTNH.shape[2], k_BSKH.shape[2]
  # Every C-th key/value head with its query heads, so that a split of the
  # heads over other axes stays as it is.
  heads_KG = jnp.arange(N).reshape(K // C, C, N // K)[:, rank]

  def exchange(a: jax.Array, **axes: int) -> jax.Array:
    fn = lambda a: jax.lax.all_to_all(a, axis, tiled=True, **axes)
    names = 'batch', None, 'kv_heads', None, None, None
    return manual_sharding.on_parts(fn, a, *names)

  def to_heads(a: jax.Array, group: int) -> jax.Array:
    """(B, T / C, K group, H) to (B, T, K / C group, H)."""
    a = a.reshape(*a.shape[:2], K // C, C, group, -1)
    a = exchange(a, split_axis=3, concat_axis=1)
    return a.reshape(*a.shape[:2], K // C * group, -1)

  q, k, v = to_heads(q_BTNH, N // K), to_heads(k_BSKH, 1), to_heads(v_BSKH, 1)
  all_gather = lambda x: jax.lax.all_gather(x, axis, axis=1, tiled=True)
  gather = lambda x: (
    None
    if x is None
    else manual_sharding.on_parts(all_gather, x, 'batch', None)
  )
  mask = dataclasses.replace(
    mask,
    q_segments_BT=gather(mask.q_segments_BT),
    k_segments_BS=gather(mask.k_segments_BS),
    # A single prefix for a whole row is on every device.
    prefix_BS=(
      mask.prefix_BS
      if mask.own_prefix_BS is None
      else gather(mask.own_prefix_BS)
    ),
  )
  out = fn(extra, q, k, v, mask, heads_KG)
  out = out.reshape(*out.shape[:2], K // C, 1, N // K, -1)
  out = exchange(out, split_axis=1, concat_axis=3)
  return out.reshape(*q_BTNH.shape[:3], -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _HeadBias:
  """The bias of some heads, given by their numbers; a pytree."""

  bias: dense.Bias
  heads_N: jax.Array  # Floats: gradients by integers cannot be added up.

  def __call__(self, relative: jax.Array) -> jax.Array:
    heads_N = self.heads_N.astype(jnp.int32)
    return jnp.take(self.bias(relative), heads_N, axis=-3)
