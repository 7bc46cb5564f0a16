"""Rows of buffers that are read, written and added to in place.

`active` says whether this device does the operation of the program that all
devices run. It is True where that is known when the program is traced, else a
boolean array; where that is false the operation changes nothing.
"""

from collections.abc import Sequence
from typing import Any
from typing import TypeVar

import jax
import jax.numpy as jnp

Active = bool | jax.Array
Index = int | jax.Array
# Sums of gradients by leaf; None for a leaf without a gradient.
Sums = list[jax.Array | None]
_Tree = TypeVar('_Tree')  # A tree of arrays.
_Entries = TypeVar('_Entries', list, tuple)


def at(a: jax.Array, index: Index) -> jax.Array:
  """Returns a row of an array: an entry along its first dimension."""
  return jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False)


def read(tree: _Tree, index: Index) -> _Tree:
  """Returns a row of each array."""
  return jax.tree.map(lambda a: at(a, index), tree)


def write(tree: _Tree, index: Index, values: _Tree, active: Active) -> _Tree:
  """Overwrites a row of each array where `active`."""

  def one(a: jax.Array, value: jax.Array) -> jax.Array:
    value = select(active, value, None if active is True else at(a, index))
    return jax.lax.dynamic_update_index_in_dim(
      a, value.astype(a.dtype), index, 0
    )

  return jax.tree.map(one, tree, values)


def add_at(tree: _Tree, index: Index, values: _Tree, active: Active) -> _Tree:
  """Adds to a row of each array where `active`."""

  def one(a: jax.Array, value: jax.Array) -> jax.Array:
    value = _masked(active, value.astype(a.dtype))
    return jax.lax.dynamic_update_index_in_dim(
      a, at(a, index) + value, index, 0
    )

  return jax.tree.map(one, tree, values)


def add(tree: _Tree, values: _Tree, active: Active) -> _Tree:
  """Adds to each array where `active`."""
  one = lambda a, value: a + _masked(active, value.astype(a.dtype))
  return jax.tree.map(one, tree, values)


def add_some(
  sums: dict[str, jax.Array], values: dict[str, jax.Array], active: Active
) -> dict[str, jax.Array]:
  """Adds `values` to the sums of the same names; the other sums stay."""
  return sums | add({name: sums[name] for name in values}, values, active)


def add_leaves(
  leaves: Sums,
  indices: Sequence[int],
  values: Sequence[jax.Array],
  active: Active,
) -> Sums:
  """Adds gradients to the sums of some leaves.

  Args:
    leaves: sum of each leaf's gradients.
    indices: index among `leaves` of each value.
    values: gradients to be added.
    active: whether they are added.
  """
  leaves = list(leaves)
  # Without the barrier the compiler sums the values of each device over all
  # ticks and reduces that sum after the loop: it adds in every tick, whether
  # there is a gradient or not.
  values = jax.lax.optimization_barrier(list(values))
  for index, value in zip(indices, values):
    leaves[index] = add(leaves[index], value, active)
  return leaves


def accumulate(
  indices: Sequence[int],
  values: Sequence[jax.Array],
  own: Sums,
  shared: Sums,
  slot: Index,
  active: Active,
) -> tuple[Sums, Sums]:
  """Adds a layer's gradients to sums for its own leaves and for shared ones.

  Args:
    indices: index of each value's leaf, counted through the layer's own leaves
      and then through those of the model.
    values: gradients to be added.
    own: sums for the leaves of the layer's own parameters, (N, ...) each, a row
      for each slot.
    shared: sums for the leaves of the model's parameters.
    slot: slot of the layer's unit on this device.
    active: whether anything is added.

  Returns:
    `own` and `shared` with the gradients added.
  """
  own, shared = list(own), list(shared)
  for index, value in zip(indices, values):
    if index < len(own):
      own[index] = add_at(own[index], slot, value, active)
    else:
      index -= len(own)
      shared[index] = add(shared[index], value, active)
  return own, shared


def _masked(active: Active, value: jax.Array) -> jax.Array:
  return value if active is True else jnp.where(active, value, 0)


def both(a: Active, b: Active) -> Active:
  """Returns whether both are active."""
  return b if a is True else a if b is True else a & b


def select(active: Active, new: _Tree, old: Any) -> _Tree:
  """Returns `new` where `active`, else `old`.

  Where `active` is True `old` is not used and may be anything.
  """
  if active is True:
    return new
  return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)


def with_item(values: _Entries, index: int, value: Any) -> _Entries:
  """Returns a list or tuple with another value at an index."""
  return type(values)((*values[:index], value, *values[index + 1 :]))


def zeros(shapes: Any, num: int) -> Any:
  """Returns an array of zeros, (num, ...), for each shape of a tree."""
  one = lambda s: jnp.zeros((num, *s.shape), s.dtype)
  return jax.tree.map(one, shapes)
