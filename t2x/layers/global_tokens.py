"""Longformer's weights for global tokens (Beltagy et al., 2020, section 3.2).

Shape suffixes: B batch, T position, D embed, N heads, H head dim.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax

from t2x.layers import param


class GlobalTokens(nnx.Module):
  """Queries, keys and values for global tokens, by weights of their own."""

  def __init__(self, weight: Callable[[], Any], bias: Callable[[], Any]):
    self.q_DNH, self.k_DNH, self.v_DNH = weight(), weight(), weight()
    self.q_bias_NH, self.k_bias_NH, self.v_bias_NH = bias(), bias(), bias()

  def __call__(self, x_BTD: jax.Array, num: int):
    """Returns queries (B, num, N, H) of the first tokens; keys and values."""
    product = lambda x, weight, bias: param.add_bias(
      param.project(x, weight, 'BTD,DNH->BTNH'), bias
    )
    return (
      product(x_BTD[:, :num], self.q_DNH, self.q_bias_NH),
      product(x_BTD, self.k_DNH, self.k_bias_NH),
      product(x_BTD, self.v_DNH, self.v_bias_NH),
    )
