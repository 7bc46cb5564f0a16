"""Rows of buffers, read, written and summed in place.

`active` says whether this device does what all do: True where it is known to,
else a boolean, and then what it does not do changes nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp


def at(a, index):
  """Returns a row of an array."""
  return jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False)


def read(tree, index):
  """Returns a row of each array."""
  return jax.tree.map(lambda a: at(a, index), tree)


def write(tree, index, values, active):
  """Overwrites a row, or leaves it as it is where not `active`."""

  def one(a, value):
    value = select(active, value, None if active is True else at(a, index))
    return jax.lax.dynamic_update_index_in_dim(
      a, value.astype(a.dtype), index, 0
    )

  return jax.tree.map(one, tree, values)


def add_at(tree, index, values, active):
  """Adds to a row of each array."""

  def one(a, value):
    value = _masked(active, value.astype(a.dtype))
    return jax.lax.dynamic_update_index_in_dim(
      a, at(a, index) + value, index, 0
    )

  return jax.tree.map(one, tree, values)


def add(tree, values, active):
  """Adds to each array."""
  one = lambda a, value: a + _masked(active, value.astype(a.dtype))
  return jax.tree.map(one, tree, values)


def add_some(sums, values, active):
  """Adds to some of the sums, by name."""
  return sums | add({name: sums[name] for name in values}, values, active)


def add_leaves(leaves, indices, values, active):
  """Adds gradients to sums, by the place of each leaf."""
  leaves = list(leaves)
  # Else the compiler sums what devices have each, and reduces the sum after the
  # loop: in every tick, whether anything came or not.
  values = jax.lax.optimization_barrier(list(values))
  for index, value in zip(indices, values):
    leaves[index] = add(leaves[index], value, active)
  return leaves


def accumulate(indices, values, own, shared, slot, active):
  """Adds gradients, by place: a layer's own leaves, then the model's."""
  own, shared = list(own), list(shared)
  for index, value in zip(indices, values):
    if index < len(own):
      own[index] = add_at(own[index], slot, value, active)
    else:
      index -= len(own)
      shared[index] = add(shared[index], value, active)
  return own, shared


def _masked(active, value):
  return value if active is True else jnp.where(active, value, 0)


def both(a, b):
  """Returns whether both are active."""
  return b if a is True else a if b is True else a & b


def select(active, new, old):
  """Returns `new` where active, else `old`, which may be anything if always."""
  if active is True:
    return new
  return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)


def replaced(values, index, value):
  """Returns a list or tuple with another value at a place."""
  return type(values)((*values[:index], value, *values[index + 1 :]))


def zeros(shapes: Any, num: int) -> Any:
  """Returns zeros (num, ...) for each shape."""
  one = lambda s: jnp.zeros((num, *s.shape), s.dtype)
  return jax.tree.map(one, shapes)
