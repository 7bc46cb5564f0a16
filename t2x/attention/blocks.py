"""Runs attention block by block, over the keys that each block can reach.

Shape suffixes: B batch, T query position, S key position, N query heads, K
key/value heads, G query heads per key/value head, H head dim.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp

from t2x.attention import mask as mask_lib
from t2x.attention import pairs as pairs_lib

_MAX_BLOCKS = 16
# Up to this number of keys the backward pass keeps the probabilities.
KEEP_KEYS = 512

# Positions of a block of queries, and those of the keys in its reach.
Span = tuple[slice, slice]
_Result = tuple[jax.Array, jax.Array]


def apply(
  fn: Callable[..., _Result],
  queries: Sequence[jax.Array],
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  *,
  block: int | None,
  runs: int | None,
  kept: bool,
) -> _Result:
  """Applies `fn` to each block of queries and concatenates the results.

  Args:
    fn: function of a list of the block's `queries`, (B, T, K, G, ...), of keys,
      values, and by name the mask, the block's positions `rows` and the
      positions `keys` in its reach; it returns float32 (B, T, K, G, H) and
      (B, T, K, G).
    queries: arrays (B, T, N, ...) that are cut into blocks.
    k_BSKH: keys.
    v_BSKH: values.
    mask: description of the keys that each query sees.
    block: number of queries in a block; None chooses.
    runs: the limit of `dense.AttentionOptions`.
    kept: whether the forward pass keeps what the backward pass needs; else it
      is computed again.

  Returns:
    float32 (B, T, N, H) and (B, T, N).
  """
  B, T, N = queries[0].shape[:3]
  S, K = k_BSKH.shape[1:3]
  mask = mask_lib.placed(mask, T, S)
  grouped = [a.reshape(B, T, K, N // K, *a.shape[3:]) for a in queries]
  outs, sums = [], []
  for blocks in _runs(spans(T, S, mask, block, runs)):
    run = functools.partial(fn, keys=blocks[0][1])
    out, total = _over_run(run, grouped, k_BSKH, v_BSKH, mask, blocks, kept)
    outs.append(out)
    sums.append(total)
  out = outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)
  total = jnp.concatenate(sums, axis=1)
  return out.reshape(B, T, N, -1), total.reshape(B, T, N)


def _runs(blocks: Iterable[Span]) -> list[list[Span]]:
  """Groups neighbouring blocks of one size that reach the same keys."""
  alike = lambda block: (block[1], block[0].stop - block[0].start)
  return [list(run) for _, run in itertools.groupby(blocks, alike)]


def _over_run(
  fn: Callable[..., _Result],
  queries: list[jax.Array],
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  blocks: list[Span],
  kept: bool,
) -> _Result:
  """Applies `fn` to each block of a run and concatenates the results.

  The blocks run in a loop, since XLA would hold the scores of many unrolled
  blocks at a time.
  """
  rows, num = slice(blocks[0][0].start, blocks[-1][0].stop), len(blocks)

  def run(
    queries: list[jax.Array], mask: mask_lib.Mask, rows: slice
  ) -> _Result:
    one = functools.partial(fn, mask=mask, rows=rows)
    return (one if kept else jax.checkpoint(one))(queries, k_BSKH, v_BSKH)

  if num == 1:
    return run([a[:, rows] for a in queries], mask, rows)
  block = slice(0, (rows.stop - rows.start) // num)
  cut = lambda a: jnp.moveaxis(
    a[:, rows].reshape(a.shape[0], num, block.stop, *a.shape[2:]), 1, 0
  )
  index_BT = jnp.atleast_2d(mask_lib.q_index_of(mask, slice(0, rows.stop)))

  def body(part: tuple[Any, ...]) -> _Result:
    queries, index_BT, segments_BT, ranks_BT = part
    block_mask = dataclasses.replace(
      mask,
      q_index_BT=index_BT,
      q_segments_BT=segments_BT,
      q_ranks_BT=ranks_BT,
    )
    return run(queries, block_mask, block)

  parts = (queries, index_BT, mask.q_segments_BT, mask.q_ranks_BT)
  results = jax.lax.map(body, jax.tree.map(cut, parts))
  join = lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1, *a.shape[3:])
  return jax.tree.map(join, results)


def spans(
  num_queries: int,
  num_keys: int,
  mask: mask_lib.Mask,
  block: int | None,
  runs: int | None,
) -> Iterator[Span]:
  """Yields each block of queries with the range of keys in its reach.

  Args:
    num_queries: number of queries in a row.
    num_keys: number of keys in a row.
    mask: description of the keys that each query sees.
    block: number of queries in a block; None chooses.
    runs: the limit of `dense.AttentionOptions`.
  """
  block = block or _block_size(num_queries, mask)
  num = -(-num_queries // block)
  run = block * -(-num // (runs or num))
  for start in range(0, num_queries, block):
    first = start // run * run
    last = min(first + run, num_queries)
    reach = mask_lib.key_range(mask, first, last, num_keys)
    yield slice(start, min(start + block, num_queries)), slice(*reach)


def are_scanned(
  mask: mask_lib.Mask, num_queries: int, num_keys: int, block: int | None
) -> bool:
  """Whether `scanned` computes this attention rather than `apply`.

  It does for long sequences, whose scores are not kept for the backward pass,
  and for patterns with gaps.

  Args:
    mask: description of the keys that each query sees.
    num_queries: number of queries in a row.
    num_keys: number of keys in a row.
    block: number of queries in a block; None chooses.
  """
  if not mask.has_static_order or mask.start is not None:
    return False
  if mask.q_ranks_BT is not None:
    return False
  if num_keys > KEEP_KEYS:
    return True
  steps = pairs_lib.plan(mask.pattern, num_queries, num_keys, block)
  whole = _pairs_of(spans(num_queries, num_keys, mask, block, None))
  return 2 * steps.pairs < whole


def num_pairs(
  mask: mask_lib.Mask,
  num_queries: int,
  num_keys: int,
  block: int | None,
  runs: int | None = None,
) -> int:
  """Returns the number of pairs of a query and a key that are computed.

  Hidden pairs in the blocks that are computed count too.

  Args:
    mask: description of the keys that each query sees.
    num_queries: number of queries in a row.
    num_keys: number of keys in a row.
    block: number of queries in a block; None chooses.
    runs: the limit of `dense.AttentionOptions`.
  """
  if runs is None and are_scanned(mask, num_queries, num_keys, block):
    return pairs_lib.plan(mask.pattern, num_queries, num_keys, block).pairs
  return _pairs_of(spans(num_queries, num_keys, mask, block, runs))


def _pairs_of(blocks: Iterable[Span]) -> int:
  return sum((q.stop - q.start) * (k.stop - k.start) for q, k in blocks)


def _block_size(num_queries: int, mask: mask_lib.Mask) -> int:
  """Returns the number of queries in a block.

  Small blocks skip more keys, but many blocks take long to compile.
  """
  if not mask.is_ordered and num_queries <= KEEP_KEYS:
    return num_queries
  least = -(-num_queries // _MAX_BLOCKS)
  return max(64, -(-least // 64) * 64)
