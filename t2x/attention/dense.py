"""Softmax attention in blocks, without the whole T x S matrix of scores.

Each block of queries is multiplied only with the range of keys that its mask
can reach, so a causal mask costs half and a sliding window costs its width.
Ranges longer than a limit are cut into pieces whose results are merged by their
log-sum-exp (Rabe and Staats, 2021; Milakov and Gimelshein, 2018).

Shape suffixes: B batch, T query position, S key position, N query heads, K
key/value heads, G query heads per key/value head, H head dim.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any
from typing import Protocol

import jax
import jax.numpy as jnp

from t2x.attention import blocks
from t2x.attention import mask as mask_lib

# Maps key index minus query index, (T, S) or (B, T, S), to a bias per head,
# (N, T, S) or (B, N, T, S).
Bias = Callable[[jax.Array], jax.Array]

# The output (..., H) for some of the keys and the log-sum-exp of their scores
# (...), float32.
Part = tuple[jax.Array, jax.Array]

# Running sums over keys: weighted values (..., T, H), the largest score so far
# (..., T), and the sum of the weights (..., T), both sums relative to it.
Sums = tuple[jax.Array, jax.Array, jax.Array]

_MAX_KEYS = 2048  # Longer key ranges are cut.
NEVER = -1e30  # Finite: a query that sees no key must not become NaN.


def _static(default: Any) -> Any:
  """Returns a field that a compiled program has as a constant."""
  return dataclasses.field(default=default, metadata={'static': True})


class Dropout(Protocol):
  """Dropout of attention probabilities; a pytree, `dropout.OfScores`."""

  def __call__(
    self, probs_BKGTS: jax.Array, q_index_BT: jax.Array, k_index_BS: jax.Array
  ) -> jax.Array:
    """Returns the probabilities of a block with dropped ones set to zero.

    Args:
      probs_BKGTS: probabilities.
      q_index_BT: indices of the queries in their rows, (T,) or (B, T).
      k_index_BS: indices of the keys in their rows, (S,) or (B, S).
    """
    ...

  def of_heads(self, heads_KG: jax.Array) -> 'Dropout':
    """Returns the dropout of some of the heads, given by their numbers."""
    ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionOptions:
  """What is done to the scores, and how attention is computed; a pytree.

  Attributes:
    bias: function that gives the bias of a block's scores from relative
      indices, a pytree of arrays; None adds none.
    dropout: dropout of the probabilities of each block; None drops none.
    kernel: `auto`, `flash` or `blocks`; see `kernels.attend`.
    scale: factor of the scores; None means 1 / sqrt(head_dim).
    soft_cap: bound of the scores, which become cap * tanh(score / cap) (Gemma
      2, 2024); None leaves them as they are.
    block: number of queries in a block, and of keys where blocks are scanned;
      None chooses.
    runs: largest number of different key ranges; neighbouring blocks of queries
      share a range, and the blocks of one range run in a loop. None gives each
      block its own range.
  """

  bias: Bias | None = None
  dropout: Dropout | None = None
  kernel: str = _static('auto')
  scale: float | None = _static(None)
  soft_cap: float | None = _static(None)
  block: int | None = _static(None)
  runs: int | None = _static(None)


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  options: AttentionOptions = AttentionOptions(),
) -> jax.Array:
  """Returns softmax(scale q k^T + bias) v under `mask`.

  Args:
    q_BTNH: queries.
    k_BSKH: keys; query head n attends to key head n // (N / K).
    v_BSKH: values; their head dim may differ from the keys'.
    mask: description of the keys that each query sees.
    options: bias, dropout, scale, cap and block size.

  Returns:
    (B, T, N, H) in the dtype of the queries; 0 for a query that sees no key.
  """
  out, _ = attend_part(q_BTNH, k_BSKH, v_BSKH, mask, options)
  return out.astype(q_BTNH.dtype)


def attend_part(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  options: AttentionOptions = AttentionOptions(),
) -> Part:
  """Attends to some of the keys, to `merge` with the results of the others.

  Arguments as for `attend`.

  Returns:
    float32 output (B, T, N, H), and the log-sum-exp of the scores, (B, T, N).
  """
  # Up to some length the backward pass keeps the probabilities.
  kept = k_BSKH.shape[1] <= blocks.KEEP_KEYS or q_BTNH.shape[1] == 1
  fn = functools.partial(_attend_rows, options=options)
  return blocks.apply(
    fn,
    (q_BTNH,),
    k_BSKH,
    v_BSKH,
    mask,
    block=options.block,
    runs=options.runs,
    kept=kept,
  )


def weighted(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  lse_BTN: jax.Array,
  mask: mask_lib.Mask,
  options: AttentionOptions = AttentionOptions(),
) -> Part:
  """Sums weights and weighted values of some keys, given the log-sum-exp.

  With p = exp(scores - lse) and m the dropout mask (0 or 1 / (1 - rate)), these
  are the sums over these keys of m p v, and of p. Their gradient for the
  cotangents dO and -<dO, O> is the gradient of attention (Dao et al., 2022),
  whatever the other keys are.

  Args:
    q_BTNH: queries.
    k_BSKH: some of the keys.
    v_BSKH: values of these keys.
    lse_BTN: log-sum-exp of the scores of all keys.
    mask: description of the keys, among these, that each query sees.
    options: the options of `attend`.

  Returns:
    float32 sums (B, T, N, H) and (B, T, N).
  """
  fn = functools.partial(_weigh_rows, options=options)
  return blocks.apply(
    fn,
    (q_BTNH, lse_BTN),
    k_BSKH,
    v_BSKH,
    mask,
    block=options.block,
    runs=options.runs,
    kept=False,
  )


def merge(first: Part, second: Part) -> Part:
  """Merges attention over two disjoint sets of keys.

  Args:
    first: output (..., H) and log-sum-exp (...) of one set of keys.
    second: output and log-sum-exp of the other set.

  Returns:
    Output and log-sum-exp of both sets, float32.
  """
  (out_a, lse_a), (out_b, lse_b) = first, second
  lse = jnp.logaddexp(lse_a, lse_b)
  weigh = lambda out, part: out * jnp.exp(part - lse)[..., None]
  return weigh(out_a, lse_a) + weigh(out_b, lse_b), lse


def _attend_rows(
  queries: list[jax.Array],
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  mask: mask_lib.Mask,
  options: AttentionOptions,
  rows: slice,
  keys: slice,
) -> Part:
  """Attends from one block of queries to the keys in reach, piece by piece."""
  (q_BTKGH,) = queries
  total: Any = None
  for start in range(keys.start, keys.stop, _MAX_KEYS):
    part = slice(start, min(start + _MAX_KEYS, keys.stop))
    scores = _scores(q_BTKGH, k_BSKH[:, part], mask, options, rows, part)
    drop = functools.partial(
      apply_dropout, options=options, mask=mask, rows=rows, keys=part
    )
    result = _softmax_product(scores, v_BSKH[:, part], drop)
    total = result if total is None else merge(total, result)
  return total


def _weigh_rows(
  queries: list[jax.Array],
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  *,
  mask: mask_lib.Mask,
  options: AttentionOptions,
  rows: slice,
  keys: slice,
) -> Part:
  """As `weighted`, for one block of queries and the keys in its reach."""
  q_BTKGH, lse_BTKG = queries
  lse_BKGT = lse_BTKG.transpose(0, 2, 3, 1)
  out, total = jnp.float32(0.0), jnp.float32(0.0)
  for start in range(keys.start, keys.stop, _MAX_KEYS):
    part = slice(start, min(start + _MAX_KEYS, keys.stop))
    scores = _scores(q_BTKGH, k_BSKH[:, part], mask, options, rows, part)
    weights = jnp.exp(scores - jnp.maximum(lse_BKGT, NEVER / 2)[..., None])
    total = total + weights.sum(-1).transpose(0, 3, 1, 2)
    drop = functools.partial(
      apply_dropout, options=options, mask=mask, rows=rows, keys=part
    )
    out = out + _product(weights, v_BSKH[:, part], drop)
  return out, total


def apply_dropout(
  weights_BKGTS: jax.Array,
  options: AttentionOptions,
  mask: mask_lib.Mask,
  rows: slice,
  keys: slice,
) -> jax.Array:
  """Applies dropout, if any, to the probabilities of a block.

  Args:
    weights_BKGTS: probabilities.
    options: options that give the dropout.
    mask: mask of the whole row, which gives the indices of its tokens.
    rows: positions of the block's queries.
    keys: positions of the block's keys.
  """
  if options.dropout is None:
    return weights_BKGTS
  q_index, k_index = (
    mask_lib.q_index_of(mask, rows),
    mask_lib.k_index_of(mask, keys),
  )
  return options.dropout(weights_BKGTS, q_index_BT=q_index, k_index_BS=k_index)


def _scores(
  q_BTKGH: jax.Array,
  k_BSKH: jax.Array,
  mask: mask_lib.Mask,
  options: AttentionOptions,
  rows: slice,
  keys: slice,
) -> jax.Array:
  """Returns float32 scores (B, K, G, T, S), unseen keys at `NEVER`."""
  scores = jnp.einsum(
    'BTKGH,BSKH->BKGTS',
    q_BTKGH * scale_of(options, q_BTKGH),
    k_BSKH,
    preferred_element_type=jnp.float32,
  )
  return finish_scores(scores, mask, options, rows, keys)


def finish_scores(
  scores: jax.Array,
  mask: mask_lib.Mask,
  options: AttentionOptions,
  rows: slice,
  keys: slice,
) -> jax.Array:
  """Caps the scores of a block, adds the bias, and masks hidden keys.

  Args:
    scores: scaled products of queries and keys, (B, K, G, T, S), float32.
    mask: mask of the whole row.
    options: options that give the cap and the bias.
    rows: positions of the block's queries.
    keys: positions of the block's keys.

  Returns:
    The scores, `NEVER` where the key is hidden.
  """
  if options.soft_cap is not None:
    scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
  if options.bias is not None:
    values = options.bias(mask_lib.relative(mask, rows, keys))
    values = values if values.ndim == 4 else values[None]
    scores = scores + values.reshape(
      values.shape[0], *scores.shape[1:3], *values.shape[2:]
    ).astype(jnp.float32)
  seen = mask_lib.visible(mask, rows, keys)
  if seen is None:
    return scores
  seen = seen[None] if seen.ndim == 2 else seen
  return jnp.where(seen[:, None, None], scores, NEVER)


def _softmax_product(
  scores_BKGTS: jax.Array,
  v_BSKH: jax.Array,
  drop: Callable[[jax.Array], jax.Array],
) -> Part:
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


def empty_sums(shape: tuple[int, ...], dim: int) -> Sums:
  """Returns the running sums over no keys, from which `add_to_sums` starts.

  Args:
    shape: shape of the queries without their head dim, (..., T).
    dim: head dim H of the values.
  """
  return (
    jnp.zeros((*shape, dim), jnp.float32),
    jnp.full(shape, NEVER, jnp.float32),
    jnp.zeros(shape, jnp.float32),
  )


def add_to_sums(
  sums: Sums, scores: jax.Array, product: Callable[[jax.Array], jax.Array]
) -> Sums:
  """Adds some keys to running sums (Milakov and Gimelshein, 2018).

  Args:
    sums: sums over the keys so far.
    scores: scores of these keys, (..., T, S).
    product: function from their weights (..., T, S) to the weighted sum of
      their values (..., T, H).

  Returns:
    Sums over the keys so far and these.
  """
  out, largest, total = sums
  new = jnp.maximum(largest, scores.max(-1))
  # Where nothing is seen `new` is NEVER: every weight must become 0.
  weights = jnp.exp(scores - jnp.maximum(new, NEVER / 2)[..., None])
  shrink = jnp.exp(largest - new)
  total = total * shrink + weights.sum(-1)
  return out * shrink[..., None] + product(weights), new, total


def _product(
  weights_BKGTS: jax.Array,
  v_BSKH: jax.Array,
  drop: Callable[[jax.Array], jax.Array],
) -> jax.Array:
  weights_BKGTS = drop(weights_BKGTS)
  return jnp.einsum(
    'BKGTS,BSKH->BTKGH',
    weights_BKGTS.astype(v_BSKH.dtype),
    v_BSKH,
    preferred_element_type=jnp.float32,
  )


def scale_of(options: AttentionOptions, q: jax.Array) -> float:
  """Returns the factor of the scores for queries (..., H)."""
  return q.shape[-1] ** -0.5 if options.scale is None else options.scale
