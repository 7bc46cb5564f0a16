"""Segment memory: keys and values of the rows before (Dai et al., 2019).

Row b of a step goes on where row b of the step before ended, and sees the last
tokens of its document there. What is remembered has no gradient.

Shape suffixes: B batch, M tokens that are remembered, T tokens of a row.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from t2x.attention import mask as mask_lib
from t2x.parallel import sharding

NAME = 'memory'
SEGMENTS = 'memory_segments'  # In a batch: 1 where a row sees it, else -1.
CONTINUES = 'continues'  # In a batch: 1 where a row goes on with a document.


def empty(model: Any, rows: int, length: int) -> dict[str, Any]:
  """Returns the memory of nothing.

  Args:
    model: with one stack.
    rows: of a batch.
    length: tokens that are remembered.
  """
  return {
    'layers': model.tower.empty_memory(rows, length),
    'segments': jnp.full((rows, length), -1, jnp.int32),
  }


def like(shapes: dict[str, Any]) -> dict[str, Any]:
  """Returns the memory of nothing of the same shapes."""
  return shown_if(False, jax.tree.map(jnp.zeros_like, shapes))


def shown_if(condition: Any, memory: dict[str, Any]) -> dict[str, Any]:
  """Returns a memory of which nothing is seen unless `condition` holds.

  Args:
    condition: of all rows, or of each (B, 1).
    memory: of the rows before.
  """
  segments_BM = jnp.where(condition, memory['segments'], -1)
  return {**memory, 'segments': segments_BM}


def shardings(memory: dict[str, Any], mesh: Any, rules: sharding.Rules) -> Any:
  """Returns how a mesh splits a memory: by rows and by heads.

  Args:
    memory: arrays or shapes.
    mesh: of devices, or of sizes alone.
    rules: logical axis -> mesh axes.
  """

  def of(leaf):
    spec = sharding.to_spec(
      _axes(leaf), rules, shape=leaf.shape, mesh=mesh, name='memory'
    )
    return NamedSharding(mesh, spec)

  return jax.tree.map(of, memory)


def _axes(leaf) -> tuple[str | None, ...]:
  """Those of (layers,) B, M, K, H; of the segments B, M."""
  axes = ('batch', None, 'kv_heads', None)[: leaf.ndim]
  return (None,) * (leaf.ndim - len(axes)) + axes


def seen(batch: dict[str, jax.Array], memory: dict[str, Any]):
  """Returns a batch that knows what of a memory each row sees.

  Raises:
    ValueError: it does not say which rows go on, or has what no memory knows.
  """
  if batch.get(CONTINUES) is None:
    raise ValueError(
      f'A memory of the rows before, and no {CONTINUES!r} (B, 1) that says '
      'which rows go on with their document. Give 1 or 0 for each.'
    )
  for name in ('prefix_ends', 'token_types'):
    if batch.get(name) is not None:
      raise ValueError(
        f'{name!r} beside a memory of the rows before, which keeps none. '
        'Leave one of them out.'
      )
  if batch.get('segments') is None:
    ones_BT = jnp.ones(batch['inputs'].shape, jnp.int32)
    batch = {**batch, 'segments': ones_BT}
  continues_B1 = batch[CONTINUES][:, :1] > 0
  return {**batch, SEGMENTS: shown_if(continues_B1, memory)['segments']}


def kept(batch: dict[str, jax.Array], layers: Any) -> dict[str, Any]:
  """Returns the memory for the next rows.

  Args:
    batch: what `seen` returned.
    layers: keys and values of each layer.
  """
  segments_BT, before_BM = batch['segments'], batch[SEGMENTS]
  length = before_BM.shape[1]
  # Of the row's own numbering the last document's, which is the next one's 1.
  last_B1 = segments_BT[:, -1:]
  both = jnp.concatenate([before_BM, segments_BT], axis=1)[:, -length:]
  stays = (both == last_B1) & (last_B1 > 0)
  memory = {'layers': layers, 'segments': jnp.where(stays, 1, -1)}
  return jax.tree.map(lambda a: sharding.constrain(a, *_axes(a)), memory)


def mask_of(batch: dict[str, jax.Array], mask: mask_lib.Mask) -> mask_lib.Mask:
  """Returns a mask whose keys are those of memory, then the row's own."""
  before_BM, length = batch[SEGMENTS], batch['segments'].shape[1]
  place_T = jnp.arange(length)[None]
  q_place = place_T
  if mask.q_index_BT is not None:
    q_place = mask.q_index_BT
  join = lambda a, b: jnp.concatenate([a, b], axis=1)
  before_M = jnp.arange(-before_BM.shape[1], 0)[None]
  ranks = mask.k_ranks_BS
  return dataclasses.replace(
    mask,
    k_segments_BS=join(before_BM, batch['segments']),
    k_ranks_BS=None if ranks is None else join(0 * before_BM, ranks),
    q_index_BT=q_place,
    k_index_BS=join(before_M, place_T),
  )
