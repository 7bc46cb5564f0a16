"""Attention with given queries, keys and values, in all variants of a layer.

The variants are the pattern of a kind, positions in queries and keys (rotary
and Transformer-XL's), Longformer's global tokens, and mixers in the place of
softmax attention.

Shape suffixes: B batch, T query position, S key position, G global token, D
embed, N query heads, K key/value heads, H head dim.
"""

from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from t2x.attention import context
from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.attention import patterns
from t2x.attention import splash
from t2x.layers import attention_config
from t2x.layers import attention_kinds
from t2x.layers import attention_projections
from t2x.layers import dropout
from t2x.layers import global_tokens
from t2x.layers import local_heads
from t2x.layers import param
from t2x.layers import position
from t2x.layers import transformer_xl


class Variants(attention_projections.Projections):
  """Projections, and attention by the kind of a config."""

  def __init__(
    self,
    config: attention_config.Heads,
    embed: int,
    *,
    init: param.Init,
    out_factor: float,
    rngs: nnx.Rngs,
  ):
    super().__init__(config, embed, init=init, out_factor=out_factor, rngs=rngs)
    has_globals = config.global_projections
    self.global_tokens: Any = (
      global_tokens.GlobalTokens(config, embed, init=init, rngs=rngs)
      if has_globals
      else None
    )
    self.distances: Any = (
      transformer_xl.Distances(config, embed, init=init, rngs=rngs)
      if isinstance(config, transformer_xl.TransformerXL)
      else None
    )
    self.mixer: Any = attention_kinds.mixer(config, rngs=rngs)

  def attend(
    self,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: mask_lib.Mask,
    bias: dense.Bias | None = None,
    keys_B: jax.Array | None = None,
    kernel: str | None = None,
  ) -> jax.Array:
    """Attends with given queries, keys and values.

    Args:
      q_BTNH: queries.
      k_BSKH: keys.
      v_BSKH: values.
      mask: description of the keys that each query sees.
      bias: bias of the scores; None is none.
      keys_B: dropout key of each row; None means no dropout.
      kernel: value in the place of `config.kernel`; None is that of the config.

    Returns:
      (B, T, D).
    """
    parts = q_BTNH, k_BSKH, v_BSKH, mask
    return self._out(self._attend(*parts, bias, keys_B, kernel))

  def _attend(
    self,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: mask_lib.Mask,
    bias: dense.Bias | None,
    keys_B: jax.Array | None,
    kernel: str | None,
  ) -> jax.Array:
    """Attends as `attend`, without the output projection: (B, T, N, H)."""
    config = self.config
    drop = None
    if keys_B is not None and config.dropout:
      drop = dropout.OfScores(
        keys_B=keys_B, rate=config.dropout, heads_KG=local_heads.numbers(config)
      )
    options = self._options(kernel, bias, drop)
    k_BSKH, v_BSKH = (
      local_heads.used_key_heads(a, config) for a in (k_BSKH, v_BSKH)
    )
    with jax.named_scope('scores'):
      return context.attend(q_BTNH, k_BSKH, v_BSKH, mask, options)

  def _options(
    self,
    kernel: str | None = None,
    bias: dense.Bias | None = None,
    drop: dense.Dropout | None = None,
  ) -> dense.AttentionOptions:
    config = self.config
    return dense.AttentionOptions(
      bias=bias,
      dropout=drop,
      kernel=kernel or config.kernel,
      scale=config.scale or config.head_dim**-0.5,
      soft_cap=config.soft_cap,
      block=config.block,
    )

  def _mixed(
    self,
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask: mask_lib.Mask,
  ) -> jax.Array:
    """Applies the mixer of a kind without scores: (B, T, N, H)."""
    config = self.config
    k_BSKH, v_BSKH = (
      local_heads.used_key_heads(a, config) for a in (k_BSKH, v_BSKH)
    )
    with jax.named_scope('scores'):
      heads_N = local_heads.numbers(config).reshape(-1)
      out_BTNH = context.mix(self.mixer, q_BTNH, k_BSKH, v_BSKH, mask, heads_N)
    return checkpoint_name(out_BTNH, splash.NAME)

  def _with_globals(
    self,
    out_BTNH: jax.Array,
    x_BTD: jax.Array,
    mask: mask_lib.Mask,
    keys_B: jax.Array | None,
  ) -> jax.Array:
    """Replaces the outputs of global tokens by those of their projections."""
    num, segments_BT = self.config.num_global, mask.q_segments_BT
    whole = mask_lib.Mask(
      q_segments_BT=None if segments_BT is None else segments_BT[:, :num],
      k_segments_BS=mask.k_segments_BS,
    )
    q_BGNH, k_BSNH, v_BSNH = self.global_tokens(x_BTD, num)
    keys_B = dropout.fold(keys_B, 1)
    globals_ = self._attend(
      q_BGNH, k_BSNH, v_BSNH, whole, None, keys_B, 'blocks'
    )
    return jnp.concatenate([globals_, out_BTNH[:, num:]], axis=1)

  def _placed_queries(
    self,
    q_BTNH: jax.Array,
    positions_BT: jax.Array,
    rotary: position.Rotary | None,
    types_BT: jax.Array | None = None,
  ) -> jax.Array:
    """Encodes positions in queries, by rotation or by `distances`."""
    if self.distances is not None:
      return self.distances.queries(q_BTNH, positions_BT, types_BT)
    if rotary is None:
      return q_BTNH
    return position.rotate(q_BTNH, positions_BT, rotary)

  def _placed_keys(
    self,
    k_BSKH: jax.Array,
    positions_BS: jax.Array,
    rotary: position.Rotary | None,
    types_BS: jax.Array | None = None,
  ) -> jax.Array:
    """Encodes positions in keys, by rotation or by `distances`."""
    if self.distances is not None:
      return self.distances.keys(k_BSKH, positions_BS, types_BS)
    if rotary is None:
      return k_BSKH
    return position.rotate(k_BSKH, positions_BS, rotary)

  def _narrowed(self, mask: mask_lib.Mask, length: int) -> mask_lib.Mask:
    """Adds the pattern of the layer's kind to a mask."""
    causal = patterns.has(mask.pattern, patterns.Causal)
    return mask & self.config.pattern(length, causal=causal)
