"""Sequence parallelism: activations between layers are split more finely.

Between layers, `rules.norm_length` may split a sequence over more axes than
`rules.length` does within them, namely those that split the layers' weights
(Korthikanti et al., 2022). A layer then gathers its input along the sequence,
computes with its part of the weights, and sums and scatters its output in one
collective. The partitioner would sum the whole output first, so the layer runs
in a `shard_map` that is manual over these "fine" axes.

Shape suffixes: B batch, T position, D embed, C parts of the sequence within
layers.
"""

from collections.abc import Callable
from typing import Any
from typing import TypeVar

from flax import nnx
import jax
from jax.sharding import PartitionSpec as P

from t2x.parallel import manual_sharding
from t2x.parallel import sharding

Layer = TypeVar('Layer')
Rest = TypeVar('Rest')


def run(
  fn: Callable[[Layer, jax.Array, Rest], jax.Array],
  layer: Layer,
  x_BTD: jax.Array,
  rest: Rest,
) -> jax.Array:
  """Returns fn(layer, x_BTD, rest), with the sequence split by the fine axes.

  Args:
    fn: function that applies `layer`, which calls `gather` on its input and
      `scatter` on its output.
    layer: module whose parameters are sharded by the active rules.
    x_BTD: input, whole or split along the sequence.
    rest: other arguments; the fine axes split only parameters in it.

  Returns:
    The output, (B, T, D).
  """
  axes = manual_sharding.fine_axes()
  if not axes:
    x_BTD = sharding.constrain(x_BTD, 'batch', 'length', 'act_embed')
    return fn(layer, x_BTD, rest)
  parts = manual_sharding.num_parts('length')
  shape = x_BTD.shape
  # The partitioner keeps the coarse split, in a dimension of its own.
  x_BCTD = x_BTD.reshape(shape[0], parts, -1, shape[-1])
  fine = P(None, None, axes)

  def local(layer: Layer, x_BCTD: jax.Array, rest: Rest) -> jax.Array:
    x_BTD = x_BCTD.reshape(x_BCTD.shape[0], -1, x_BCTD.shape[-1])
    out_BTD = fn(layer, x_BTD, rest)
    return out_BTD.reshape(*x_BCTD.shape[:-1], -1)

  out_BCTD = jax.shard_map(
    local,
    in_specs=(_specs(layer, axes), fine, _specs(rest, axes)),
    out_specs=fine,
    axis_names=set(axes),
    check_vma=False,
  )(layer, x_BCTD, rest)
  return out_BCTD.reshape(shape)


def gather(x_BTD: jax.Array) -> jax.Array:
  """Gathers a layer's input along the fine axes; the identity outside `run`."""
  axes = manual_sharding.fine_axes(manual=True)
  if not axes:
    return x_BTD
  return _exchange(
    lambda x_BCTD: jax.lax.all_gather(x_BCTD, axes, axis=2, tiled=True), x_BTD
  )


def scatter(x_BTD: jax.Array, axis: str) -> jax.Array:
  """Sums a layer's output over the fine axes and scatters it along them.

  The identity outside `run`.

  Args:
    x_BTD: output of this device, a term of the sum.
    axis: logical axis that the last product contracts. Devices along mesh axes
      that do not split it have equal outputs, which are divided first.
  """
  axes = manual_sharding.fine_axes(manual=True)
  if not axes:
    return x_BTD
  parts = sharding.active_axes(axis)
  same = tuple(a for a in axes if a not in parts)
  x_BTD = x_BTD / jax.lax.axis_size(same) if same else x_BTD
  return _exchange(
    lambda x_BCTD: jax.lax.psum_scatter(
      x_BCTD, axes, scatter_dimension=2, tiled=True
    ),
    x_BTD,
  )


def _exchange(
  fn: Callable[[jax.Array], jax.Array], x_BTD: jax.Array
) -> jax.Array:
  """Runs a collective on the coarse parts of a sequence, (B, C, T, D)."""
  shape = x_BTD.shape
  x_BCTD = x_BTD.reshape(
    shape[0], manual_sharding.num_parts('length'), -1, shape[-1]
  )
  x_BCTD = manual_sharding.on_parts(fn, x_BCTD, 'batch', 'length', None, None)
  return x_BCTD.reshape(shape[0], -1, shape[-1])


def _specs(tree: Any, axes: tuple[str, ...]) -> Any:
  """Returns how `axes` split parameters; everything else is whole."""

  def spec(leaf: object) -> P:
    if not isinstance(leaf, nnx.Variable):
      return P()
    return manual_sharding.manual_spec(leaf, axes)

  return jax.tree.map(spec, tree, is_leaf=sharding.is_variable)
