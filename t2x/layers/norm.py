"""LayerNorm and RMSNorm, computed in float32."""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from t2x.layers import param


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerNorm:
  """Config of layer normalisation (Ba et al., 2016).

  Attributes:
    eps: epsilon that is added to the variance.
    bias: whether a bias is added after the scale.
  """

  kind: ClassVar[str] = 'layernorm'
  unit_offset = False  # A field of RMSNorm.
  eps: float = 1e-5
  bias: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class RMSNorm:
  """Config of RMS normalisation (Zhang and Sennrich, 2019): no mean, no bias.

  Attributes:
    eps: epsilon that is added to the mean square.
    unit_offset: whether the scale is 1 plus a parameter that starts at 0
      (Gemma).
  """

  kind: ClassVar[str] = 'rmsnorm'
  eps: float = 1e-6
  unit_offset: bool = False


NormConfig = LayerNorm | RMSNorm


class Norm(nnx.Module):
  """Normalises the last dimension.

  >>> norm = Norm(RMSNorm(), 8, rngs=nnx.Rngs(0))
  >>> norm(jnp.ones((2, 3, 8))).shape
  (2, 3, 8)
  """

  def __init__(self, config: NormConfig, size: int, *, rngs: nnx.Rngs):
    self.config = config
    self.offset = 1.0 if config.unit_offset else 0.0
    start = param.zeros if self.offset else param.ones
    # A scale is small and used whole: no mesh axis splits it.
    self.scale = param.param(rngs, (size,), (None,), start)
    has_bias = isinstance(config, LayerNorm) and config.bias
    self.bias = (
      param.param(rngs, (size,), (None,), param.zeros) if has_bias else None
    )

  def __call__(self, x: jax.Array) -> jax.Array:
    """Returns normalised `x`, in its own dtype."""
    y = x.astype(jnp.float32)
    if isinstance(self.config, LayerNorm):
      y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(
      jnp.square(y).mean(-1, keepdims=True) + self.config.eps
    )
    shape = (1,) * (x.ndim - 1) + (-1,)
    y = y * (self.scale[...] + self.offset).reshape(shape)
    if self.bias is not None:
      y = y + self.bias[...].reshape(shape)
    return y.astype(x.dtype)
