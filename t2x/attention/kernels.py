"""Chooses how attention is computed on a device: a fused kernel, or blocks.

Shape suffixes: B batch, T query position, S key position, N query heads, K
key/value heads, H head dim.
"""

from collections.abc import Callable
import functools

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t2x.attention import blocks
from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.attention import patterns
from t2x.attention import scanned
from t2x.attention import splash
from t2x.attention import triton
from t2x.parallel import manual_sharding
from t2x.parallel import sharding


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  options: dense.AttentionOptions = dense.AttentionOptions(),
) -> jax.Array:
  """Attends as `dense.attend`, by the way that `options.kernel` chooses.

  `auto` takes the device's kernel where it supports the arguments and blocks
  elsewhere, `flash` requires the kernel, and `blocks` takes blocks. What the
  backward pass needs of the result has the name `attention`, for `remat`.

  Args:
    q_BTNH: queries.
    k_BSKH: keys.
    v_BSKH: values.
    mask: description of the keys that each query sees.
    options: the options of `dense.attend`.

  Returns:
    (B, T, N, H) in the dtype of the queries.

  Raises:
    ValueError: `options.kernel` is `flash`, and no kernel supports the
      arguments.
  """
  device, why = manual_sharding.platform(), None
  if options.kernel != 'blocks':
    why = unsupported_reason(
      q_BTNH, k_BSKH, v_BSKH, mask, options, platform=device
    )
    if options.kernel == 'flash' and why:
      raise ValueError(
        f'attention.kernel=flash: {why}. Set it to auto, which takes the '
        'kernel where it serves, and blocks elsewhere.'
      )
  if options.kernel == 'blocks' or why:
    lengths = q_BTNH.shape[1], k_BSKH.shape[1]
    if blocks.are_scanned(mask, *lengths, options.block):
      return scanned.attend(q_BTNH, k_BSKH, v_BSKH, mask, options)
    out = dense.attend(q_BTNH, k_BSKH, v_BSKH, mask, options)
    return checkpoint_name(out, splash.NAME)
  scale = dense.scale_of(options, q_BTNH)
  settings = {'scale': scale, 'block': options.block}
  if device == 'tpu':
    settings['soft_cap'] = options.soft_cap
    place = lambda fn: functools.partial(_on_parts, fn)
    return splash.attend(q_BTNH, k_BSKH, v_BSKH, mask, place=place, **settings)
  flip = lambda a: a.swapaxes(1, 2)

  def local(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: mask_lib.Mask
  ) -> jax.Array:
    q, k, v = map(flip, (q_BNTH, k_BKSH, v_BKSH))
    return flip(triton.attend(q, k, v, mask, **settings))

  q, k, v = map(flip, (q_BTNH, k_BSKH, v_BSKH))
  return flip(_on_parts(local, q, k, v, mask))


def unsupported_reason(
  q_BTNH: triton.Shaped,
  k_BSKH: triton.Shaped,
  v_BSKH: triton.Shaped,
  mask: mask_lib.Mask,
  options: dense.AttentionOptions = dense.AttentionOptions(),
  *,
  platform: str,
) -> str | None:
  """Returns why no kernel supports the arguments, or None where one does.

  Args:
    q_BTNH: queries, or their shape and dtype.
    k_BSKH: keys, or their shape.
    v_BSKH: values, or their shape.
    mask: description of the keys that each query sees.
    options: the options of `dense.attend`.
    platform: platform of the devices; only `tpu` and `gpu` have kernels.
  """
  if platform not in ('tpu', 'gpu'):
    return f'there is no kernel for {platform} devices'
  if options.bias is not None:
    return 'a bias on the scores (relative positions, ALiBi) is not in it'
  if options.dropout is not None:
    return 'dropout on the scores is not in it'
  unordered = mask.prefix_BS is not None or mask.q_ranks_BT is not None
  if not mask.has_static_order or unordered:
    return 'prefixes, and tokens in another order, are not in it'
  if platform == 'gpu' and mask.q_segments_BT is not mask.k_segments_BS:
    return 'queries and keys with segments of their own are not in it'
  if platform == 'gpu':
    limits = {'soft_cap': options.soft_cap, 'block': options.block}
    return triton.unsupported_reason(q_BTNH, k_BSKH, v_BSKH, mask, **limits)
  if q_BTNH.shape[-1] != v_BSKH.shape[-1]:
    return 'keys that are wider than values are not in it'
  lengths = q_BTNH.shape[1], k_BSKH.shape[1]
  if any(length % splash.LANES for length in lengths):
    return (
      f'{lengths[0]} queries and {lengths[1]} keys are not multiples of '
      f'{splash.LANES}'
    )
  if mask.is_ordered and lengths[0] != lengths[1]:
    return (
      f'in an order, {lengths[0]} queries of {lengths[1]} keys are not in it'
    )
  if not patterns.sees_itself(mask.pattern, lengths[0]):
    return 'queries that do not see their own key are not in it'
  block = options.block
  if block and (block % splash.LANES or any(n % block for n in lengths)):
    return (
      f'attention.block={block} is no multiple of {splash.LANES} that divides '
      f'{lengths[0]} queries and {lengths[1]} keys'
    )
  return None


def _on_parts(
  fn: Callable[..., jax.Array],
  q_BNTH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  mask: mask_lib.Mask,
) -> jax.Array:
  """Applies `fn` on each device to its rows and heads.

  The partitioner cannot split a kernel, so the `shard_map` names all mesh axes.
  """
  axes = {*manual_sharding.free_axes()}
  if not sharding.is_active() or not axes:
    return fn(q_BNTH, k_BKSH, v_BKSH, mask)
  rows, heads = (
    manual_sharding.auto_axes('batch'),
    manual_sharding.auto_axes('heads'),
  )
  kv_heads = manual_sharding.auto_axes('kv_heads')
  group = q_BNTH.shape[1] // k_BKSH.shape[1]

  def local(
    q_BNTH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, mask: mask_lib.Mask
  ) -> jax.Array:
    if kv_heads != heads:
      # Each device has all key heads, of which its query heads need some.
      num = q_BNTH.shape[1]
      of_N = (jax.lax.axis_index(heads) * num + jnp.arange(num)) // group
      k_BKSH, v_BKSH = (jnp.take(a, of_N, 1) for a in (k_BKSH, v_BKSH))
    return fn(q_BNTH, k_BKSH, v_BKSH, mask)

  split, keys = P(rows, heads), P(rows, kv_heads)
  mask_spec = jax.tree.map(lambda _: P(rows), mask)
  return jax.shard_map(
    local,
    in_specs=(split, keys, keys, mask_spec),
    out_specs=split,
    axis_names=axes,
    check_vma=False,
  )(q_BNTH, k_BKSH, v_BKSH, mask)
