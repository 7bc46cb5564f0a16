"""Two-stream attention (XLNet, Yang et al., 2019).

A row holds two streams, one after the other, that go through the same layers.
The content stream has all tokens; the query stream has one query for each token
to predict. Both attend to the content stream alone: a token attends to tokens
whose rank is not above its own.

Shape suffixes: B batch, T tokens, M tokens that are predicted, D embed.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t2x.attention import mask as mask_lib
from t2x.layers import block
from t2x.models import segment_memory


def are_in(batch: dict[str, jax.Array]) -> bool:
  """Returns whether a batch has two streams."""
  return batch.get('ranks') is not None


def context(
  batch: dict[str, jax.Array], keys_B: jax.Array | None, by_place: bool
) -> block.Context:
  """Returns the context that the layers share.

  Args:
    batch: batch made by `objectives.permutation`.
    keys_B: dropout keys of the rows; None for no dropout.
    by_place: whether attention scores depend on the places of tokens.
  """
  tokens_BT = batch['inputs']
  length = tokens_BT.shape[1]
  both = lambda name: jnp.concatenate([batch[name], batch[f'query_{name}']], 1)
  mask = mask_lib.Mask(
    q_segments_BT=both('segments'),
    k_segments_BS=batch['segments'],
    q_ranks_BT=both('ranks'),
    k_ranks_BS=batch['ranks'],
  )
  remembers = segment_memory.SEGMENTS in batch
  if by_place or remembers:
    place_BT = jnp.broadcast_to(jnp.arange(length)[None], tokens_BT.shape)
    both_places = jnp.concatenate([place_BT, batch['query_places']], 1)
    mask = dataclasses.replace(
      mask, q_index_BT=both_places, k_index_BS=place_BT
    )
  if remembers:
    mask = segment_memory.mask_of(batch, mask)
  return block.Context(
    mask=mask,
    positions_BT=both('positions'),
    keys_B=keys_B,
    num_keys=length,
  )


def query_stream(x_BTD: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
  """Returns the query stream of both streams, (B, M, D)."""
  return x_BTD[:, batch['inputs'].shape[1] :]
