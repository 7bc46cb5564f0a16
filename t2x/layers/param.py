"""Parameters, their initialisation, and the one product that uses them."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Any
from typing import Literal

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from t2x.layers import grouped
from t2x.parallel import sharding

PRODUCT = 'product'  # What `project` calls its results, for `remat`.

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


def weight(
  rngs: nnx.Rngs,
  shape: Sequence[int],
  axes: Sequence[str | None],
  init: Initializer,
) -> nnx.Param:
  """Makes a parameter that is used in the dtype of the activations alone."""
  value = param(rngs, shape, axes, init)[...]
  return nnx.Param(value, axes=tuple(axes), weight=True)


@jax.named_scope('weights')
def weights_in(tree: Any, dtype: jax.typing.DTypeLike) -> Any:
  """Returns a module with its weights in the dtype that they are used in.

  Under `jax.grad` their gradients then have it too, from where they are made
  until they are used: half the memory of a stack in bfloat16, and the same
  numbers, since no more than that is in them.
  """

  def cast(x):
    if not sharding.is_variable(x) or not x.get_metadata().get('weight'):
      return x
    return jax.tree.map(lambda value: value.astype(dtype), x)

  return jax.tree.map(cast, tree, is_leaf=sharding.is_variable)


def project(
  x: jax.Array,
  weight: nnx.Param | jax.Array,
  spec: str,
  dtype: jax.typing.DTypeLike | None = None,
  precision: jax.lax.Precision | None = None,
) -> jax.Array:
  """Contracts `x` with a weight, cast to the dtype of `x`.

  Every product with a weight goes through here, so that an adapter or a
  quantised weight can stand in for a plain one.

  Args:
    x: activations.
    weight: the parameter, or a part of one.
    spec: an einsum such as 'BTD,DNH->BTNH'.
    dtype: of the result; default that of `x`.
    precision: of the products; default that of the device.
  """
  value = weight[...]
  # Devices sum its gradient in the dtype that it has here.
  if not sharding.reduces_in_float32():
    value = value.astype(x.dtype)
  return checkpoint_name(_product(x, value, spec, dtype, precision), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(x, weight, spec, dtype, precision):
  weight = weight.astype(x.dtype)
  spec, x, weight = _merged(spec, x, weight)
  return jnp.einsum(
    spec, x, weight, preferred_element_type=dtype, precision=precision
  )


def _merged(spec: str, x: jax.Array, weight: jax.Array):
  """Makes one dimension of those that single tokens contract.

  XLA transposes a weight with two contracted dimensions before the product on
  CPUs: for one token of each row that takes four times as long as the product.
  """
  x_axes, w_axes, out = _axes(spec)
  both = ''.join(a for a in x_axes if a in w_axes)
  ends = x_axes.endswith(both) and w_axes.startswith(both)
  if len(both) < 2 or not ends or x.shape[1] != 1:
    return spec, x, weight
  x = x.reshape(*x.shape[: -len(both)], -1)
  weight = weight.reshape(x.shape[-1], *weight.shape[len(both) :])
  first = both[0]
  spec = f'{x_axes.replace(both, first)},{w_axes.replace(both, first)}->{out}'
  return spec, x, weight


def _product_forward(x, weight, spec, dtype, precision):
  return _product(x, weight, spec, dtype, precision), (x, weight)


def _product_backward(spec, dtype, precision, residuals, grad):
  del dtype
  x, weight = residuals
  grad = grad.astype(x.dtype)
  x_axes, w_axes, out = _axes(spec)
  d_x = jnp.einsum(
    f'{out},{w_axes}->{x_axes}',
    grad,
    weight.astype(x.dtype),
    precision=precision,
  )
  d_weight = weight_gradient(x, grad, spec, weight.dtype, precision)
  return d_x, d_weight.astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)


def weight_gradient(
  x: jax.Array,
  grad: jax.Array,
  spec: str,
  dtype: jax.typing.DTypeLike | None = None,
  precision: jax.lax.Precision | None = None,
) -> jax.Array:
  """Returns the gradient of the weight of `project`, in the weight's layout.

  The left factor of a product over tokens is transposed on its way, together
  with all that XLA fuses into it (a residual stream's whole chain of sums, an
  activation function). JAX puts the gradient there; here it is whichever
  factor is narrower.

  Args:
    x: the activations that met the weight.
    grad: the gradient of the product.
    spec: as for `project`.
    dtype: of the result; default that of the factors.
    precision: of the products; default that of the device.
  """
  x_axes, w_axes, out = _axes(spec)
  size = dict(zip(x_axes + out, x.shape + grad.shape))
  width = lambda axes: math.prod(size[a] for a in axes if a in w_axes)
  factors = [(x_axes, x), (out, grad)]
  if width(x_axes) > width(out):
    factors.reverse()
  (first_axes, first), (second_axes, second) = factors
  batch = [a for a in w_axes if a in x_axes and a in out]
  kept = [a for a in first_axes + second_axes if a in w_axes and a not in batch]
  made = ''.join(batch + kept)
  product = jnp.einsum(
    f'{first_axes},{second_axes}->{made}',
    first,
    second,
    preferred_element_type=dtype,
    precision=precision,
  )
  return product.transpose([made.index(a) for a in w_axes])


def project_groups(
  x_PD: jax.Array,
  weight: nnx.Param | jax.Array,
  sizes_E: jax.Array,
  num_rows: int | None = None,
) -> jax.Array:
  """Multiplies the rows of `x`, group by group, with matrices of their own.

  Args:
    x_PD: the rows of group 0, then those of group 1, and so on; what comes
      after the last group gives zeros.
    weight: (E, D, F).
    sizes_E: rows of each group.
    num_rows: of all groups, in the mean over devices; None is all of `x`.
  """
  value = weight[...].astype(x_PD.dtype)
  product = grouped.multiply(x_PD, value, sizes_E, num_rows=num_rows)
  return checkpoint_name(product, PRODUCT)


def _axes(spec: str) -> tuple[str, str, str]:
  factors, out = spec.split('->')
  x_axes, w_axes = factors.split(',')
  return x_axes, w_axes, out


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
  value = bias[...]
  value = value.reshape((1,) * (x.ndim - value.ndim) + value.shape)
  if sharding.reduces_in_float32():
    return (x.astype(value.dtype) + value).astype(x.dtype)
  return x + value.astype(x.dtype)
