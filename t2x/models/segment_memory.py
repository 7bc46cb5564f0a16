"""Segment memory: keys and values of earlier rows (Dai et al., 2019).

Row b of a step continues row b of the step before, and attends to the last
tokens of its document there. The memory has no gradient.

Shape suffixes: B batch, M tokens that are remembered, T tokens of a row.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from t2x.attention import mask as mask_lib
from t2x.objectives import batch_keys
from t2x.parallel import sharding

NAME = 'memory'
SEGMENTS = 'memory_segments'  # Batch key: 1 if a row attends to it, else -1.


def empty(model: Any, rows: int, length: int) -> dict[str, Any]:
  """Returns an empty memory.

  Args:
    model: a model with one stack.
    rows: number of rows of a batch.
    length: number of tokens to remember.
  """
  return {
    'layers': model.tower.empty_memory(rows, length),
    'segments': jnp.full((rows, length), -1, jnp.int32),
  }


def like(shapes: dict[str, Any]) -> dict[str, Any]:
  """Returns an empty memory of the given shapes."""
  return hidden_unless(False, jax.tree.map(jnp.zeros_like, shapes))


def hidden_unless(
  condition: bool | jax.Array, memory: dict[str, Any]
) -> dict[str, Any]:
  """Returns a memory that is hidden unless a condition holds.

  Args:
    condition: a condition for all rows, or one for each row (B, 1).
    memory: memory of the rows before.
  """
  segments_BM = jnp.where(condition, memory['segments'], -1)
  return {**memory, 'segments': segments_BM}


def shardings(
  memory: dict[str, Any],
  mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
  rules: sharding.Rules,
) -> dict[str, Any]:
  """Returns the sharding of each array of a memory, by rows and by heads.

  Args:
    memory: the memory, arrays or shapes.
    mesh: mesh of devices, or an abstract one.
    rules: mesh axes of each logical axis.
  """

  def of(leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
    spec = sharding.to_spec(
      _axes(leaf), rules, shape=leaf.shape, mesh=mesh, name='memory'
    )
    return NamedSharding(mesh, spec)

  return jax.tree.map(of, memory)


def _axes(leaf: jax.Array | jax.ShapeDtypeStruct) -> tuple[str | None, ...]:
  """Returns the logical axes of (layers,) B, M, K, H, or of segments B, M."""
  axes = ('batch', None, 'kv_heads', None)[: leaf.ndim]
  return (None,) * (leaf.ndim - len(axes)) + axes


def with_memory(
  batch: dict[str, jax.Array], memory: dict[str, Any]
) -> dict[str, jax.Array]:
  """Returns a batch to which `SEGMENTS`, the visible memory, is added.

  Args:
    batch: inputs by name, with `batch_keys.CONTINUES`.
    memory: memory of the rows before.

  Raises:
    ValueError: if the batch does not say which rows continue a document, or has
      an array that a memory does not support.
  """
  if batch.get(batch_keys.CONTINUES) is None:
    raise ValueError(
      f'A memory of the rows before, and no {batch_keys.CONTINUES!r} (B, 1) '
      'that says which rows go on with their document. Give 1 or 0 for each.'
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
  continues_B1 = batch[batch_keys.CONTINUES][:, :1] > 0
  return {**batch, SEGMENTS: hidden_unless(continues_B1, memory)['segments']}


def next_memory(batch: dict[str, jax.Array], layers: Any) -> dict[str, Any]:
  """Returns the memory for the next rows.

  Args:
    batch: batch returned by `with_memory`.
    layers: keys and values of each layer.
  """
  segments_BT, before_BM = batch['segments'], batch[SEGMENTS]
  length = before_BM.shape[1]
  # The last document of a row is the first one, number 1, of the next row.
  last_B1 = segments_BT[:, -1:]
  both = jnp.concatenate([before_BM, segments_BT], axis=1)[:, -length:]
  stays = (both == last_B1) & (last_B1 > 0)
  memory = {'layers': layers, 'segments': jnp.where(stays, 1, -1)}
  return jax.tree.map(lambda a: sharding.constrain(a, *_axes(a)), memory)


def mask_of(batch: dict[str, jax.Array], mask: mask_lib.Mask) -> mask_lib.Mask:
  """Returns a mask whose keys are those of the memory and then of the row.

  Args:
    batch: batch returned by `with_memory`.
    mask: mask of the row alone.
  """
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
