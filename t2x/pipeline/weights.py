"""The way of a tower's weights from where they are kept to where they are used.

A stack of U units is kept in one form whatever the pipeline: (U, ...). Where
each stage uses the units that follow those of the stage before, as many as
every other, `pipe` splits the first dimension and nothing moves. Else (chunks,
uneven stages) it splits another dimension, so that every device keeps the same
share, and an all-to-all brings each its units once a step, and the gradients
back. What no dimension of divides is kept by all.

Shape suffixes: S stages, N slots of a device, U units.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from t2x import sharding
from t2x import shards

PIPE = sharding.PIPE


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
  """How one stacked parameter travels.

  Attributes:
    dim: that `pipe` splits where it is kept; 0 means that nothing moves, None
      that all have it.
    axes: logical names of the dimensions after the first.
    unit_SN: the unit in each slot; -1 where there is none.
    num_units: U.
  """

  dim: int | None
  axes: tuple[str | None, ...]
  unit_SN: np.ndarray
  num_units: int

  @property
  def spec(self) -> P:
    if self.dim is None:
      return P()
    return P(*[None] * self.dim, PIPE)

  def fetch(self, x_U: jax.Array) -> jax.Array:
    """Returns (N, ...) of this device's share of (U, ...)."""
    if self.dim == 0:
      return x_U
    unit_SN = jnp.asarray(np.maximum(self.unit_SN, 0))
    if self.dim is None:
      return x_U[unit_SN[jax.lax.axis_index(PIPE)]]
    dim = self.dim + 1
    exchange = lambda a: jax.lax.all_to_all(a, PIPE, 0, dim, tiled=True)
    return shards.on_parts(exchange, x_U[unit_SN], *self._names)[0]

  def give_back(self, x_N: jax.Array) -> jax.Array:
    """Returns this device's share of (U, ...), of sums (N, ...)."""
    if self.dim == 0:
      return x_N
    if self.dim is None:
      mine_N = jnp.asarray(self.unit_SN)[jax.lax.axis_index(PIPE)]
      return jax.lax.psum(self._scattered(x_N, mine_N), PIPE)
    dim = self.dim + 1
    exchange = lambda a: jax.lax.all_to_all(a, PIPE, dim, 0, tiled=True)
    x_SN = shards.on_parts(exchange, x_N[None], *self._names)
    flat = x_SN.reshape(-1, *x_SN.shape[2:])
    return self._scattered(flat, jnp.asarray(self.unit_SN.reshape(-1)))

  @property
  def _names(self) -> list[str | None]:
    assert self.dim is not None
    names: list[str | None] = [None, None, *self.axes]
    names[self.dim + 1] = None  # All of it is here or there.
    return names

  def _scattered(self, x, units):
    zeros = jnp.zeros((self.num_units, *x.shape[1:]), x.dtype)
    # Slots without a unit point past the end, and are dropped.
    units = jnp.where(units < 0, self.num_units, units)
    return zeros.at[units].add(x, mode='drop')


def joined(stack: Any) -> list[Any]:
  """Returns the stacked parameters of each layer of a unit, (U, ...).

  Those of the remainder follow those of the group.

  Args:
    stack: a `stack.Stack`, whole or a part of its leaves.
  """
  members = [*stack.group] or [None] * len(stack.remainder)
  result = []
  for i, member in enumerate(members):
    if i < len(stack.remainder):
      last = jax.tree.map(lambda a: a[None], stack.remainder[i])
      member = (
        last
        if member is None
        else jax.tree.map(lambda a, b: jnp.concatenate([a, b]), member, last)
      )
    result.append(member)
  return result


def num_units(layers: Any, i: int) -> int:
  """Returns how many units of a `stack.Stack` have an i-th layer."""
  repeats = (layers.num_layers - len(layers.remainder)) // max(
    len(layers.group), 1
  )
  return repeats + (i < len(layers.remainder))


def parted(whole: Any, layers: Any, i: int) -> tuple[Any, Any]:
  """Splits what `joined` has joined: of the group, of the remainder, or None.

  Args:
    whole: arrays (U, ...) of the i-th layer of a unit.
    layers: the `stack.Stack`.
    i: its place in the unit.
  """
  has_last = i < len(layers.remainder)
  group = jax.tree.map(lambda a: a[:-1], whole) if has_last else whole
  last = jax.tree.map(lambda a: a[-1], whole) if has_last else None
  return group if len(layers.group) else None, last
