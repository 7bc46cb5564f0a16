"""The Transformer block, with norms in pre, post, sandwich or parallel order.

Shape suffixes: B batch, T position, S encoder position, D embed.
"""

import dataclasses
from typing import Any
from typing import Literal

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name

from t2x.attention import cache as cache_lib
from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.layers import attention_kinds
from t2x.layers import attention_layer
from t2x.layers import convolution
from t2x.layers import dropout
from t2x.layers import mlp as mlp_lib
from t2x.layers import moe
from t2x.layers import norm as norm_lib
from t2x.layers import param
from t2x.layers import position
from t2x.layers import sequence_parallel
from t2x.parallel import sharding

Residual = Literal['pre_norm', 'post_norm', 'sandwich', 'parallel']


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Context:
  """Inputs that all blocks of one forward pass share.

  Attributes:
    mask: mask of self-attention.
    positions_BT: positions of the tokens, for rotary encodings; None is 0, 1,
      2, ...
    types_BT: sentence (token type) of each token, for kinds whose scores depend
      on it; None where there are none.
    rotary: the rotary encoding; None is none.
    bias: bias of the self-attention scores, a module that the blocks share;
      None is none.
    keys_B: dropout key of each row; None means no dropout.
    encoded_BSD: output of the encoder, for cross-attention; None is none.
    cross_mask: mask of cross-attention to `encoded_BSD`.
    num_keys: number of tokens, the first ones of the sequence, that have keys;
      None is all.
  """

  mask: mask_lib.Mask
  positions_BT: jax.Array | None = None
  types_BT: jax.Array | None = None
  rotary: position.Rotary | None = dataclasses.field(
    default=None, metadata={'static': True}
  )
  bias: dense.Bias | None = None
  keys_B: jax.Array | None = None
  encoded_BSD: jax.Array | None = None
  cross_mask: mask_lib.Mask = mask_lib.Mask()
  num_keys: int | None = dataclasses.field(
    default=None, metadata={'static': True}
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BlockCache:
  """Cache of one block.

  Its attributes are parts of the names of arrays in checkpoints.

  Attributes:
    own: cache of self-attention, of the class that the kind of attention uses.
    cross: keys and values of the encoder's output; None without
      cross-attention.
  """

  own: Any
  cross: cache_lib.Cache | None = None


class Block(nnx.Module):
  """Self-attention, cross-attention if `cross` is set, and feed-forward."""

  def __init__(
    self,
    attention: attention_kinds.AttentionConfig,
    mlp: moe.FeedForwardConfig,
    norm: norm_lib.NormConfig,
    embed: int,
    *,
    residual: Residual,
    dropout_rate: float,
    init: param.Init,
    out_factor: float,
    branch_factor: float = 1.0,
    cross: bool = False,
    rngs: nnx.Rngs,
  ):
    self.residual = residual
    self.dropout_rate = dropout_rate
    self.branch_factor = branch_factor
    draw: Any = {'init': init, 'out_factor': out_factor, 'rngs': rngs}
    make_norm = lambda: norm_lib.Norm(norm, embed, rngs=rngs)
    # The norm of a branch's output, where its input has one as well.
    after = lambda: make_norm() if residual == 'sandwich' else None
    self.attention_norm = make_norm()
    self.attention_out_norm = after()
    self.attention: Any = attention_layer.make(attention, embed, **draw)
    self.cross_norm = make_norm() if cross else None
    self.cross_out_norm = after() if cross else None
    self.cross = (
      attention_layer.Attention(
        attention_kinds.for_cross(attention), embed, **draw
      )
      if cross
      else None
    )
    # The parallel form has one norm for both branches.
    self.mlp_norm = None if residual == 'parallel' else make_norm()
    self.mlp_out_norm = after()
    self.mlp = moe.make(mlp, embed, **draw)

  def __call__(
    self,
    x_BTD: jax.Array,
    context: Context,
    cache: BlockCache | None = None,
  ) -> tuple[jax.Array, BlockCache | None, moe.Stats | None]:
    """Applies the block.

    Args:
      x_BTD: activations.
      context: inputs that all blocks share.
      cache: the block's cache; None computes whole sequences.

    Returns:
      The next activations; the new cache, None if none was given; and the
      router's statistics, None for a block without a router.
    """
    if self.residual == 'parallel':
      # Chowdhery et al., 2022: x + attention(norm(x)) + mlp(norm(x)).
      y_BTD = self._before(x_BTD, self.attention_norm)
      out_BTD, cache = self._attend(y_BTD, context, cache)
      mlp_BTD, stats = self._feed_forward(y_BTD, context, cache)
      out_BTD = self._scaled(_residual(out_BTD + mlp_BTD))
      x_BTD = x_BTD + self._drop(out_BTD, context, 2)
    else:
      y_BTD = self._before(x_BTD, self.attention_norm)
      out_BTD, cache = self._attend(y_BTD, context, cache)
      x_BTD = self._after(x_BTD, out_BTD, 'attention', context, 2)
      if self.cross is not None:
        y_BTD = self._before(x_BTD, self.cross_norm)
        out_BTD = self._attend_cross(self.cross, y_BTD, context, cache)
        x_BTD = self._after(x_BTD, out_BTD, 'cross', context, 3)
      y_BTD = self._before(x_BTD, self.mlp_norm)
      out_BTD, stats = self._feed_forward(y_BTD, context, cache)
      x_BTD = self._after(x_BTD, out_BTD, 'mlp', context, 4)
    return checkpoint_name(_residual(x_BTD), 'block'), cache, stats

  def _before(self, x_BTD: jax.Array, norm: norm_lib.Norm | None) -> jax.Array:
    """Returns the input of a branch: norm(x), or x in post-norm order."""
    if self.residual == 'post_norm':
      return x_BTD
    assert norm is not None
    return norm(x_BTD)

  def _after(
    self,
    x_BTD: jax.Array,
    out_BTD: jax.Array,
    name: str,
    context: Context,
    site: int,
  ) -> jax.Array:
    """Adds a branch: x + out, post norm(x + out), sandwich x + norm(out)."""
    out_BTD = _residual(out_BTD)
    out_norm = getattr(self, f'{name}_out_norm')
    if out_norm is not None:
      out_BTD = out_norm(out_BTD)
    out_BTD = self._scaled(out_BTD)
    x_BTD = x_BTD + self._drop(out_BTD, context, site)
    if self.residual == 'post_norm':
      x_BTD = getattr(self, f'{name}_norm')(x_BTD)
    return x_BTD

  def _scaled(self, out_BTD: jax.Array) -> jax.Array:
    """Multiplies the output of a branch by its factor."""
    factor = self.branch_factor
    return out_BTD if factor == 1.0 else out_BTD * factor

  def _drop(self, x_BTD: jax.Array, context: Context, site: int) -> jax.Array:
    keys_B = dropout.fold(context.keys_B, site)
    zigzag = context.mask.q_zigzag
    return dropout.dropout(x_BTD, self.dropout_rate, keys_B, zigzag)

  @jax.named_scope('attention')
  def _attend(
    self, y_BTD: jax.Array, context: Context, cache: BlockCache | None
  ) -> tuple[jax.Array, BlockCache | None]:
    if cache is None:
      return sequence_parallel.run(
        _attention, self.attention, y_BTD, context
      ), None
    if isinstance(cache.own, cache_lib.MemoryCache):
      out, own = _recall(self.attention, y_BTD, context, cache.own)
      return out, dataclasses.replace(cache, own=own)
    out, own = self.attention.step(
      y_BTD,
      context.mask,
      cache.own,
      positions_BT=context.positions_BT,
      rotary=context.rotary,
      bias=context.bias,
    )
    return out, dataclasses.replace(cache, own=own)

  @jax.named_scope('cross')
  def _attend_cross(
    self,
    layer: attention_layer.Attention,
    y_BTD: jax.Array,
    context: Context,
    cache: BlockCache | None,
  ) -> jax.Array:
    if cache is None:
      return sequence_parallel.run(_cross_attention, layer, y_BTD, context)
    assert cache.cross is not None
    k_BSKH, v_BSKH = cache.cross.read(y_BTD.dtype)
    return layer.attend(
      layer.queries(y_BTD),
      k_BSKH,
      v_BSKH,
      context.cross_mask,
      kernel='blocks',
    )

  @jax.named_scope('mlp')
  def _feed_forward(
    self, y_BTD: jax.Array, context: Context, cache: BlockCache | None
  ) -> tuple[jax.Array, moe.Stats | None]:
    if not isinstance(self.mlp, moe.Moe):
      return sequence_parallel.run(_mlp, self.mlp, y_BTD, context), None
    segments_BT = context.mask.q_segments_BT
    real_BT = None if segments_BT is None else segments_BT != 0
    # With a cache the arrays are a part of their rows, or have rows of other
    # lengths beside them, so that the capacity of an expert is not known.
    drop = cache is None or isinstance(cache.own, cache_lib.MemoryCache)
    return self.mlp(y_BTD, real_BT, context.mask.q_zigzag, drop=drop)

  def empty_pages(
    self, num_pages: int, size: int, dtype: jax.typing.DTypeLike
  ) -> BlockCache:
    """Returns a cache of empty pages, which rows share.

    Args:
      num_pages: number of pages.
      size: number of positions in a page.
      dtype: dtype of keys and values.

    Raises:
      ValueError: the kind of attention cannot use pages.
    """
    attention_kinds.check_pages(self.attention.config)
    return BlockCache(own=self.attention.empty_pages(num_pages, size, dtype))

  def empty_cache(
    self,
    batch: int,
    capacity: int,
    dtype: jax.typing.DTypeLike,
    encoded_BSD: jax.Array | None = None,
    slack: int = 0,
  ) -> BlockCache:
    """Returns an empty cache, with the keys and values of the encoder's output.

    Args:
      batch: number of rows.
      capacity: number of positions in a row.
      dtype: dtype of keys and values.
      encoded_BSD: output of the encoder; None without cross-attention.
      slack: largest number of tokens written in one step that may be rejected
        later; see `cache.empty`.
    """
    own = self.attention.empty_cache(batch, capacity, dtype, slack)
    if self.cross is None or encoded_BSD is None:
      return BlockCache(own=own)
    k_BSKH, v_BSKH = self.cross.keys_and_values(encoded_BSD)
    return BlockCache(own=own, cross=cache_lib.of(k_BSKH, v_BSKH, dtype))


def _attention(
  layer: attention_layer.Attention | convolution.Convolve,
  y_BTD: jax.Array,
  context: Context,
) -> jax.Array:
  return layer(
    y_BTD,
    context.mask,
    positions_BT=context.positions_BT,
    types_BT=context.types_BT,
    rotary=context.rotary,
    bias=context.bias,
    keys_B=dropout.fold(context.keys_B, 0),
    num_keys=context.num_keys,
  )


def _recall(
  layer: attention_layer.Attention,
  y_BTD: jax.Array,
  context: Context,
  memory: cache_lib.MemoryCache,
) -> tuple[jax.Array, cache_lib.MemoryCache]:
  assert context.positions_BT is not None
  y_BTD = sharding.constrain(y_BTD, 'batch', 'length', 'act_embed')
  return layer.recall(
    y_BTD,
    context.mask,
    memory,
    positions_BT=context.positions_BT,
    rotary=context.rotary,
    bias=context.bias,
    keys_B=dropout.fold(context.keys_B, 0),
    num_keys=context.num_keys,
  )


def _cross_attention(
  layer: attention_layer.Attention, y_BTD: jax.Array, context: Context
) -> jax.Array:
  keys_B = dropout.fold(context.keys_B, 1)
  encoded_BSD = context.encoded_BSD
  return layer(
    y_BTD, context.cross_mask, keys_B=keys_B, encoded_BSD=encoded_BSD
  )


def _mlp(layer: mlp_lib.Mlp, y_BTD: jax.Array, context: Context) -> jax.Array:
  keys_B = dropout.fold(context.keys_B, 5)
  return layer(y_BTD, keys_B, context.mask.q_zigzag)


def _residual(x_BTD: jax.Array) -> jax.Array:
  """Constrains activations between layers, which may be split more finely."""
  return sharding.constrain(x_BTD, 'batch', 'norm_length', 'act_embed')
