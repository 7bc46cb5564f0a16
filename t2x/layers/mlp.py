"""The feed-forward layer, plain or gated.

Shape suffixes: B batch, T position, D embed, F feed-forward.
"""

import dataclasses
from typing import ClassVar
from typing import Literal

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from t2x import field_checks
from t2x.layers import dropout
from t2x.layers import param
from t2x.layers import sequence_parallel
from t2x.parallel import manual_sharding
from t2x.parallel import sharding

_ACTIVATIONS = {
  'relu': jax.nn.relu,
  'gelu': lambda x: jax.nn.gelu(x, approximate=False),
  'gelu_tanh': lambda x: jax.nn.gelu(x, approximate=True),
  'silu': jax.nn.silu,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MlpConfig:
  """Config of the feed-forward layer.

  Attributes:
    hidden: width F between the two products.
    activation: name of the activation function; `gelu_tanh` is the tanh
      approximation of GPT-2 and T5 1.1.
    gated: whether the last product is of act(x gate) * (x up) (Shazeer, 2020):
      SwiGLU is gated `silu`, GEGLU gated `gelu`.
    bias: whether both products have biases; a gate never has one.
    dropout: dropout rate of the hidden activations (T5, Transformer).
  """

  kind: ClassVar[str] = 'mlp'
  hidden: int = 1024
  activation: Literal['relu', 'gelu', 'gelu_tanh', 'silu'] = 'gelu_tanh'
  gated: bool = False
  bias: bool = True
  dropout: float = 0.0

  def __post_init__(self) -> None:
    field_checks.least(self, 'mlp.', hidden=1)
    field_checks.share(self, 'mlp.', 'dropout')


class Mlp(nnx.Module):
  """The feed-forward layer: act(x up) down, or act(x gate) * (x up) down."""

  def __init__(
    self,
    config: MlpConfig,
    embed: int,
    *,
    init: param.Init,
    out_factor: float,
    rngs: nnx.Rngs,
  ):
    self.config = config
    F = config.hidden
    into = param.initializer(init, fan_in=embed, fan_out=F)
    out = param.initializer(init, fan_in=F, fan_out=embed, factor=out_factor)
    axes = ('embed', 'mlp')
    gated = config.gated
    self.gate_DF = param.weight(rngs, (embed, F), axes, into) if gated else None
    self.up_DF = param.weight(rngs, (embed, F), axes, into)
    self.down_FD = param.weight(rngs, (F, embed), ('mlp', 'embed'), out)
    bias = lambda size, axis: param.param(rngs, (size,), (axis,), param.zeros)
    self.up_bias_F = bias(F, 'mlp') if config.bias else None
    self.down_bias_D = bias(embed, None) if config.bias else None

  def __call__(
    self, x_BTD: jax.Array, keys_B: jax.Array | None = None, zigzag: int = 1
  ) -> jax.Array:
    """Applies the layer.

    Args:
      x_BTD: input.
      keys_B: dropout key of each row; None means no dropout.
      zigzag: number of devices over which the tokens of a row are in zigzag
        order.

    Returns:
      (B, T, D).
    """
    act = _ACTIVATIONS[self.config.activation]
    x_BTD = sequence_parallel.gather(x_BTD)
    up_BTF = param.project(x_BTD, self.up_DF, 'BTD,DF->BTF')
    up_BTF = checkpoint_name(param.add_bias(up_BTF, self.up_bias_F), 'mlp_up')
    if self.gate_DF is None:
      hidden_BTF = act(up_BTF)
    else:
      gate_BTF = param.project(x_BTD, self.gate_DF, 'BTD,DF->BTF')
      hidden_BTF = act(checkpoint_name(gate_BTF, 'mlp_gate')) * up_BTF
    hidden_BTF = sharding.constrain(hidden_BTF, 'batch', 'length', 'mlp')
    first, _ = manual_sharding.manual_part('mlp', self.config.hidden)
    hidden_BTF = dropout.dropout(
      hidden_BTF, self.config.dropout, keys_B, zigzag, first_feature=first
    )
    out_BTD = param.project(hidden_BTF, self.down_FD, 'BTF,FD->BTD')
    out_BTD = sequence_parallel.scatter(out_BTD, 'mlp')
    return param.add_bias(out_BTD, self.down_bias_D)


def activation(name: str, x: jax.Array) -> jax.Array:
  """Applies the activation function of a name, as in `MlpConfig`."""
  return _ACTIVATIONS[name](x).astype(jnp.result_type(x))
