"""Attention on TPUs: jax's splash kernels, forward and backward.

Blocks of scores live in the chip's vector memory and nowhere else; blocks that
the mask hides are not visited (Dao et al., 2022; the kernel is
jax.experimental.pallas.ops.tpu.splash_attention).

Shape suffixes: B batch, T query position, S key position, N query heads, K
key/value heads, H head dim.
"""

from collections.abc import Callable
import functools

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

LANES = 128  # Of a vector register: queries and keys come in multiples.
_BLOCK = 512  # The side of a block of scores, where the length allows.
NAME = 'attention'  # Of what the forward pass keeps, for `remat`.
# A kernel's text does not tell its FLOPs: its name ends with those of the
# forward pass on one device, blocks that it visits counted whole.
FLOPS = 'flash_flops_'


def block_size(length: int) -> int | None:
  """Returns the side of a block that divides a length; None for none."""
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
  """As `dense.attend`.

  Args:
    q_BTNH: queries; T is a multiple of 128.
    k_BSKH: keys; S too.
    v_BSKH: values.
    mask: in the order of the arrays; without a prefix. In an ordered one each
      query sees a key.
    scale: factor of the scores.
    soft_cap: bounds them.
    block: side of a block; None chooses.
    interpret: run the kernel's text on any device, slowly.
    place: runs a function of (q_BNTH, k_BKSH, v_BKSH, mask) on each device's
      part. Nothing else is in it, so that what it is given and what it gives
      are what the backward pass needs, without copies in another layout.
  """
  # The factor itself is not rounded to the dtype of the queries.
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
  # The kernel gives a query that sees nothing the mean of what is hidden.
  sees_BT = (q_BT[:, :, None] == k_BS[:, None, :]).any(-1)
  return jnp.where(sees_BT[..., None, None], out_BTNH, 0)


def _attend(q_BNTH, k_BKSH, v_BKSH, mask, *, soft_cap, block, interpret):
  (B, N, T), S = q_BNTH.shape[:3], k_BKSH.shape[2]
  heads = splash_mask.MultiHeadMask([_order(mask, T, S)] * N)
  q_side, k_side = block or block_size(T), block or block_size(S)
  assert q_side and k_side, (T, S)
  kernel = kernel_lib.make_splash_mha(
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
  pairs = visited(mask, T, S, q_side, k_side)
  flops = 2 * B * N * (q_BNTH.shape[-1] + v_BKSH.shape[-1]) * pairs
  with jax.named_scope(f'{FLOPS}{flops}'):
    return jax.vmap(kernel)(q_BNTH, k_BKSH, v_BKSH, segments)


def visited(
  mask: mask_lib.Mask, T: int, S: int, q_side: int, k_side: int
) -> int:
  """Returns the pairs of a query and a key in blocks that hold a seen one."""
  q, k = np.arange(0, T, q_side)[:, None], np.arange(0, S, k_side)
  some, _ = mask.pattern.reach((q, q + q_side - 1), (k, k + k_side - 1))
  return int(some.sum()) * q_side * k_side


def _order(mask: mask_lib.Mask, T: int, S: int) -> splash_mask.Mask:
  """Returns what a query sees by its place.

  The usual orders are worked out in the kernel; it reads the blocks of others
  that are seen in part.
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
  """Any pattern, read block by block."""

  def __init__(self, pattern: patterns.Pattern, shape: tuple[int, int]):
    self._key = pattern, shape

  @property
  def shape(self) -> tuple[int, ...]:
    return self._key[1]

  def __getitem__(self, idx) -> np.ndarray:
    rows, columns = (
      np.arange(length)[part] for length, part in zip(self.shape, idx)
    )
    pattern, shape = self._key[0], (len(rows), len(columns))
    # Most blocks are hidden or seen as a whole.
    ends = [(np.array(a[0]), np.array(a[-1])) for a in (rows, columns)]
    some, every = pattern.reach(*ends)
    if every or not some:
      return np.broadcast_to(bool(every), shape)
    return pattern.sees(rows[:, None], columns, None)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, _Pattern) and self._key == other._key

  def __hash__(self) -> int:
    return hash(self._key)
