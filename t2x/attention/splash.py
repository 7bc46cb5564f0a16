"""Attention on TPUs by JAX's splash kernels, forward and backward.

Blocks of scores exist in the chip's vector memory only, and blocks that the
mask hides are skipped (Dao et al., 2022; the kernel is
jax.experimental.pallas.ops.tpu.splash_attention).

Shape suffixes: B batch, T query position, S key position, N query heads, K
key/value heads, H head dim.
"""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_kernel as kernel_lib,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
  splash_attention_mask as splash_mask,
)
import jax.numpy as jnp
import numpy as np

from t2x.attention import mask as mask_lib
from t2x.attention import patterns

# Lanes of a vector register; numbers of queries and keys are multiples of it.
LANES = 128
_BLOCK = 512  # The side of a block of scores, where the length allows.
NAME = (
  'attention'  # Name of the results that the forward pass keeps, for `remat`.
)
# The FLOPs of a kernel cannot be read from its program text. So its scope is
# this prefix and the FLOPs of its forward pass on one device; blocks that it
# computes count whole.
FLOPS = 'flash_flops_'


def block_size(length: int) -> int | None:
  """Returns the largest side of a block that divides a length, or None."""
  sides = range(_BLOCK, 0, -LANES)
  return next((side for side in sides if length % side == 0), None)


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  *,
  scale: float,
  soft_cap: float | None = None,
  block: int | None = None,
  interpret: bool = False,
  place: Callable[[Callable], Callable] = lambda fn: fn,
) -> jax.Array:
  """Attends as `dense.attend`.

  Args:
    q_BTNH: queries; T is a multiple of 128.
    k_BSKH: keys; S is a multiple of 128.
    v_BSKH: values, of the same head dim as the keys.
    mask: mask in the order of the arrays, without a prefix; where it has an
      order, each query sees a key.
    scale: factor of the scores.
    soft_cap: bound of the scores, as in `dense.AttentionOptions`.
    block: side of a block; None chooses.
    interpret: whether to run the kernel in interpreter mode, on any device and
      slowly.
    place: wrapper that makes a function of (q_BNTH, k_BKSH, v_BKSH, mask) run
      on each device's part. The function is the kernel alone, so that its
      arguments and results are what the backward pass keeps, without copies in
      another layout.

  Returns:
    (B, T, N, H) in the dtype of the queries.
  """
  # In float32, so that the factor is not rounded to the dtype of the queries.
  q_BTNH = (q_BTNH.astype(jnp.float32) * scale).astype(q_BTNH.dtype)
  heads_first = lambda a: a.swapaxes(1, 2)
  run = functools.partial(
    _attend, soft_cap=soft_cap, block=block, interpret=interpret
  )
  parts = map(heads_first, (q_BTNH, k_BSKH, v_BSKH))
  out_BTNH = heads_first(place(run)(*parts, mask))
  q_BT, k_BS = mask.q_segments_BT, mask.k_segments_BS
  if q_BT is None or k_BS is None or mask.is_ordered:
    return out_BTNH
  # For a query that sees no key the kernel returns the mean of hidden values.
  sees_BT = (q_BT[:, :, None] == k_BS[:, None, :]).any(-1)
  return jnp.where(sees_BT[..., None, None], out_BTNH, 0)


def _attend(
  q_BNTH: jax.Array,
  k_BKSH: jax.Array,
  v_BKSH: jax.Array,
  mask: mask_lib.Mask,
  *,
  soft_cap: float | None,
  block: int | None,
  interpret: bool,
) -> jax.Array:
  (B, N, T), S = q_BNTH.shape[:3], k_BKSH.shape[2]
  heads = splash_mask.MultiHeadMask([_order(mask, T, S)] * N)
  q_side, k_side = block or block_size(T), block or block_size(S)
  assert q_side and k_side, (T, S)
  kernel: Any = kernel_lib.make_splash_mha(
    heads,
    block_sizes=kernel_lib.BlockSizes(
      block_q=q_side,
      block_kv=k_side,
      block_q_dkv=q_side,
      block_kv_dkv=k_side,
      block_q_dq=q_side,
      block_kv_dq=k_side,
    ),
    head_shards=1,
    q_seq_shards=1,
    attn_logits_soft_cap=soft_cap,
    residual_checkpoint_name=NAME,
    interpret=interpret,
  )
  segments = None
  if mask.q_segments_BT is not None and mask.k_segments_BS is not None:
    segments = kernel_lib.SegmentIds(mask.q_segments_BT, mask.k_segments_BS)
  pairs = num_computed_pairs(mask, T, S, q_side, k_side)
  flops = 2 * B * N * (q_BNTH.shape[-1] + v_BKSH.shape[-1]) * pairs
  with jax.named_scope(f'{FLOPS}{flops}'):
    return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)


def num_computed_pairs(
  mask: mask_lib.Mask, T: int, S: int, q_side: int, k_side: int
) -> int:
  """Returns the number of pairs of a query and a key that are computed.

  These are all pairs of blocks in which at least one pair is seen.

  Args:
    mask: the mask.
    T: number of queries.
    S: number of keys.
    q_side: number of queries in a block.
    k_side: number of keys in a block.
  """
  q, k = np.arange(0, T, q_side)[:, None], np.arange(0, S, k_side)
  some, _ = mask.pattern.reach((q, q + q_side - 1), (k, k + k_side - 1))
  return int(some.sum()) * q_side * k_side


def _order(mask: mask_lib.Mask, T: int, S: int) -> splash_mask.Mask:
  """Returns the kernel's mask for the pattern of a mask.

  The kernel computes the masks of the usual patterns itself. For other patterns
  it reads the mask of each block that is seen in part.
  """
  match mask.pattern:
    case patterns.Everything():
      return splash_mask.FullMask((T, S))
    case patterns.Causal():
      return splash_mask.CausalMask((T, S))
    case patterns.Window(size):
      return splash_mask.LocalMask((T, S), (size - 1, size - 1), 0)
    case patterns.And(patterns.Causal(), patterns.Window(size)):
      return splash_mask.LocalMask((T, S), (size - 1, 0), 0)
  return _Pattern(mask.pattern, (T, S))


class _Pattern(splash_mask.Mask):
  """Mask of any pattern, which the kernel reads block by block."""

  def __init__(self, pattern: patterns.Pattern, shape: tuple[int, int]):
    self._key = pattern, shape

  @property
  def shape(self) -> tuple[int, ...]:
    return self._key[1]

  def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
    rows, columns = (
      np.arange(length)[part] for length, part in zip(self.shape, idx)
    )
    pattern, shape = self._key[0], (len(rows), len(columns))
    # Most blocks are hidden, or seen, as a whole.
    ends = [(np.array(a[0]), np.array(a[-1])) for a in (rows, columns)]
    some, every = pattern.reach(*ends)
    if every or not some:
      return np.broadcast_to(bool(every), shape)
    return np.asarray(pattern.sees(rows[:, None], columns, None))

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Pattern) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)
