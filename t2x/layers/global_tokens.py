"""Longformer's projections of global tokens (Beltagy et al., 2020, 3.2).

Shape suffixes: B batch, T position, D embed, N heads, H head dim.
"""

from typing import Any

from flax import nnx
import jax

from t2x.layers import attention_config
from t2x.layers import attention_projections
from t2x.layers import param


class GlobalTokens(nnx.Module):
  """Separate projections to the queries, keys and values of global tokens.

  Args:
    config: config of the layer.
    embed: width D of the activations.
    init: initialisation of the weights.
    rngs: random keys of the parameters.
  """

  def __init__(
    self,
    config: attention_config.Heads,
    embed: int,
    *,
    init: param.Init,
    rngs: nnx.Rngs,
  ):
    draw: Any = {'init': init, 'rngs': rngs}
    weight = lambda: attention_projections.weight(
      config, embed, 'heads', **draw
    )
    bias = lambda: attention_projections.bias(config, 'heads', rngs=rngs)
    self.q_DNH, self.k_DNH, self.v_DNH = weight(), weight(), weight()
    self.q_bias_NH, self.k_bias_NH, self.v_bias_NH = bias(), bias(), bias()

  def __call__(
    self, x_BTD: jax.Array, num: int
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Projects a sequence.

    Args:
      x_BTD: the sequence.
      num: number of global tokens, the first ones.

    Returns:
      Queries of the global tokens, (B, num, N, H), and keys and values of all
      tokens, (B, T, N, H).
    """
    product = lambda x, weight, bias: param.add_bias(
      param.project(x, weight, 'BTD,DNH->BTNH'), bias
    )
    return (
      product(x_BTD[:, :num], self.q_DNH, self.q_bias_NH),
      product(x_BTD, self.k_DNH, self.k_bias_NH),
      product(x_BTD, self.v_DNH, self.v_bias_NH),
    )
