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

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from t2x.parallel import manual_sharding
from t2x.parallel import sharding
from t2x.pipeline import plan as plan_lib

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
    return _spec(self.dim)

  def fetch(self, x_U: jax.Array) -> jax.Array:
    """Returns (N, ...) of this device's share of (U, ...)."""
    if self.dim == 0:
      return x_U
    unit_SN = jnp.asarray(np.maximum(self.unit_SN, 0))
    if self.dim is None:
      return x_U[unit_SN[jax.lax.axis_index(PIPE)]]
    dim = self.dim + 1
    exchange = lambda a: jax.lax.all_to_all(a, PIPE, 0, dim, tiled=True)
    return manual_sharding.on_parts(exchange, x_U[unit_SN], *self._names)[0]

  def give_back(self, x_N: jax.Array) -> jax.Array:
    """Returns this device's share of (U, ...), of sums (N, ...)."""
    if self.dim == 0:
      return x_N
    if self.dim is None:
      mine_N = jnp.asarray(self.unit_SN)[jax.lax.axis_index(PIPE)]
      return jax.lax.psum(self._scattered(x_N, mine_N), PIPE)
    dim = self.dim + 1
    exchange = lambda a: jax.lax.all_to_all(a, PIPE, dim, 0, tiled=True)
    x_SN = manual_sharding.on_parts(exchange, x_N[None], *self._names)
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


def _spec(dim: int | None) -> P:
  """How `pipe` splits an array along a dimension; None is none of them."""
  return P() if dim is None else P(*[None] * dim, PIPE)


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


@dataclasses.dataclass(frozen=True)
class Layout:
  """How the parameters of a model, or of a part of one, reach the stages.

  Attributes:
    specs: of every leaf, along `pipe`.
    routes: for each tower and layer of a unit, of its leaves.
  """

  specs: Any
  routes: dict[str, list[list[Route]]]

  @classmethod
  def of(cls, tree: Any, plan: plan_lib.Plan) -> 'Layout':
    """Returns the layout of a model on the active mesh.

    Raises:
      ValueError: of layers that are stacked here, only some have a parameter.
    """
    rules = sharding.active_rules()
    layers = PIPE if plan.place.is_contiguous else None
    rules = dataclasses.replace(rules, layers=layers)
    sizes = jax.sharding.get_abstract_mesh().shape
    names = _layer_paths(tree)

    def spec(path, x):
      if not _has_value(x):
        return x
      if not sharding.path_name(path).startswith(names):
        return x.replace(P())  # Gathered by whoever calls.
      return x.replace(_spec(sharding.pipe_dim(x, rules, sizes)))

    specs = jax.tree_util.tree_map_with_path(
      spec, tree, is_leaf=sharding.is_variable
    )
    routes = {}
    for t, name in enumerate(tree.towers):
      layers = getattr(tree, name).layers
      _check_alike(name, layers)
      members = [*layers.group] or [*layers.remainder]
      routes[name] = [
        [_route(x, rules, sizes, plan.place.unit_SN[t], num) for x in leaves]
        for num, leaves in (
          (num_units(layers, i), _variables(m)) for i, m in enumerate(members)
        )
      ]
    return cls(specs, routes)


def _route(x, rules, sizes, unit_SN, num_units) -> Route:
  axes = tuple(x.get_metadata('axes'))
  dim = sharding.pipe_dim(x, rules, sizes)
  if dim is not None and len(x.shape) == len(axes):  # Of the remainder.
    dim += 1
  return Route(dim, axes, unit_SN, num_units)


def _check_alike(name: str, layers: Any) -> None:
  for i, (one, last) in enumerate(zip(layers.group, layers.remainder)):
    if jax.tree.structure(one) != jax.tree.structure(last):
      raise ValueError(
        f'train.trainable takes other parameters of {name}.layers.group.{i} '
        f'than of {name}.layers.remainder.{i}, which the stages of a pipeline '
        'stack. Have it match the same of both, or set mesh.pipe=1.'
      )


def _has_value(x) -> bool:
  return sharding.is_variable(x) and hasattr(x.get_value(), 'shape')


def _variables(tree) -> list[nnx.Variable]:
  leaves = jax.tree.leaves(tree, is_leaf=sharding.is_variable)
  return [x for x in leaves if _has_value(x)]


def _layer_paths(model: Any) -> tuple[str, ...]:
  return tuple(f'{name}.layers.' for name in model.towers)


def outside_layers(model: Any) -> Any:
  """Returns a model without its stacks of layers (None is in their place)."""
  names = _layer_paths(model)

  def leaf(path, x):
    return None if sharding.path_name(path).startswith(names) else x

  return jax.tree_util.tree_map_with_path(leaf, model)


def with_stack(grads, trained, name, layers, stacks):
  """Puts the gradients of a tower's layers into those of a model."""
  by_path = {}
  for i, whole in enumerate(stacks):
    group, last = parted(whole, layers, i)
    for kind, part in (('group', group), ('remainder', last)):
      prefix = f'{name}.layers.{kind}.{i}.'
      flat = jax.tree_util.tree_leaves_with_path(part)
      by_path |= {prefix + sharding.path_name(p): a for p, a in flat}

  def leaf(path, _):
    path_name = sharding.path_name(path)
    return by_path.get(path_name, known.get(path_name))

  flat = jax.tree_util.tree_leaves_with_path(grads)
  known = {sharding.path_name(p): a for p, a in flat}
  return jax.tree_util.tree_map_with_path(leaf, trained)
