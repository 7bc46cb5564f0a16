"""A stack of a model's layers.

Shape suffixes: B batch, T position, S encoder position, D embed.
"""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp

from t2x.layers import block
from t2x.layers import dropout as dropout_lib
from t2x.layers import moe
from t2x.layers import norm as norm_lib
from t2x.layers import position as position_lib
from t2x.layers import stack
from t2x.models import common
from t2x.parallel import sharding


class Tower(nnx.Module):
  """A stack of blocks with its relative bias and its final norm."""

  def __init__(
    self,
    config: common.TransformerConfig,
    num_layers: int,
    *,
    bidirectional: bool,
    cross: bool = False,
    rngs: nnx.Rngs,
  ):
    self.config = config
    D = config.embed_dim
    init = config.init
    # Each layer adds two branches to the residual stream.
    depth = (2 * num_layers) ** -0.5 if init.depth_scaled else 1.0
    makers = [
      functools.partial(_make_block, config, *kinds, depth, cross)
      for kinds in config.group
    ]
    self.layers = stack.Stack(makers, num_layers, rngs=rngs)
    self.bias = _make_bias(config, bidirectional, rngs)
    # In post-norm order the last block has normalised already.
    post = config.residual == 'post_norm'
    self.final_norm = None if post else norm_lib.Norm(config.norm, D, rngs=rngs)

  def __call__(
    self,
    x_BTD: jax.Array,
    context: block.Context,
    *,
    caches=None,
    execution: stack.Execution = stack.Execution(),
  ):
    """Runs the layers: `begin`, each layer, and not yet `end`.

    Returns:
      The output (B, T, D), new caches, and a dict from a router's path in this
      module to its `Stats`.
    """
    x_BTD = self.begin(x_BTD, context)

    def apply(layer, x_BTD, cache, number):
      x_BTD, cache, stats = self.layer(layer, x_BTD, context, number, cache)
      return x_BTD, (cache, stats)

    x_BTD, given = self.layers(apply, x_BTD, caches=caches, execution=execution)
    group, rest = given
    caches = tuple(c for c, _ in group), tuple(c for c, _ in rest)
    stats = {
      f'layers.{name}.{i}.mlp': stats
      for name, part in (('group', group), ('remainder', rest))
      for i, (_, stats) in enumerate(part)
      if stats is not None
    }
    return x_BTD, caches, stats

  def layer_on_top(self, rngs: nnx.Rngs) -> block.Block:
    """Returns one more layer, like the last of the group, that is no part."""
    return _make_block(self.config, *self.config.group[-1], 1.0, False, rngs)

  def begin(self, x_BTD: jax.Array, context: block.Context) -> jax.Array:
    """Dropout on the embeddings; its site lies past every layer's number."""
    keys_B = dropout_lib.fold(context.keys_B, self.layers.num_layers)
    zigzag = context.mask.q_zigzag
    return dropout_lib.dropout(x_BTD, self.config.dropout, keys_B, zigzag)

  def layer(
    self,
    layer: block.Block,
    x_BTD: jax.Array,
    context: block.Context,
    number: jax.Array,
    cache: block.BlockCache | None = None,
  ) -> tuple[jax.Array, block.BlockCache | None, moe.Stats | None]:
    """Applies one layer of this tower; see `Block`.

    Args:
      layer: its parameters.
      x_BTD: its input.
      context: of the pass; the tower adds what its layers share.
      number: the layer's place in the tower, from 0.
      cache: its keys and values of earlier positions.
    """
    rotary = self.config.position
    turns = isinstance(rotary, position_lib.Rotary) and (
      layer.attention.config.rotary
    )
    own = dataclasses.replace(
      context,
      keys_B=dropout_lib.fold(context.keys_B, number),
      bias=self.bias,
      rotary=rotary if turns else None,
    )
    return layer(x_BTD, own, cache)

  def end(self, x_BTD: jax.Array) -> jax.Array:
    """Normalises what the last layer gives."""
    if self.final_norm is not None:
      x_BTD = self.final_norm(x_BTD)
    return sharding.constrain(x_BTD, 'batch', 'length', 'act_embed')

  def empty_caches(
    self, batch: int, capacity: int, encoded_BSD=None, dtype=None, slack=0
  ):
    """Returns empty caches for all layers; int8 halves bfloat16's."""
    dtype = jnp.dtype(dtype or self.config.dtype)
    return self.layers.map_layers(
      lambda layer: layer.empty_cache(
        batch, capacity, dtype, encoded_BSD, slack
      )
    )

  def empty_pages(self, num_pages: int, size: int, dtype=None):
    """Returns empty pages for all layers; see `paged.empty`."""
    dtype = jnp.dtype(dtype or self.config.dtype)
    return self.layers.map_layers(
      lambda layer: layer.empty_pages(num_pages, size, dtype)
    )

  def empty_memory(self, batch: int, length: int):
    """Returns memories of nothing for all layers."""
    dtype = jnp.dtype(self.config.dtype)
    return self.layers.map_layers(
      lambda layer: block.BlockCache(
        own=layer.attention.empty_memory(batch, length, dtype)
      )
    )


def _make_bias(config, bidirectional, rngs):
  heads = config.kinds[0].num_heads
  if isinstance(config.position, position_lib.RelativeBuckets):
    return position_lib.RelativeBias(
      config.position,
      heads,
      bidirectional=bidirectional,
      std=config.embed_dim**-0.5,
      rngs=rngs,
    )
  if isinstance(config.position, position_lib.Alibi):
    return position_lib.AlibiBias(heads)
  return None


def _make_block(config, kind, mlp, out_factor, cross, rngs):
  return block.Block(
    kind,
    mlp,
    config.norm,
    config.embed_dim,
    residual=config.residual,
    dropout_rate=config.dropout,
    init=config.init,
    out_factor=out_factor,
    cross=cross,
    rngs=rngs,
  )
