"""Sequence parallelism: layers that read and write a finely split sequence.

Between layers, `rules.norm_length` may split a sequence over more axes than
`rules.length` does within them: over those that split the layers' weights
(Korthikanti et al., 2022). A layer then gathers its input along the sequence,
computes with its part of the weights, and what it adds to the output is summed
and scattered at once. The partitioner would sum it first, whole, so the layer
runs in a `shard_map` that is manual over these axes.

Shape suffixes: B batch, T position, D embed, C parts of the sequence within
layers.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from t2x.parallel import manual_sharding
from t2x.parallel import sharding


def run(fn: Callable[..., jax.Array], layer: Any, x_BTD: jax.Array, rest: Any):
  """Returns fn(layer, x_BTD, rest), whose weights and sequence are split.

  Args:
    fn: applies `layer`; calls `gather` on its input and `scatter` on its
      output.
    layer: its parameters live where the rules say.
    x_BTD: the input, whole or split along the sequence.
    rest: other arguments, whole along the fine axes but for parameters.
  """
  axes = manual_sharding.fine_axes()
  if not axes:
    x_BTD = sharding.constrain(x_BTD, 'batch', 'length', 'act_embed')
    return fn(layer, x_BTD, rest)
  parts = manual_sharding.num_parts('length')
  shape = x_BTD.shape
  # The coarse split stays the partitioner's, so it has a dimension of its own.
  x_BCTD = x_BTD.reshape(shape[0], parts, -1, shape[-1])
  fine = P(None, None, axes)

  def local(layer, x_BCTD, rest):
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
  """Returns the sequence as a layer needs it; the identity outside `run`."""
  axes = manual_sharding.fine_axes(manual=True)
  if not axes:
    return x_BTD
  return _exchange(
    lambda x_BCTD: jax.lax.all_gather(x_BCTD, axes, axis=2, tiled=True), x_BTD
  )


def scatter(x_BTD: jax.Array, axis: str) -> jax.Array:
  """Sums what devices add to an output; each keeps its part of the sequence.

  The identity outside `run`.

  Args:
    x_BTD: what this device adds.
    axis: logical axis over which the last product summed; devices that have
      it whole have the same output, not parts of one.
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


def _exchange(fn, x_BTD):
  """Runs a collective on the coarse parts of a sequence, (B, C, T, D)."""
  shape = x_BTD.shape
  x_BCTD = x_BTD.reshape(
    shape[0], manual_sharding.num_parts('length'), -1, shape[-1]
  )
  x_BCTD = manual_sharding.on_parts(fn, x_BCTD, 'batch', 'length', None, None)
  return x_BCTD.reshape(shape[0], -1, shape[-1])


def _specs(tree, axes):
  """The split of parameters over `axes`; everything else is whole."""

  def spec(leaf):
    if not sharding.is_variable(leaf):
      return P()
    return manual_sharding.manual_spec(leaf, axes)

  return jax.tree.map(spec, tree, is_leaf=sharding.is_variable)
