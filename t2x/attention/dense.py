"""Softmax attention in blocks that never hold the whole T x S matrix.

Each block of queries meets only the range of keys that its mask can reach, so
a causal mask costs half and a sliding window costs its width. Ranges longer
than a limit are cut into pieces whose results merge by their log-sum-exp
(Rabe and Staats, 2021; Milakov and Gimelshein, 2018).

Shape suffixes: B batch, T query position, S key position, N query heads, K
key/value heads, G query heads per key/value head, H head dim.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from t2x.attention import mask as mask_lib

# Maps key index minus query index, (T, S) or (B, T, S), to a bias per head,
# (N, T, S) or (B, N, T, S).
Bias = Callable[[jax.Array], jax.Array]

_MAX_BLOCKS = 16
_MAX_KEYS = 2048  # Longer key ranges are cut.
_KEEP_KEYS = 1024  # Up to here the backward pass keeps the probabilities.
_NEVER = -1e30  # Finite: a query that sees no key must not become NaN.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What a score goes through before the softmax, and the block size.

  Attributes:
    scale: factor of the scores; None means 1 / sqrt(head_dim).
    soft_cap: scores become cap * tanh(score / cap) (Gemma 2, 2024).
    block: queries to a block; None chooses.
  """

  scale: float | None = None
  soft_cap: float | None = None
  block: int | None = None


def reference(q_BTNH, k_BSKH, v_BSKH, mask, *, options=Options(), bias=None):
  """The oracle: materialises every score in float32. For tests."""
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  N, K = q_BTNH.shape[2], k_BSKH.shape[2]
  q, k, v = (a.astype(jnp.float32) for a in (q_BTNH, k_BSKH, v_BSKH))
  k, v = (jnp.repeat(a, N // K, axis=2) for a in (k, v))
  scores = jnp.einsum('btnh,bsnh->bnts', q, k) * _scale(options, q)
  if options.soft_cap is not None:
    scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
  whole = slice(0, T), slice(0, S)
  if bias is not None:
    values = bias(mask_lib.relative(mask, *whole))
    scores = scores + (values if values.ndim == 4 else values[None])
  seen = mask_lib.visible(mask, *whole)
  if seen is not None:
    seen = seen[None, None] if seen.ndim == 2 else seen[:, None]
    scores = jnp.where(seen, scores, -jnp.inf)
  probs = jax.nn.softmax(scores, axis=-1)
  probs = jnp.where(jnp.isnan(probs), 0.0, probs)
  return jnp.einsum('bnts,bsnh->btnh', probs, v).astype(q_BTNH.dtype)


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  *,
  options: Options = Options(),
  bias: Bias | None = None,
  dropout: Callable[[jax.Array, int], jax.Array] | None = None,
  return_lse: bool = False,
):
  """Returns softmax(scale q k^T + bias) v under `mask`.

  Args:
    q_BTNH: queries.
    k_BSKH: keys; query head n looks at key head n // (N / K).
    v_BSKH: values; their head dim may differ from the keys'.
    mask: what each query sees.
    options: scale, cap and block size.
    bias: added to the scores, computed per block from relative indices.
    dropout: applied to a block's probabilities (B, K, G, T, S); its second
      argument is the number of the block.
    return_lse: also return the log-sum-exp of the scores, (B, T, N) float32.

  Returns:
    (B, T, N, H) in the dtype of the queries; a query that sees no key gives 0.
  """
  B, T, N, _ = q_BTNH.shape
  S, K = k_BSKH.shape[1:3]
  q_BTKGH = q_BTNH.reshape(B, T, K, N // K, -1)
  block = options.block or _block_size(T, mask)
  outs, lses = [], []
  for start in range(0, T, block):
    rows = slice(start, min(start + block, T))
    keys = slice(*mask_lib.key_range(mask, rows.start, rows.stop, S))
    run = functools.partial(
      _attend_rows,
      mask=mask,
      options=options,
      rows=rows,
      keys=keys,
      bias=bias,
      dropout=dropout,
    )
    if S > _KEEP_KEYS and T > 1:
      run = jax.checkpoint(run)
    out, lse = run(q_BTKGH[:, rows], k_BSKH, v_BSKH)
    outs.append(out)
    lses.append(lse)
  out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)
  out = out.reshape(B, T, N, -1).astype(q_BTNH.dtype)
  if not return_lse:
    return out
  return out, jnp.concatenate(lses, axis=1).reshape(B, T, N)


def merge(first, second):
  """Joins attention over two disjoint sets of keys.

  Args:
    first: (out, lse) with shapes (..., H) and (...).
    second: the same over other keys.

  Returns:
    (out, lse) over both, float32.
  """
  (out_a, lse_a), (out_b, lse_b) = first, second
  lse = jnp.logaddexp(lse_a, lse_b)
  weigh = lambda out, part: out * jnp.exp(part - lse)[..., None]
  return weigh(out_a, lse_a) + weigh(out_b, lse_b), lse


def _attend_rows(
  q_BTKGH, k_BSKH, v_BSKH, *, mask, options, rows, keys, bias, dropout
):
  """One block of queries over the keys in reach, piece by piece."""
  total: Any = None
  for start in range(keys.start, keys.stop, _MAX_KEYS):
    part = slice(start, min(start + _MAX_KEYS, keys.stop))
    scores = _scores(q_BTKGH, k_BSKH[:, part], mask, options, rows, part, bias)
    drop = dropout and functools.partial(
      dropout, block=rows.start * k_BSKH.shape[1] + part.start
    )
    result = _softmax_product(scores, v_BSKH[:, part], drop)
    total = result if total is None else merge(total, result)
  return total


def _scores(q_BTKGH, k_BSKH, mask, options, rows, keys, bias):
  """Returns float32 scores (B, K, G, T, S), unseen keys at `_NEVER`."""
  scores = jnp.einsum(
    'BTKGH,BSKH->BKGTS',
    q_BTKGH * _scale(options, q_BTKGH),
    k_BSKH,
    preferred_element_type=jnp.float32,
  )
  if options.soft_cap is not None:
    scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
  if bias is not None:
    values = bias(mask_lib.relative(mask, rows, keys))
    values = values if values.ndim == 4 else values[None]
    scores = scores + values.reshape(
      values.shape[0], *scores.shape[1:3], *values.shape[2:]
    ).astype(jnp.float32)
  seen = mask_lib.visible(mask, rows, keys)
  if seen is None:
    return scores
  seen = seen[None] if seen.ndim == 2 else seen
  return jnp.where(seen[:, None, None], scores, _NEVER)


def _softmax_product(scores_BKGTS, v_BSKH, dropout):
  """Returns (out (B, T, K, G, H), lse (B, T, K, G)), float32."""
  largest = jax.lax.stop_gradient(scores_BKGTS.max(-1, keepdims=True))
  # Where nothing is seen `largest` is _NEVER: every weight must become 0.
  weights = jnp.exp(scores_BKGTS - jnp.maximum(largest, _NEVER / 2))
  total_BKGT = weights.sum(-1)
  if dropout is not None:
    weights = dropout(weights)
  out = jnp.einsum(
    'BKGTS,BSKH->BTKGH',
    weights.astype(v_BSKH.dtype),
    v_BSKH,
    preferred_element_type=jnp.float32,
  )
  safe_BKGT = jnp.maximum(total_BKGT, 1e-37)
  lse_BKGT = jnp.log(safe_BKGT) + largest[..., 0]
  to_BTKG = lambda x: x.transpose(0, 3, 1, 2)
  return out / to_BTKG(safe_BKGT)[..., None], to_BTKG(lse_BKGT)


def _scale(options: Options, q: jax.Array) -> float:
  return q.shape[-1] ** -0.5 if options.scale is None else options.scale


def _block_size(num_queries: int, mask: mask_lib.Mask) -> int:
  """Small blocks skip more; many blocks compile slowly."""
  if not (mask.causal or mask.window) and num_queries <= _KEEP_KEYS:
    return num_queries
  least = -(-num_queries // _MAX_BLOCKS)
  return max(64, -(-least // 64) * 64)
