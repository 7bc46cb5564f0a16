"""Softmax attention that never holds the whole T x S matrix.

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

from t2x.attention import blocks
from t2x.attention import mask as mask_lib

# Maps key index minus query index, (T, S) or (B, T, S), to a bias per head,
# (N, T, S) or (B, N, T, S).
Bias = Callable[[jax.Array], jax.Array]

# Maps a block's probabilities (B, K, G, T, S) and the indices of its queries,
# (T,) or (B, T), and of its keys to what is left of them.
Dropout = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

_MAX_KEYS = 2048  # Longer key ranges are cut.
NEVER = -1e30  # Finite: a query that sees no key must not become NaN.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What a score goes through before the softmax, and the block size.

  Attributes:
    kernel: `auto`, `flash` or `blocks`; see `kernels.attend`.
    scale: factor of the scores; None means 1 / sqrt(head_dim).
    soft_cap: scores become cap * tanh(score / cap) (Gemma 2, 2024).
    block: queries to a block, and keys where blocks are scanned; None chooses.
    runs: at most so many ranges of keys are told apart where order decides
      what blocks see; the blocks of a range run in a loop. None is no limit.
  """

  kernel: str = 'auto'
  scale: float | None = None
  soft_cap: float | None = None
  block: int | None = None
  runs: int | None = None


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  *,
  options: Options = Options(),
  bias: Bias | None = None,
  dropout: Dropout | None = None,
) -> jax.Array:
  """Returns softmax(scale q k^T + bias) v under `mask`.

  Args:
    q_BTNH: queries.
    k_BSKH: keys; query head n looks at key head n // (N / K).
    v_BSKH: values; their head dim may differ from the keys'.
    mask: what each query sees.
    options: scale, cap and block size.
    bias: added to the scores, computed per block from relative indices.
    dropout: applied to the probabilities of each block.

  Returns:
    (B, T, N, H) in the dtype of the queries; a query that sees no key gives 0.
  """
  out, _ = attend_part(
    q_BTNH,
    k_BSKH,
    v_BSKH,
    mask,
    options=options,
    bias=bias,
    dropout=dropout,
  )
  return out.astype(q_BTNH.dtype)


def attend_part(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  *,
  options: Options = Options(),
  bias: Bias | None = None,
  dropout: Dropout | None = None,
) -> tuple[jax.Array, jax.Array]:
  """As `attend`, for `merge` with the results of other keys.

  Returns:
    float32 (B, T, N, H), and the log-sum-exp of the scores, (B, T, N).
  """
  # Up to some length the backward pass keeps what it would make again.
  kept = k_BSKH.shape[1] <= blocks.KEEP_KEYS or q_BTNH.shape[1] == 1
  fn = functools.partial(
    _attend_rows, options=options, bias=bias, dropout=dropout
  )
  cut = dict(block=options.block, runs=options.runs, kept=kept)
  return blocks.apply(fn, (q_BTNH,), k_BSKH, v_BSKH, mask, **cut)


def weighted(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  lse_BTN: jax.Array,
  mask: mask_lib.Mask,
  *,
  options: Options = Options(),
  bias: Bias | None = None,
  dropout: Dropout | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Returns what these keys add to attention whose log-sum-exp is known.

  With p = exp(scores - lse) and m what dropout makes of ones, the sums over
  keys of m p v, and of p. Their gradient for the cotangents dO and -<dO, O> is
  that of attention (Dao et al., 2022), whichever keys are elsewhere.

  Args:
    q_BTNH: queries.
    k_BSKH: some of the keys.
    v_BSKH: their values.
    lse_BTN: log-sum-exp of the scores of all keys.
    mask: what each query sees of these keys.
    options: as for `attend`.
    bias: as for `attend`.
    dropout: as for `attend`.

  Returns:
    float32 sums (B, T, N, H) and (B, T, N).
  """
  fn = functools.partial(
    _weigh_rows, options=options, bias=bias, dropout=dropout
  )
  queries = q_BTNH, lse_BTN
  cut = dict(block=options.block, runs=options.runs, kept=False)
  return blocks.apply(fn, queries, k_BSKH, v_BSKH, mask, **cut)


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
  queries, k_BSKH, v_BSKH, *, mask, options, rows, keys, bias, dropout
):
  """One block of queries over the keys in reach, piece by piece."""
  (q_BTKGH,) = queries
  total: Any = None
  for start in range(keys.start, keys.stop, _MAX_KEYS):
    part = slice(start, min(start + _MAX_KEYS, keys.stop))
    scores = _scores(q_BTKGH, k_BSKH[:, part], mask, options, rows, part, bias)
    drop = functools.partial(
      dropped, dropout=dropout, mask=mask, rows=rows, keys=part
    )
    result = _softmax_product(scores, v_BSKH[:, part], drop)
    total = result if total is None else merge(total, result)
  return total


def _weigh_rows(
  queries, k_BSKH, v_BSKH, *, mask, options, rows, keys, bias, dropout
):
  """One block of queries over the keys in reach, whose weights are known."""
  q_BTKGH, lse_BTKG = queries
  lse_BKGT = lse_BTKG.transpose(0, 2, 3, 1)
  out, total = jnp.float32(0.0), jnp.float32(0.0)
  for start in range(keys.start, keys.stop, _MAX_KEYS):
    part = slice(start, min(start + _MAX_KEYS, keys.stop))
    scores = _scores(q_BTKGH, k_BSKH[:, part], mask, options, rows, part, bias)
    weights = jnp.exp(scores - jnp.maximum(lse_BKGT, NEVER / 2)[..., None])
    total = total + weights.sum(-1).transpose(0, 3, 1, 2)
    drop = functools.partial(
      dropped, dropout=dropout, mask=mask, rows=rows, keys=part
    )
    out = out + _product(weights, v_BSKH[:, part], drop)
  return out, total


def dropped(weights_BKGTS, dropout, mask, rows, keys):
  """Returns what dropout leaves of a block's probabilities."""
  if dropout is None:
    return weights_BKGTS
  q_index, k_index = (
    mask_lib.q_index_of(mask, rows),
    mask_lib.k_index_of(mask, keys),
  )
  return dropout(weights_BKGTS, q_index_BT=q_index, k_index_BS=k_index)


def _scores(q_BTKGH, k_BSKH, mask, options, rows, keys, bias):
  """Returns float32 scores (B, K, G, T, S), unseen keys at `NEVER`."""
  scores = jnp.einsum(
    'BTKGH,BSKH->BKGTS',
    q_BTKGH * scale_of(options, q_BTKGH),
    k_BSKH,
    preferred_element_type=jnp.float32,
  )
  return shaped(scores, mask, options, rows, keys, bias)


def shaped(scores, mask, options, rows, keys, bias):
  """Caps a block's products (B, K, G, T, S), adds a bias, hides the unseen."""
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
  return jnp.where(seen[:, None, None], scores, NEVER)


def _softmax_product(scores_BKGTS, v_BSKH, drop):
  """Returns (out (B, T, K, G, H), lse (B, T, K, G)), float32."""
  largest = jax.lax.stop_gradient(scores_BKGTS.max(-1, keepdims=True))
  # Where nothing is seen `largest` is NEVER: every weight must become 0.
  weights = jnp.exp(scores_BKGTS - jnp.maximum(largest, NEVER / 2))
  total_BKGT = weights.sum(-1)
  out = _product(weights, v_BSKH, drop)
  safe_BKGT = jnp.maximum(total_BKGT, 1e-37)
  lse_BKGT = jnp.log(safe_BKGT) + largest[..., 0]
  to_BTKG = lambda x: x.transpose(0, 3, 1, 2)
  return out / to_BTKG(safe_BKGT)[..., None], to_BTKG(lse_BKGT)


def no_sums(shape: tuple[int, ...], dim: int):
  """Returns what `added` goes on from before any key was seen.

  Args:
    shape: of the queries, (..., T).
    dim: H of the values.
  """
  return (
    jnp.zeros((*shape, dim), jnp.float32),
    jnp.full(shape, NEVER, jnp.float32),
    jnp.zeros(shape, jnp.float32),
  )


def added(sums, scores, product: Callable[[jax.Array], jax.Array]):
  """Adds some keys to running sums (Milakov and Gimelshein, 2018).

  Args:
    sums: weighted values (..., T, H) and weights (..., T) relative to the
      largest score so far, which comes between them.
    scores: of these keys, (..., T, S).
    product: maps their weights (..., T, S) to weighted values (..., T, H).
  """
  out, largest, total = sums
  new = jnp.maximum(largest, scores.max(-1))
  # Where nothing is seen `new` is NEVER: every weight must become 0.
  weights = jnp.exp(scores - jnp.maximum(new, NEVER / 2)[..., None])
  shrink = jnp.exp(largest - new)
  total = total * shrink + weights.sum(-1)
  return out * shrink[..., None] + product(weights), new, total


def _product(weights_BKGTS, v_BSKH, drop):
  weights_BKGTS = drop(weights_BKGTS)
  return jnp.einsum(
    'BKGTS,BSKH->BTKGH',
    weights_BKGTS.astype(v_BSKH.dtype),
    v_BSKH,
    preferred_element_type=jnp.float32,
  )


def scale_of(options: Options, q: jax.Array) -> float:
  return q.shape[-1] ** -0.5 if options.scale is None else options.scale
