"""Attention on NVIDIA GPUs by JAX's Triton kernels, forward and backward.

Blocks of scores exist in a multiprocessor's own memory only, and in causal
attention blocks of later keys are skipped (Dao, 2023; the kernel is
jax.experimental.pallas.ops.gpu.attention).

Shape suffixes: B batch, T query position, S key position, N query heads, K
key/value heads, H head dim.
"""

import functools
import importlib
from typing import Any
import warnings

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
import jax.numpy as jnp

from t2x.attention import mask as mask_lib
from t2x.attention import patterns
from t2x.attention import splash

Shaped = jax.Array | jax.ShapeDtypeStruct  # An array, or its shape and dtype.

# Sides of a block of scores, in the order in which they are tried. Products on
# tensor cores cannot be smaller.
SIDES = 128, 64, 32, 16
LARGEST_HEAD = 256  # The largest head dim of the kernel.
_BACKWARD = 32  # The side of a block of the backward kernel.
# Largest size of a block of keys; shared memory holds two, with their values.
_BLOCK_BYTES = 32 * 1024

_Residuals = tuple[Any, ...]


def unsupported_reason(
  q_BTNH: Shaped,
  k_BSKH: Shaped,
  v_BSKH: Shaped,
  mask: mask_lib.Mask,
  *,
  soft_cap: float | None = None,
  block: int | None = None,
) -> str | None:
  """Returns why the kernel does not support the arguments, or None if it does.

  Args:
    q_BTNH: queries, or their shape and dtype.
    k_BSKH: keys, or their shape.
    v_BSKH: values, or their shape.
    mask: description of the keys that each query sees.
    soft_cap: bound of the scores, as in `dense.AttentionOptions`.
    block: side of a block that is required; None is any.
  """
  (_, T, _, H), S = q_BTNH.shape, k_BSKH.shape[1]
  if soft_cap is not None:
    return 'soft caps are not in the kernel for GPUs'
  if mask.pattern not in (patterns.Everything(), patterns.Causal()):
    return 'windows and other patterns are not in the kernel for GPUs'
  if T != S:
    return (
      f'{T} queries and {S} keys: the kernel for GPUs takes a sequence that '
      'looks at itself'
    )
  if v_BSKH.shape[-1] != H or not SIDES[-1] <= H <= LARGEST_HEAD:
    return (
      f'keys and values of {H} and {v_BSKH.shape[-1]} dims: the kernel for '
      f'GPUs takes as many of both, from {SIDES[-1]} to {LARGEST_HEAD}'
    )
  if T % _BACKWARD:
    return f'{T} queries are not a multiple of {_BACKWARD}'
  fitting = _sides(T, H, q_BTNH.dtype)
  if block is not None and block not in fitting:
    return f'its blocks have a side of {", ".join(map(str, fitting))} here'
  return None


def _sides(T: int, H: int, dtype: jax.typing.DTypeLike) -> list[int]:
  """Returns the sides that divide the length and fit in shared memory."""
  width = pl.next_power_of_2(H) * jnp.dtype(dtype).itemsize
  return [
    side for side in SIDES if T % side == 0 and side * width <= _BLOCK_BYTES
  ]


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  *,
  scale: float,
  block: int | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Attends as `dense.attend`, with arrays of this device alone.

  The result, and the log-sum-exp that the backward pass needs with it, have the
  name `splash.NAME`, for `remat`.

  Args:
    q_BTNH: queries.
    k_BSKH: keys; as many as queries.
    v_BSKH: values.
    mask: mask in the order of the arrays, causal or showing everything.
    scale: factor of the scores.
    block: side of a block of the forward pass; None chooses.
    interpret: whether to run the kernel in interpreter mode, on any device and
      slowly.

  Returns:
    (B, T, N, H) in the dtype of the queries.
  """
  assert unsupported_reason(q_BTNH, k_BSKH, v_BSKH, mask, block=block) is None
  T, _, H = q_BTNH.shape[1:]
  block = block or _sides(T, H, q_BTNH.dtype)[0]
  # The kernel has a key head for each query head.
  group = q_BTNH.shape[2] // k_BSKH.shape[2]
  if group > 1:
    k_BSKH, v_BSKH = (jnp.repeat(a, group, 2) for a in (k_BSKH, v_BSKH))
  fn = functools.partial(_attend, scale, mask.is_ordered, block, interpret)
  return fn(q_BTNH, k_BSKH, v_BSKH, mask.q_segments_BT)


def num_computed_pairs(T: int, causal: bool, side: int) -> int:
  """Returns the number of pairs of a query and a key that are computed.

  Args:
    T: number of queries, and of keys.
    causal: whether blocks of later keys are skipped.
    side: side of a block.
  """
  blocks = T // side
  return side**2 * (blocks * (blocks + 1) // 2 if causal else blocks**2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(
  scale: float,
  causal: bool,
  block: int,
  interpret: bool,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array | None,
) -> jax.Array:
  return _forward(scale, causal, block, interpret, q, k, v, segments)[0]


def _forward(
  scale: float,
  causal: bool,
  block: int,
  interpret: bool,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments: jax.Array | None,
) -> tuple[jax.Array, _Residuals]:
  with jax.named_scope(_label(q.shape, causal, block, products=2)):
    parts: Any = _kernels().mha(
      q,
      k,
      v,
      segments,
      return_residuals=True,
      **_settings(scale, causal, block, interpret),
    )
  out, lse = (checkpoint_name(a, splash.NAME) for a in parts)
  return out, (q, k, v, segments, out, lse)


def _backward(
  scale: float,
  causal: bool,
  block: int,
  interpret: bool,
  residuals: _Residuals,
  d_out: jax.Array,
) -> tuple[jax.Array | None, ...]:
  """Returns the gradients of queries, keys and values.

  One kernel goes by keys (scores, dP, dV and dK), and one by queries (scores,
  dP and dQ): seven products.
  """
  q = residuals[0]
  settings = _settings(scale, causal, block, interpret)
  with jax.named_scope(_label(q.shape, causal, _BACKWARD, products=7)):
    # The kernel's own rule, with the residuals that are named above.
    rule: Any = _kernels().mha.bwd
    return rule(
      settings['sm_scale'],
      settings['causal'],
      settings['block_sizes'],
      'triton',
      None,  # Warps, by the kernel's own rule.
      2,
      None,
      settings['interpret'],
      False,
      False,
      residuals,
      d_out,
    )


_attend.defvjp(_forward, _backward)


@functools.cache
def _kernels() -> Any:
  """Imports JAX's module without its deprecation warning (from jax 0.12)."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)
    return importlib.import_module('jax.experimental.pallas.ops.gpu.attention')


def _settings(
  scale: float, causal: bool, block: int, interpret: bool
) -> dict[str, Any]:
  sides = _kernels().BlockSizes(
    block_q=block,
    block_k=block,
    block_q_dkv=_BACKWARD,
    block_kv_dkv=_BACKWARD,
    block_q_dq=_BACKWARD,
    block_kv_dq=_BACKWARD,
  )
  return {
    'sm_scale': scale,
    'causal': causal,
    'block_sizes': sides,
    'interpret': interpret,
  }


def _label(
  shape: tuple[int, ...], causal: bool, side: int, products: int
) -> str:
  B, T, N, H = shape
  flops = 2 * products * B * N * H * num_computed_pairs(T, causal, side)
  return f'{splash.FLOPS}{flops}'
