"""Parameters, their initialisation, and the one product that uses them."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import math
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp

Initializer = Callable[[jax.Array, Sequence[int]], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
  """How a preset draws its weights.

  Attributes:
    distribution: `truncated_normal` is cut at two standard deviations and not
      rescaled, as BERT's code does; `uniform` has the given std.
    scale: `fixed` takes `std`; `fan_in` takes std / sqrt(fan in), `fan_avg`
      std / sqrt(mean of fan in and fan out) (Glorot and Bengio, 2010).
    std: see `scale`.
    embed_std: std of token embeddings; None means `std`.
    depth_scaled: the projections that end a residual branch are divided by
      sqrt(2 num_layers) (GPT-2, Radford et al., 2019).
  """

  distribution: Literal['normal', 'truncated_normal', 'uniform'] = 'normal'
  scale: Literal['fixed', 'fan_in', 'fan_avg'] = 'fixed'
  std: float = 0.02
  embed_std: float | None = None
  depth_scaled: bool = False


def initializer(
  init: Init, *, fan_in: int = 1, fan_out: int = 1, factor: float = 1.0
) -> Initializer:
  """Returns the initializer of one matrix; `factor` multiplies its std."""
  fan = {'fixed': 1, 'fan_in': fan_in, 'fan_avg': (fan_in + fan_out) / 2}
  std = factor * init.std / math.sqrt(fan[init.scale])
  return drawn(init.distribution, std)


def drawn(distribution: str, std: float) -> Initializer:
  """Returns an initializer of the given standard deviation."""
  if distribution == 'uniform':
    bound = std * math.sqrt(3)
    return lambda key, shape: jax.random.uniform(
      key, shape, jnp.float32, -bound, bound
    )
  if distribution == 'truncated_normal':
    return lambda key, shape: (
      std * jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
    )
  return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def zeros(key: jax.Array, shape: Sequence[int]) -> jax.Array:
  del key
  return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: Sequence[int]) -> jax.Array:
  del key
  return jnp.ones(shape, jnp.float32)


def param(
  rngs: nnx.Rngs,
  shape: Sequence[int],
  axes: Sequence[str | None],
  init: Initializer,
) -> nnx.Param:
  """Makes a float32 parameter with one logical axis name per dimension."""
  assert len(shape) == len(axes), (shape, axes)
  return nnx.Param(init(rngs.params(), tuple(shape)), axes=tuple(axes))


def project(
  x: jax.Array,
  weight: nnx.Param | jax.Array,
  spec: str,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """Contracts `x` with a weight, cast to the dtype of `x`.

  Every product with a weight goes through here, so that an adapter or a
  quantised weight can stand in for a plain one.

  Args:
    x: activations.
    weight: the parameter, or a part of one.
    spec: an einsum such as 'BTD,DNH->BTNH'.
    dtype: of the result; default that of `x`.
  """
  weight = weight[...].astype(x.dtype)
  return jnp.einsum(spec, x, weight, preferred_element_type=dtype)


@jax.custom_vjp
def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
  """Returns rows of a table, ids.shape + (D,).

  The gradient is summed over the uses of a row in float32, and rounded once:
  summed in bfloat16, a row that is used a thousand times would stop growing at
  256 times its addend.
  """
  return table[ids]


def _look_up_forward(table, ids):
  return look_up(table, ids), (table, ids)


def _look_up_backward(residuals, grad):
  table, ids = residuals
  sums = jnp.zeros(table.shape, jnp.float32).at[ids].add(grad)
  return sums.astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
  """Adds a bias over the trailing dimensions, if there is one."""
  if bias is None:
    return x
  value = bias[...].astype(x.dtype)
  return x + value.reshape((1,) * (x.ndim - value.ndim) + value.shape)
