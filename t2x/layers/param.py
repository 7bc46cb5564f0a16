"""Parameters: how they are drawn, and the products that use them."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import functools
import math
from typing import Literal
from typing import TypeVar

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from t2x.layers import grouped
from t2x.parallel import sharding

PRODUCT = 'product'  # Name of the results of `project`, for `remat`.

Tree = TypeVar('Tree')
Initializer = Callable[[jax.Array, Sequence[int]], jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Init:
  """Initialisation of a model's weights.

  Attributes:
    distribution: distribution of the weights; `truncated_normal` is cut at two
      standard deviations and not rescaled, as in BERT's code; `uniform` has the
      given std.
    scale: rule for the std of a matrix; `fixed` takes `std`, `fan_in` std /
      sqrt(fan in), and `fan_avg` std / sqrt(mean of fan in and fan out) (Glorot
      and Bengio, 2010).
    std: standard deviation, before `scale`.
    embed_std: standard deviation of token embeddings; None means `std`.
    depth_scaled: whether the projections that end a residual branch are divided
      by sqrt(2 num_layers) (GPT-2, Radford et al., 2019).
  """

  distribution: Literal['normal', 'truncated_normal', 'uniform'] = 'normal'
  scale: Literal['fixed', 'fan_in', 'fan_avg'] = 'fixed'
  std: float = 0.02
  embed_std: float | None = None
  depth_scaled: bool = False


def initializer(
  init: Init, *, fan_in: int = 1, fan_out: int = 1, factor: float = 1.0
) -> Initializer:
  """Returns the initializer of a matrix.

  Args:
    init: the model's initialisation.
    fan_in: number of inputs of the matrix.
    fan_out: number of outputs of the matrix.
    factor: factor of the standard deviation.
  """
  fan = {'fixed': 1, 'fan_in': fan_in, 'fan_avg': (fan_in + fan_out) / 2}
  std = factor * init.std / math.sqrt(fan[init.scale])
  return make_initializer(init.distribution, std)


def make_initializer(distribution: str, std: float) -> Initializer:
  """Returns an initializer of a distribution and a standard deviation."""
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
  """Initialises with zeros, float32; an `Initializer`."""
  del key
  return jnp.zeros(shape, jnp.float32)


def ones(key: jax.Array, shape: Sequence[int]) -> jax.Array:
  """Initialises with ones, float32; an `Initializer`."""
  del key
  return jnp.ones(shape, jnp.float32)


def param(
  rngs: nnx.Rngs,
  shape: Sequence[int],
  axes: Sequence[str | None],
  init: Initializer,
) -> nnx.Param:
  """Makes a float32 parameter.

  Args:
    rngs: random keys of the parameters.
    shape: shape of the parameter.
    axes: logical axis of each dimension, or None for one that is not split.
    init: initializer of the parameter.
  """
  assert len(shape) == len(axes), (shape, axes)
  return nnx.Param(init(rngs.params(), tuple(shape)), axes=tuple(axes))


def weight(
  rngs: nnx.Rngs,
  shape: Sequence[int],
  axes: Sequence[str | None],
  init: Initializer,
) -> nnx.Param:
  """Makes a parameter that is only used in the dtype of the activations.

  Arguments as for `param`.
  """
  value = param(rngs, shape, axes, init)[...]
  return nnx.Param(value, axes=tuple(axes), weight=True)


@jax.named_scope('weights')
def weights_in(tree: Tree, dtype: jax.typing.DTypeLike) -> Tree:
  """Casts the weights of a module to the dtype in which they are used.

  Under `jax.grad` the gradients have that dtype too, until they are used. In
  bfloat16 this halves the memory of a stack's gradients and changes no number,
  since the gradients are computed in that precision anyway.

  Args:
    tree: a module, or a tree of them.
    dtype: dtype of the activations.
  """

  def cast(x: object) -> object:
    if not isinstance(x, nnx.Variable) or not x.get_metadata().get('weight'):
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

  All products with weights go through this function, so that an adapter or a
  quantised weight can replace a plain one.

  Args:
    x: activations.
    weight: the parameter, or a part of one.
    spec: einsum, such as 'BTD,DNH->BTNH'.
    dtype: dtype of the result; None is that of `x`.
    precision: precision of the products; None is the device's default.
  """
  value = weight[...]
  # The gradient has the dtype of `value` when devices sum it.
  if not sharding.reduces_in_float32():
    value = value.astype(x.dtype)
  return checkpoint_name(_product(x, value, spec, dtype, precision), PRODUCT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _product(
  x: jax.Array,
  weight: jax.Array,
  spec: str,
  dtype: jax.typing.DTypeLike | None,
  precision: jax.lax.Precision | None,
) -> jax.Array:
  weight = weight.astype(x.dtype)
  spec, x, weight = _merged(spec, x, weight)
  return jnp.einsum(
    spec, x, weight, preferred_element_type=dtype, precision=precision
  )


def _merged(
  spec: str, x: jax.Array, weight: jax.Array
) -> tuple[str, jax.Array, jax.Array]:
  """Merges the contracted dimensions if each row has a single token.

  On CPUs XLA transposes a weight with two contracted dimensions before the
  product, which for one token a row takes four times as long as the product.
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


def _product_forward(
  x: jax.Array,
  weight: jax.Array,
  spec: str,
  dtype: jax.typing.DTypeLike | None,
  precision: jax.lax.Precision | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return _product(x, weight, spec, dtype, precision), (x, weight)


def _product_backward(
  spec: str,
  dtype: jax.typing.DTypeLike | None,
  precision: jax.lax.Precision | None,
  residuals: tuple[jax.Array, jax.Array],
  grad: jax.Array,
) -> tuple[jax.Array, jax.Array]:
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

  XLA transposes the left factor of a product over tokens, with everything that
  it fuses into it (the sums of the residual stream, an activation function).
  JAX makes the gradient the left factor; this function takes the factor with
  fewer entries.

  Args:
    x: activations of the product.
    grad: gradient of the product's result.
    spec: einsum of the product.
    dtype: dtype of the result; None is that of the factors.
    precision: precision of the products; None is the device's default.
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
  """Multiplies each group of rows with its own matrix.

  Args:
    x_PD: rows of group 0, then those of group 1, and so on; rows after the last
      group give zeros.
    weight: matrix of each group, (E, D, F).
    sizes_E: number of rows of each group.
    num_rows: number of rows in all groups, in the mean over devices, for
      counting FLOPs; None is all rows.

  Returns:
    (P, F) in the dtype of `x_PD`.
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
  """Looks up rows of a table.

  The gradients of a row are summed in float32 and rounded once. In bfloat16 the
  sum for a row that is used a thousand times would stop growing at 256 times
  one of its terms.

  Args:
    table: the table, (V, D).
    ids: numbers of rows.

  Returns:
    Rows, ids.shape + (D,).
  """
  return table[ids]


def _look_up_forward(
  table: jax.Array, ids: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return look_up(table, ids), (table, ids)


def _look_up_backward(
  residuals: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, None]:
  table, ids = residuals
  sums = jnp.zeros(table.shape, jnp.float32).at[ids].add(grad)
  return sums.astype(table.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)


def add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
  """Adds a bias to the last dimensions; None adds nothing."""
  if bias is None:
    return x
  value = bias[...]
  value = value.reshape((1,) * (x.ndim - value.ndim) + value.shape)
  if sharding.reduces_in_float32():
    return (x.astype(value.dtype) + value).astype(x.dtype)
  return x + value.astype(x.dtype)
