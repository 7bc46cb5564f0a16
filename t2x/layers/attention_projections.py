"""The projections of an attention layer: to queries, keys, values and output.

Shape suffixes: B batch, T query position, S key position, D embed, N query
heads, K key/value heads, H head dim.
"""

from typing import Any

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name

from t2x.layers import attention_config
from t2x.layers import norm
from t2x.layers import param
from t2x.layers import sequence_parallel
from t2x.parallel import sharding


def weight(
  config: attention_config.Heads,
  embed: int,
  axis: str,
  *,
  init: param.Init,
  factor: float = 1.0,
  rngs: nnx.Rngs,
) -> nnx.Param:
  """Makes the weight of a projection to heads, (D, heads, H).

  Args:
    config: config of the layer.
    embed: width D of the activations.
    axis: logical axis of the heads: `heads`, or `kv_heads` for keys and values.
    init: initialisation of the weights.
    factor: factor of the standard deviation.
    rngs: random keys of the parameters.
  """
  H = config.head_dim
  heads = config.num_heads if axis == 'heads' else config.kv_heads
  initializer = param.initializer(
    init, fan_in=embed, fan_out=heads * H, factor=factor
  )
  axes = 'embed', axis, 'head_dim'
  return param.weight(rngs, (embed, heads, H), axes, initializer)


def bias(
  config: attention_config.Heads, axis: str, *, rngs: nnx.Rngs
) -> nnx.Param | None:
  """Makes the bias of a projection to heads; None if the layer has none.

  Arguments as for `weight`.
  """
  if not config.bias:
    return None
  heads = config.num_heads if axis == 'heads' else config.kv_heads
  shape = heads, config.head_dim
  return param.param(rngs, shape, (axis, 'head_dim'), param.zeros)


class Projections(nnx.Module):
  """The projections of an attention layer, with their biases and norms.

  Args:
    config: config of the layer.
    embed: width D of the activations.
    init: initialisation of the weights.
    out_factor: factor of the std of the output projection's weights.
    rngs: random keys of the parameters.
  """

  def __init__(
    self,
    config: attention_config.Heads,
    embed: int,
    *,
    init: param.Init,
    out_factor: float,
    rngs: nnx.Rngs,
  ):
    self.config: Any = config
    N, H = config.num_heads, config.head_dim
    # If the scores are not divided by sqrt(H), the queries' weights are.
    folded = init.scale == 'fan_in' and getattr(config, 'scale', None) == 1.0
    draw: Any = {'init': init, 'rngs': rngs}
    factor = H**-0.5 if folded else 1.0
    self.q_DNH = weight(config, embed, 'heads', factor=factor, **draw)
    self.k_DKH = weight(config, embed, 'kv_heads', **draw)
    self.v_DKH = weight(config, embed, 'kv_heads', **draw)
    out = param.initializer(
      init, fan_in=N * H, fan_out=embed, factor=out_factor
    )
    self.o_NHD = param.weight(
      rngs, (N, H, embed), ('heads', 'head_dim', 'embed'), out
    )
    self.q_bias_NH = bias(config, 'heads', rngs=rngs)
    self.k_bias_KH = bias(config, 'kv_heads', rngs=rngs)
    self.v_bias_KH = bias(config, 'kv_heads', rngs=rngs)
    self.o_bias_D = (
      param.param(rngs, (embed,), (None,), param.zeros)
      if config.has_out_bias
      else None
    )
    of_heads = norm.RMSNorm(eps=config.qk_norm_eps)
    qk_norm = lambda: norm.Norm(of_heads, H, rngs=rngs)
    self.q_norm = qk_norm() if config.qk_norm else None
    self.k_norm = qk_norm() if config.qk_norm else None

  def queries(self, x_BTD: jax.Array) -> jax.Array:
    """Projects a sequence to queries, (B, T, N, H)."""
    q_BTNH = param.project(x_BTD, self.q_DNH, 'BTD,DNH->BTNH')
    q_BTNH = param.add_bias(q_BTNH, self.q_bias_NH)
    if self.q_norm is not None:
      q_BTNH = self.q_norm(q_BTNH)
    q_BTNH = checkpoint_name(q_BTNH, 'query')
    return sharding.constrain(q_BTNH, 'batch', 'length', 'heads', None)

  def keys_and_values(self, x_BSD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Projects a sequence to keys and values, (B, S, K, H)."""
    k_BSKH = param.project(x_BSD, self.k_DKH, 'BSD,DKH->BSKH')
    v_BSKH = param.project(x_BSD, self.v_DKH, 'BSD,DKH->BSKH')
    k_BSKH = param.add_bias(k_BSKH, self.k_bias_KH)
    v_BSKH = param.add_bias(v_BSKH, self.v_bias_KH)
    if self.k_norm is not None:
      k_BSKH = self.k_norm(k_BSKH)
    axes = ('batch', 'length', 'kv_heads', None)
    k_BSKH = sharding.constrain(checkpoint_name(k_BSKH, 'key'), *axes)
    v_BSKH = sharding.constrain(checkpoint_name(v_BSKH, 'value'), *axes)
    return k_BSKH, v_BSKH

  def _out(self, out_BTNH: jax.Array) -> jax.Array:
    """Projects the heads to the output, (B, T, D)."""
    out_BTD = param.project(out_BTNH, self.o_NHD, 'BTNH,NHD->BTD')
    out_BTD = sequence_parallel.scatter(out_BTD, 'heads')
    return param.add_bias(out_BTD, self.o_bias_D)
