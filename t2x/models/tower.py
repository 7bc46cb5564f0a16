"""A tower: a stack of a model's layers, with its final norm.

Shape suffixes: B batch, T position, S encoder position, D embed.
"""

import dataclasses
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from t2x.layers import attention_config
from t2x.layers import attention_kinds
from t2x.layers import block
from t2x.layers import dropout as dropout_lib
from t2x.layers import moe
from t2x.layers import norm as norm_lib
from t2x.layers import position as position_lib
from t2x.layers import stack
from t2x.models import common
from t2x.parallel import sharding


class Tower(nnx.Module):
  """A stack of blocks, with its position bias and its final norm.

  Args:
    config: settings of the model.
    num_layers: number of layers.
    bidirectional: whether tokens attend to both sides.
    cross: whether the layers have cross-attention.
    rngs: random keys of the initialisation.
  """

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
      functools.partial(_make_block, config, *kinds, depth, num_layers, cross)
      for kinds in config.group
    ]
    self.layers = stack.Stack(makers, num_layers, rngs=rngs)
    self.bias = _make_bias(config, bidirectional, rngs)
    # In post-norm order the last block ends with a norm.
    post = config.residual == 'post_norm'
    self.final_norm = None if post else norm_lib.Norm(config.norm, D, rngs=rngs)

  def __call__(
    self,
    x_BTD: jax.Array,
    context: block.Context,
    *,
    caches: Any = None,
    execution: stack.Execution = stack.Execution(),
  ) -> tuple[jax.Array, Any, dict[str, moe.Stats]]:
    """Runs `begin` and each layer, but not `end`.

    Args:
      x_BTD: embeddings.
      context: masks, positions and keys of the pass.
      caches: caches or memories of all layers; None without.
      execution: scan or unroll, and tensors to recompute.

    Returns:
      The output (B, T, D), the new caches, and the statistics of each router by
      its path in this module.
    """
    x_BTD = self.begin(x_BTD, context)

    def apply(
      layer: block.Block,
      x_BTD: jax.Array,
      cache: block.BlockCache | None,
      number: jax.Array,
    ) -> tuple[jax.Array, tuple[block.BlockCache | None, moe.Stats | None]]:
      x_BTD, cache, stats = self.layer(layer, x_BTD, context, number, cache)
      return x_BTD, (cache, stats)

    x_BTD, (group, rest) = self.layers(
      apply, x_BTD, caches=caches, execution=execution
    )
    caches = tuple(c for c, _ in group), tuple(c for c, _ in rest)
    stats = {
      f'layers.{name}.{i}.mlp': stats
      for name, part in (('group', group), ('remainder', rest))
      for i, (_, stats) in enumerate(part)
      if stats is not None
    }
    return x_BTD, caches, stats

  def layer_on_top(self, rngs: nnx.Rngs) -> block.Block:
    """Returns a new layer like the last of the group; the tower lacks it."""
    kinds, num = self.config.group[-1], self.layers.num_layers
    return _make_block(self.config, *kinds, 1.0, num, False, rngs)

  def begin(self, x_BTD: jax.Array, context: block.Context) -> jax.Array:
    """Applies dropout to the embeddings; its site is past every layer's."""
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
      layer: the layer.
      x_BTD: input of the layer.
      context: masks, positions and keys of the pass, to which the tower adds
        its bias and rotary positions.
      number: number of the layer in the tower, from 0.
      cache: cache or memory of the layer; None without.

    Returns:
      The output, the new cache, and the statistics of the layer's router.
    """
    rotary = self.config.position
    turns = isinstance(rotary, position_lib.Rotary) and (
      layer.attention.config.rotary
    )
    layer_context = dataclasses.replace(
      context,
      keys_B=dropout_lib.fold(context.keys_B, number),
      bias=self.bias,
      rotary=rotary if turns else None,
    )
    return layer(x_BTD, layer_context, cache)

  def end(self, x_BTD: jax.Array) -> jax.Array:
    """Applies the final norm to the last layer's output."""
    if self.final_norm is not None:
      x_BTD = self.final_norm(x_BTD)
    return sharding.constrain(x_BTD, 'batch', 'length', 'act_embed')

  def empty_caches(
    self,
    batch: int,
    capacity: int,
    encoded_BSD: jax.Array | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    slack: int = 0,
  ) -> Any:
    """Returns empty caches for all layers.

    Args:
      batch: number of rows.
      capacity: number of positions of each row.
      encoded_BSD: the encoder's output, of which cross-attention keeps keys and
        values; None without.
      dtype: dtype of keys and values; None for the model's. int8 takes half the
        memory of bfloat16.
      slack: number of tokens of a step that may be rejected later.
    """
    dtype = jnp.dtype(dtype or self.config.dtype)
    return self.layers.map_layers(
      lambda layer: layer.empty_cache(
        batch, capacity, dtype, encoded_BSD, slack
      )
    )

  def empty_pages(
    self, num_pages: int, size: int, dtype: jax.typing.DTypeLike | None = None
  ) -> Any:
    """Returns empty pages for all layers; see `paged.empty`.

    Args:
      num_pages: number of pages of each layer.
      size: number of positions in a page.
      dtype: dtype of keys and values; None for the model's.
    """
    dtype = jnp.dtype(dtype or self.config.dtype)
    return self.layers.map_layers(
      lambda layer: layer.empty_pages(num_pages, size, dtype)
    )

  def empty_memory(self, batch: int, length: int) -> Any:
    """Returns empty memories for all layers.

    Args:
      batch: number of rows.
      length: number of tokens to remember.
    """
    dtype = jnp.dtype(self.config.dtype)
    return self.layers.map_layers(
      lambda layer: block.BlockCache(
        own=layer.attention.empty_memory(batch, length, dtype)
      )
    )


def _make_bias(
  config: common.TransformerConfig, bidirectional: bool, rngs: nnx.Rngs
) -> position_lib.RelativeBias | position_lib.AlibiBias | None:
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


def _make_block(
  config: common.TransformerConfig,
  kind: attention_kinds.AttentionConfig,
  mlp: moe.FeedForwardConfig,
  out_factor: float,
  num_layers: int,
  cross: bool,
  rngs: nnx.Rngs,
) -> block.Block:
  mup = config.mup
  if mup is not None and isinstance(kind, attention_config.Softmax):
    scale = kind.scale or mup.score_scale(kind.head_dim)
    kind = dataclasses.replace(kind, scale=scale)
  return block.Block(
    kind,
    mlp,
    config.norm,
    config.embed_dim,
    residual=config.residual,
    dropout_rate=config.dropout,
    init=config.matrix_init,
    out_factor=out_factor,
    branch_factor=1.0 if mup is None else mup.branch_factor(num_layers),
    cross=cross,
    rngs=rngs,
  )
