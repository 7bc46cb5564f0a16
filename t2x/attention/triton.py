"""Attention on NVIDIA GPUs: jax's Triton kernels, forward and backward.

Blocks of scores live in a multiprocessor's own memory and nowhere else; keys
after a query are not visited (Dao, 2023; the kernel is
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

# Sides of a block of scores, the largest that serves first: products of the
# tensor cores take no smaller ones.
SIDES = 128, 64, 32, 16
LARGEST_HEAD = 256
_BACKWARD = 32  # The side of a block of the backward kernel.
_BLOCK_BYTES = 32 * 1024  # Of keys: two and their values lie in shared memory.


def why_not(
  q_BTNH: Any,
  k_BSKH: Any,
  v_BSKH: Any,
  mask: mask_lib.Mask,
  *,
  soft_cap: float | None = None,
  block: int | None = None,
) -> str | None:
  """Returns why the kernel does not serve, or None where it does.

  Args:
    q_BTNH: queries, or their shape and dtype.
    k_BSKH: keys, or their shape.
    v_BSKH: values, or their shape.
    mask: what each query sees.
    soft_cap: bounds the scores.
    block: side of a block that is asked for.
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


def _sides(T: int, H: int, dtype: Any) -> list[int]:
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
  """As `dense.attend`, of arrays that lie on this device.

  The result, and the log-sum-exp that the backward pass takes with it, are
  named for `remat` as those of `splash` are.

  Args:
    q_BTNH: queries.
    k_BSKH: keys; as many as queries.
    v_BSKH: values.
    mask: in the order of the arrays; causal or of everything.
    scale: factor of the scores.
    block: side of a block of the forward pass; None chooses.
    interpret: run the kernel's text on any device, slowly.
  """
  assert why_not(q_BTNH, k_BSKH, v_BSKH, mask, block=block) is None
  T, _, H = q_BTNH.shape[1:]
  block = block or _sides(T, H, q_BTNH.dtype)[0]
  # The kernel has a key head for each query head.
  group = q_BTNH.shape[2] // k_BSKH.shape[2]
  if group > 1:
    k_BSKH, v_BSKH = (jnp.repeat(a, group, 2) for a in (k_BSKH, v_BSKH))
  fn = functools.partial(_attend, scale, mask.is_ordered, block, interpret)
  return fn(q_BTNH, k_BSKH, v_BSKH, mask.q_segments_BT)


def visited(T: int, causal: bool, side: int) -> int:
  """Returns the pairs of a query and a key in blocks that are computed."""
  blocks = T // side
  return side**2 * (blocks * (blocks + 1) // 2 if causal else blocks**2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _attend(scale, causal, block, interpret, q, k, v, segments):
  return _forward(scale, causal, block, interpret, q, k, v, segments)[0]


def _forward(scale, causal, block, interpret, q, k, v, segments):
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


def _backward(scale, causal, block, interpret, residuals, d_out):
  """Scores, dP, dV and dK by keys, then scores, dP and dQ by queries."""
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
def _kernels():
  """Returns JAX's module, which says from jax 0.12 on that it is to go."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)
    return importlib.import_module('jax.experimental.pallas.ops.gpu.attention')


def _settings(scale, causal, block, interpret):
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


def _label(shape, causal, side, products):
  B, T, N, H = shape
  flops = 2 * products * B * N * H * visited(T, causal, side)
  return f'{splash.FLOPS}{flops}'
