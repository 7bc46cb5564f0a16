"""Softmax attention as a scan over the blocks that a pattern shows.

Each step multiplies a block of queries with a few blocks of keys and merges the
result with that of the block's earlier steps by a running maximum and sum
(Milakov and Gimelshein, 2018). The backward pass takes the same steps again and
computes their probabilities from the log-sum-exp (Dao et al., 2022), so that
memory grows with the length and not with its square.

Shape suffixes: B batch, T query position, S key position, N query heads, K
key/value heads, G query heads per key/value head, H head dim, P steps, C blocks
of keys of a step, I blocks of queries, J blocks of keys.
"""

import dataclasses
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.attention import pairs as pairs_lib
from t2x.attention import patterns
from t2x.attention import splash

_QKV = tuple[jax.Array, jax.Array, jax.Array]
_Residuals = tuple[Any, ...]
# Gradients of queries, keys, values and bias.
_Sums = tuple[jax.Array, jax.Array, jax.Array, Any]


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  options: dense.AttentionOptions = dense.AttentionOptions(),
) -> jax.Array:
  """Attends as `dense.attend` in arrays that have the order of the sequence.

  Args:
    q_BTNH: queries.
    k_BSKH: keys.
    v_BSKH: values.
    mask: description of the keys that each query sees, without indices.
    options: the options of `dense.attend`.

  Returns:
    (B, T, N, H) in the dtype of the queries.
  """
  assert mask.has_static_order and mask.start is None
  return _attend((q_BTNH, k_BSKH, v_BSKH), options, mask)


@jax.custom_vjp
def _attend(
  qkv: _QKV, options: dense.AttentionOptions, mask: mask_lib.Mask
) -> jax.Array:
  return _forward(qkv, options, mask)[0]


class _Blocks:
  """Cuts arrays into blocks, and reads and writes the blocks of a step."""

  def __init__(
    self,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    mask: mask_lib.Mask,
    options: dense.AttentionOptions,
  ):
    (_, self.T, N, _), (_, self.S, self.K, _) = q_shape, k_shape
    self.G = N // self.K
    self.steps = pairs_lib.plan(mask.pattern, self.T, self.S, options.block)
    self.I = -(-self.T // self.steps.q_size)
    # Steps may go on past the last key by all blocks but one.
    self.J = -(-self.S // self.steps.k_size) + self.steps.k_PC.shape[1]
    self.mask = mask

  def queries(self, a_BTN: jax.Array) -> jax.Array:
    """Cuts (B, T, N, ...) into blocks (I, B, K, G, block, ...)."""
    a = _padded(a_BTN, self.I * self.steps.q_size)
    rest = a.shape[3:]
    a = a.reshape(a.shape[0], self.I, -1, self.K, self.G, *rest)
    return jnp.moveaxis(a, (1, 2), (0, 4))

  def of_queries(self, a: jax.Array) -> jax.Array:
    """Inverse of `queries`."""
    a = jnp.moveaxis(a, (0, 4), (1, 2))
    rest = a.shape[5:]
    return a.reshape(a.shape[0], -1, self.K * self.G, *rest)[:, : self.T]

  def keys(self, a_BSKH: jax.Array) -> jax.Array:
    """Cuts (B, S, K, H) into blocks (B, K, J, block, H)."""
    a = _padded(a_BSKH, self.J * self.steps.k_size).swapaxes(1, 2)
    return a.reshape(*a.shape[:2], self.J, -1, a.shape[-1])

  def of_keys(self, a: jax.Array) -> jax.Array:
    """Inverse of `keys`."""
    a = a.reshape(*a.shape[:2], -1, a.shape[-1])
    return a.swapaxes(1, 2)[:, : self.S]

  def read(self, a: jax.Array, blocks_C: jax.Array) -> jax.Array:
    """Reads some blocks of keys, (B, K, C block, H)."""
    if self.steps.is_sliced:
      num = self.steps.k_PC.shape[1]
      a = jax.lax.dynamic_slice_in_dim(a, blocks_C[0], num, 2)
    else:
      a = jnp.take(a, blocks_C, axis=2, mode='clip')
    return a.reshape(*a.shape[:2], -1, a.shape[-1])

  def add(self, a: jax.Array, new: jax.Array, blocks_C: jax.Array) -> jax.Array:
    """Adds `new`, (B, K, C block, H), to some blocks of keys."""
    new = new.reshape(*a.shape[:2], -1, *a.shape[3:]).astype(a.dtype)
    if not self.steps.is_sliced:
      return a.at[:, :, blocks_C].add(new, mode='drop')
    old = jax.lax.dynamic_slice_in_dim(a, blocks_C[0], new.shape[2], 2)
    return jax.lax.dynamic_update_slice_in_dim(a, old + new, blocks_C[0], 2)

  def mask_of(self, row: jax.Array, blocks_C: jax.Array) -> mask_lib.Mask:
    """Returns the mask of a step: block `row` of queries, some of keys."""
    mask, steps = self.mask, self.steps
    q_index_T = row * steps.q_size + jnp.arange(steps.q_size)
    inside_S = jnp.arange(steps.k_size)[None]
    k_index_CS = blocks_C[:, None] * steps.k_size + inside_S
    k_index_S = k_index_CS.reshape(-1)
    pattern = mask.pattern
    if (steps.k_PC.max(initial=0) + 1) * steps.k_size > self.S:
      pattern &= patterns.Below(self.S)
    prefix_BS = mask.prefix_BS
    if mask.own_prefix_BS is not None:
      prefix_BS = _at(mask.own_prefix_BS, k_index_S)
    step_mask = mask_lib.Mask(
      pattern=pattern,
      prefix_BS=prefix_BS,
      q_index_BT=q_index_T[None],
      k_index_BS=k_index_S[None],
    )
    if mask.q_segments_BT is None or mask.k_segments_BS is None:
      return step_mask
    return dataclasses.replace(
      step_mask,
      q_segments_BT=_at(mask.q_segments_BT, q_index_T),
      k_segments_BS=_at(mask.k_segments_BS, k_index_S),
    )


def _padded(a: jax.Array, length: int) -> jax.Array:
  return jnp.pad(
    a, [(0, 0), (0, length - a.shape[1])] + [(0, 0)] * (a.ndim - 2)
  )


def _at(a_BT: jax.Array, index_T: jax.Array) -> jax.Array:
  return jnp.take(a_BT, index_T, axis=1, mode='clip')


def _get(a: jax.Array, i: jax.Array | int) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(a, i, 0, keepdims=False)


def _set(a: jax.Array, value: jax.Array, i: jax.Array | int) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(a, value, i, 0)


def _scores(
  q_BKGTH: jax.Array,
  k_BKSH: jax.Array,
  mask: mask_lib.Mask,
  options: dense.AttentionOptions,
) -> jax.Array:
  scores = jnp.einsum(
    'BKGTH,BKSH->BKGTS',
    q_BKGTH * dense.scale_of(options, q_BKGTH),
    k_BKSH,
    preferred_element_type=jnp.float32,
  )
  whole = slice(0, scores.shape[-2]), slice(0, scores.shape[-1])
  return dense.finish_scores(scores, mask, options, *whole)


def _product(
  weights_BKGTS: jax.Array,
  v_BKSH: jax.Array,
  mask: mask_lib.Mask,
  options: dense.AttentionOptions,
) -> jax.Array:
  whole = slice(0, weights_BKGTS.shape[-2]), slice(0, weights_BKGTS.shape[-1])
  weights_BKGTS = dense.apply_dropout(weights_BKGTS, options, mask, *whole)
  return jnp.einsum(
    'BKGTS,BKSH->BKGTH',
    weights_BKGTS.astype(v_BKSH.dtype),
    v_BKSH,
    preferred_element_type=jnp.float32,
  )


def _forward(
  qkv: _QKV, options: dense.AttentionOptions, mask: mask_lib.Mask
) -> tuple[jax.Array, _Residuals]:
  blocks = _Blocks(qkv[0].shape, qkv[1].shape, mask, options)
  q, k, v = blocks.queries(qkv[0]), blocks.keys(qkv[1]), blocks.keys(qkv[2])
  start = dense.empty_sums(q.shape[:-1], v.shape[-1])

  def step(
    sums: dense.Sums, at: tuple[jax.Array, jax.Array]
  ) -> tuple[dense.Sums, None]:
    row, blocks_C = at
    step_mask = blocks.mask_of(row, blocks_C)
    keys, values = (blocks.read(a, blocks_C) for a in (k, v))
    scores = _scores(_get(q, row), keys, step_mask, options)
    before = jax.tree.map(lambda a: _get(a, row), sums)
    product = lambda weights: _product(weights, values, step_mask, options)
    after = dense.add_to_sums(before, scores, product)
    put = lambda a, value: _set(a, value, row)
    return jax.tree.map(put, sums, after), None

  steps: Any = blocks.steps.q_P, blocks.steps.k_PC
  (out, largest, total), _ = jax.lax.scan(step, start, steps)
  total = jnp.maximum(total, 1e-37)
  out = blocks.of_queries(out / total[..., None]).astype(qkv[0].dtype)
  out = checkpoint_name(out, splash.NAME)
  lse = checkpoint_name(
    blocks.of_queries(jnp.log(total) + largest), splash.NAME
  )
  return out, (qkv, options, mask, out, lse)


def _backward(
  residuals: _Residuals, d_out: jax.Array
) -> tuple[Any, dense.AttentionOptions, None]:
  qkv, options, mask, out, lse = residuals
  blocks = _Blocks(qkv[0].shape, qkv[1].shape, mask, options)
  d_out = d_out.astype(jnp.float32)
  delta = (d_out * out.astype(jnp.float32)).sum(-1)
  rows = tuple(blocks.queries(a) for a in (qkv[0], lse, d_out, delta))
  k, v = blocks.keys(qkv[1]), blocks.keys(qkv[2])
  zeros = lambda a: jnp.zeros(a.shape, jnp.float32)
  start = zeros(rows[0]), zeros(k), zeros(v), jax.tree.map(zeros, options.bias)

  def step(sums: _Sums, at: tuple[jax.Array, jax.Array]) -> tuple[_Sums, None]:
    row, blocks_C = at
    step_mask = blocks.mask_of(row, blocks_C)
    q, lse, d_out, delta = (_get(a, row) for a in rows)

    def weigh(
      q: jax.Array, k: jax.Array, v: jax.Array, bias: dense.Bias | None
    ) -> tuple[jax.Array, jax.Array]:
      of_bias = dataclasses.replace(options, bias=bias)
      scores = _scores(q, k, step_mask, of_bias)
      lse_1 = jnp.maximum(lse, dense.NEVER / 2)[..., None]
      weights = jnp.exp(scores - lse_1)
      return _product(weights, v, step_mask, options), weights.sum(-1)

    keys, values = (blocks.read(a, blocks_C) for a in (k, v))
    new = jax.vjp(weigh, q, keys, values, options.bias)[1]((d_out, -delta))
    d_q, d_k, d_v, d_bias = sums
    d_q = _set(d_q, _get(d_q, row) + new[0], row)
    d_k, d_v = (
      blocks.add(a, b, blocks_C) for a, b in zip((d_k, d_v), new[1:3])
    )
    return (d_q, d_k, d_v, jax.tree.map(jnp.add, d_bias, new[3])), None

  steps: Any = blocks.steps.q_P, blocks.steps.k_PC
  (d_q, d_k, d_v, d_bias), _ = jax.lax.scan(step, start, steps)
  d_bias = jax.tree.map(lambda a, b: a.astype(b.dtype), d_bias, options.bias)
  d_qkv = blocks.of_queries(d_q), blocks.of_keys(d_k), blocks.of_keys(d_v)
  d_qkv = tuple(a.astype(b.dtype) for a, b in zip(d_qkv, qkv, strict=True))
  return d_qkv, dataclasses.replace(options, bias=d_bias, dropout=None), None


_attend.defvjp(_forward, _backward)
