"""Lightweight and dynamic convolutions, in the place of attention.

Shape suffixes: B batch, T position, S key position, D embed, N heads, H head
dim, W width.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from t2x import field_checks
from t2x.attention import cache as cache_lib
from t2x.attention import context
from t2x.attention import mask as mask_lib
from t2x.attention import patterns
from t2x.layers import attention_config
from t2x.layers import param
from t2x.layers import sequence_parallel
from t2x.parallel import sharding

_Cache = cache_lib.Cache | cache_lib.WindowCache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Convolution(attention_config.Heads):
  """A gated convolution whose taps are a softmax (Wu et al., 2019).

  out = W_o conv(W_v x * sigmoid(W_g x)), with one filter of `width` taps for
  each head. The last tap of a decoder is at the token itself, and the middle
  tap of an encoder. Tokens of other documents count as 0.

  Attributes:
    width: number of taps; odd for an encoder.
    dynamic: whether taps are predicted from each token (dynamic convolution);
      else they are weights (lightweight convolution).
  """

  kind: ClassVar[str] = 'convolution'
  decoding: ClassVar[str | None] = 'values of the window'
  width: int = 15
  dynamic: bool = False

  def __post_init__(self) -> None:
    super().__post_init__()
    field_checks.least(self, 'attention.', width=1)
    if self.kv_heads != self.num_heads or self.qk_norm:
      raise ValueError(
        f'attention.num_kv_heads={self.num_kv_heads}, qk_norm={self.qk_norm}: '
        'a convolution has no keys. Set them to none and false.'
      )

  def check_length(self, length: int) -> None:
    if self.width > length:
      raise ValueError(
        f'attention.width={self.width} taps are more than the {length} tokens '
        'of a sequence. Lower it.'
      )


class Convolve(nnx.Module):
  """The layer of `Convolution`; called as `attention_layer.Attention` is."""

  def __init__(
    self,
    config: Convolution,
    embed: int,
    *,
    init: param.Init,
    out_factor: float,
    rngs: nnx.Rngs,
  ):
    self.config = config
    N, H, W = config.num_heads, config.head_dim, config.width
    into = lambda width: param.initializer(init, fan_in=embed, fan_out=width)
    axes = 'embed', 'heads', 'head_dim'
    self.v_DNH = param.weight(rngs, (embed, N, H), axes, into(N * H))
    self.gate_DNH = param.weight(rngs, (embed, N, H), axes, into(N * H))
    if config.dynamic:
      self.taps = param.weight(
        rngs, (embed, N, W), ('embed', 'heads', None), into(N * W)
      )
    else:
      self.taps = param.param(
        rngs, (N, W), ('heads', None), param.make_initializer('normal', 1.0)
      )
    out = param.initializer(
      init, fan_in=N * H, fan_out=embed, factor=out_factor
    )
    self.o_NHD = param.weight(
      rngs, (N, H, embed), ('heads', 'head_dim', 'embed'), out
    )
    zeros = lambda shape, *axes: param.param(rngs, shape, axes, param.zeros)
    heads = lambda: zeros((N, H), 'heads', 'head_dim') if config.bias else None
    self.v_bias_NH = heads()
    self.gate_bias_NH = heads()
    self.o_bias_D = zeros((embed,), None) if config.has_out_bias else None

  def __call__(
    self, x_BTD: jax.Array, mask: mask_lib.Mask, **unused: object
  ) -> jax.Array:
    """Convolves whole sequences.

    Args:
      x_BTD: input.
      mask: mask that is causal or shows everything, with segments or none.
      **unused: other arguments of `Attention.__call__`: a convolution has no
        positions and no scores.

    Returns:
      (B, T, D).
    """
    del unused
    context.check_plain(mask)
    assert mask.has_static_order, 'neighbours in the arrays are neighbours'
    x_BTD = sequence_parallel.gather(x_BTD)
    v_BTNH, taps_BTNW = self._values(x_BTD), self._taps(x_BTD)
    causal = patterns.has(mask.pattern, patterns.Causal)
    segments_BT = mask.q_segments_BT
    return self._out(convolve(v_BTNH, taps_BTNW, segments_BT, causal=causal))

  def step(
    self, x_BTD: jax.Array, mask: mask_lib.Mask, cache: _Cache, **unused: object
  ) -> tuple[jax.Array, _Cache]:
    """Continues from a cache; see `attention_layer.Attention.step`."""
    del unused
    assert mask.q_index_BT is not None
    v_BTNH, taps_BTNW = self._values(x_BTD), self._taps(x_BTD)
    index_BT = jnp.broadcast_to(mask.q_index_BT, x_BTD.shape[:2])
    nothing = v_BTNH[..., :0]
    _, v_BSNH, index_BS, cache = cache.extend(nothing, v_BTNH, index_BT)
    if index_BS is None:
      index_BS = jnp.arange(v_BSNH.shape[1])[None]
    W = self.config.width
    back_BTS = index_BT[:, :, None] - index_BS[:, None, :]
    seen_BTS = (back_BTS >= 0) & (back_BTS < W)
    # The last tap is at the token itself.
    tap_BTS = jnp.clip(W - 1 - back_BTS, 0, W - 1)
    weights = jnp.take_along_axis(taps_BTNW, tap_BTS[:, :, None], axis=-1)
    weights = jnp.where(seen_BTS[:, :, None], weights, 0).astype(v_BSNH.dtype)
    return self._out(jnp.einsum('BTNS,BSNH->BTNH', weights, v_BSNH)), cache

  def empty_cache(
    self, batch: int, capacity: int, dtype: jax.typing.DTypeLike, slack: int = 0
  ) -> _Cache:
    """Returns an empty cache of the values that taps reach.

    Arguments as for `attention_layer.Attention.empty_cache`.
    """
    N, H = self.config.num_heads, self.config.head_dim
    reach = self.config.width
    return cache_lib.empty(batch, capacity, N, 0, H, dtype, reach, slack)

  def _values(self, x_BTD: jax.Array) -> jax.Array:
    product = lambda weight, bias: param.add_bias(
      param.project(x_BTD, weight, 'BTD,DNH->BTNH'), bias
    )
    gate = jax.nn.sigmoid(product(self.gate_DNH, self.gate_bias_NH))
    v_BTNH = product(self.v_DNH, self.v_bias_NH) * gate
    return sharding.constrain(v_BTNH, 'batch', 'length', 'heads', None)

  def _taps(self, x_BTD: jax.Array) -> jax.Array:
    """Returns the taps of each token, float32 (B, T, N, W), with sum 1."""
    if self.config.dynamic:
      taps = param.project(x_BTD, self.taps, 'BTD,DNW->BTNW')
      return jax.nn.softmax(taps.astype(jnp.float32), axis=-1)
    taps_NW = jax.nn.softmax(self.taps[...].astype(jnp.float32), axis=-1)
    return jnp.broadcast_to(taps_NW, (*x_BTD.shape[:2], *taps_NW.shape))

  def _out(self, out_BTNH: jax.Array) -> jax.Array:
    out_BTD = param.project(out_BTNH, self.o_NHD, 'BTNH,NHD->BTD')
    return param.add_bias(
      sequence_parallel.scatter(out_BTD, 'heads'), self.o_bias_D
    )


def convolve(
  v_BTNH: jax.Array,
  taps_BTNW: jax.Array,
  segments_BT: jax.Array | None,
  *,
  causal: bool,
) -> jax.Array:
  """Returns the sum of a token's neighbours, weighted by its taps.

  Args:
    v_BTNH: values.
    taps_BTNW: taps of each token, B and T may be 1; the tap at the token itself
      is the last one if causal, else the middle one.
    segments_BT: segment of each token; neighbours of other segments count as 0.
      None is one segment.
    causal: whether taps reach only back, and not to both sides.
  """
  T, W = v_BTNH.shape[1], taps_BTNW.shape[-1]
  before = W - 1 if causal else W // 2
  width = (before, W - 1 - before)
  padded = jnp.pad(v_BTNH, ((0, 0), width, (0, 0), (0, 0)))
  out_BTNH = jnp.zeros_like(v_BTNH)
  for i in range(W):
    taps = taps_BTNW[..., i, None].astype(v_BTNH.dtype)
    if segments_BT is not None:
      near = jnp.pad(segments_BT, ((0, 0), width), constant_values=-1)
      same_BT = near[:, i : i + T] == segments_BT
      taps = jnp.where(same_BT[..., None, None], taps, 0)
    out_BTNH = out_BTNH + padded[:, i : i + T] * taps
  return out_BTNH


def num_flops(config: Convolution, length: int, embed: int) -> int:
  """Returns the FLOPs of a row's taps: their products, and their prediction.

  Args:
    config: config of the layer.
    length: number of tokens in the row.
    embed: width of the activations.
  """
  N, H, W = config.num_heads, config.head_dim, config.width
  predicted = 2 * length * embed * N * W if config.dynamic else 0
  return 2 * length * N * H * W + predicted
