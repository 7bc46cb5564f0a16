"""Moves a tower's weights from where they are kept to where they are used.

The weights of a stack of U units are kept in one form, (U, ...), whatever the
pipeline is. Where all stages use the same number of units, in order, `pipe`
splits the first dimension and nothing moves. Otherwise (several chunks, or
uneven stages) it splits another dimension, so that every device keeps the same
share. Once a step an all-to-all brings each device the weights of its units,
and another brings the gradients back. Weights with no dimension that the number
of stages divides are kept by all devices.

Shape suffixes: S stages, N slots of a device, U units.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from t2x.layers import stack as stack_lib
from t2x.models import model as model_lib
from t2x.parallel import manual_sharding
from t2x.parallel import sharding
from t2x.pipeline import plan as plan_lib


@dataclasses.dataclass(frozen=True, eq=False)
class Route:
  """How one stacked parameter moves between devices.

  Attributes:
    dim: dimension that `pipe` splits where the parameter is kept. 0 means that
      nothing moves, None that every device keeps the whole parameter.
    axes: logical names of the dimensions after the first.
    unit_SN: unit in each slot; -1 in an empty slot.
    num_units: number of units, U.
  """

  dim: int | None
  axes: tuple[str | None, ...]
  unit_SN: np.ndarray
  num_units: int

  @property
  def spec(self) -> P:
    """How `pipe` splits the parameter where it is kept."""
    return _spec(self.dim)

  def fetch(self, x_U: jax.Array) -> jax.Array:
    """Returns the parameters of this device's slots, (N, ...).

    Args:
      x_U: this device's share of the parameter (U, ...), as it is kept.
    """
    if self.dim == 0:
      return x_U
    unit_SN = jnp.asarray(np.maximum(self.unit_SN, 0))
    if self.dim is None:
      return x_U[unit_SN[jax.lax.axis_index(sharding.PIPE)]]
    dim = self.dim + 1
    exchange = lambda a: jax.lax.all_to_all(
      a, sharding.PIPE, 0, dim, tiled=True
    )
    return manual_sharding.on_parts(exchange, x_U[unit_SN], *self._names)[0]

  def give_back(self, x_N: jax.Array) -> jax.Array:
    """Returns this device's share of the sums (U, ...), as they are kept.

    Args:
      x_N: sums (N, ...) of this device's slots, of gradients for example.
    """
    if self.dim == 0:
      return x_N
    if self.dim is None:
      unit_N = jnp.asarray(self.unit_SN)[jax.lax.axis_index(sharding.PIPE)]
      return jax.lax.psum(self._scattered(x_N, unit_N), sharding.PIPE)
    dim = self.dim + 1
    exchange = lambda a: jax.lax.all_to_all(
      a, sharding.PIPE, dim, 0, tiled=True
    )
    x_SN = manual_sharding.on_parts(exchange, x_N[None], *self._names)
    flat = x_SN.reshape(-1, *x_SN.shape[2:])
    return self._scattered(flat, jnp.asarray(self.unit_SN.reshape(-1)))

  @property
  def _names(self) -> list[str | None]:
    assert self.dim is not None
    names: list[str | None] = [None, None, *self.axes]
    names[self.dim + 1] = None  # The exchange splits it or gathers it.
    return names

  def _scattered(self, x: jax.Array, units: jax.Array) -> jax.Array:
    zeros = jnp.zeros((self.num_units, *x.shape[1:]), x.dtype)
    # Slots without a unit point past the end, and are dropped.
    units = jnp.where(units < 0, self.num_units, units)
    return zeros.at[units].add(x, mode='drop')


def _spec(dim: int | None) -> P:
  """Returns the sharding of an array of which `pipe` splits a dimension.

  Args:
    dim: the dimension, or None if `pipe` splits none.
  """
  return P() if dim is None else P(*[None] * dim, sharding.PIPE)


def stack_units(stack: stack_lib.Stack) -> list[Any]:
  """Returns the stacked parameters of each layer of a unit, (U, ...).

  The layers of the remainder come after those of the group, as the last unit.

  Args:
    stack: layers of a tower; some of the parameters may be missing.
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


def num_units(layers: stack_lib.Stack, i: int) -> int:
  """Returns how many units of a stack have an i-th layer.

  The last unit has fewer layers than the others if there is a remainder.
  """
  repeats = (layers.num_layers - len(layers.remainder)) // max(
    len(layers.group), 1
  )
  return repeats + (i < len(layers.remainder))


def split_units(whole: Any, layers: stack_lib.Stack, i: int) -> tuple[Any, Any]:
  """Splits arrays of all units into those of the group and of the remainder.

  It is the inverse of `stack_units`.

  Args:
    whole: tree of arrays (U, ...) of the i-th layer of a unit.
    layers: layers of the tower.
    i: index of the layer in its unit.

  Returns:
    The arrays of the group, stacked, and those of the remainder; None for the
    one that has no such layer.
  """
  has_last = i < len(layers.remainder)
  group = jax.tree.map(lambda a: a[:-1], whole) if has_last else whole
  last = jax.tree.map(lambda a: a[-1], whole) if has_last else None
  return group if len(layers.group) else None, last


@dataclasses.dataclass(frozen=True)
class StageLayout:
  """How the parameters of a model, or some of them, reach the stages.

  Attributes:
    specs: sharding of every leaf over `pipe`, in the model's structure.
    routes: routes of the leaves of each layer of a unit, by tower.
  """

  specs: Any
  routes: dict[str, list[list[Route]]]

  @classmethod
  def of(
    cls, tree: model_lib.Transformer, plan: plan_lib.PipelinePlan
  ) -> 'StageLayout':
    """Returns the layout of a model on the active mesh.

    Args:
      tree: model; some of its parameters may be missing.
      plan: schedule, and the layers of its parts.

    Raises:
      ValueError: a layer of the remainder has other parameters than the layer
        of the group that it is stacked with.
    """
    rules = sharding.active_rules()
    layers = sharding.PIPE if plan.placement.is_contiguous else None
    rules = dataclasses.replace(rules, layers=layers)
    sizes = jax.sharding.get_abstract_mesh().shape
    names = _layer_paths(tree)

    def spec(path: jax.tree_util.KeyPath, x: Any) -> Any:
      if not _has_value(x):
        return x
      if not sharding.path_name(path).startswith(names):
        return x.replace(P())  # The caller gathers it.
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
        [
          _route(x, rules, sizes, plan.placement.unit_SN[t], num)
          for x in leaves
        ]
        for num, leaves in (
          (num_units(layers, i), _variables(m)) for i, m in enumerate(members)
        )
      ]
    return cls(specs, routes)


def _route(
  x: nnx.Variable,
  rules: sharding.Rules,
  sizes: Mapping[str, int],
  unit_SN: np.ndarray,
  num_units: int,
) -> Route:
  axes = tuple(x.get_metadata('axes'))
  dim = sharding.pipe_dim(x, rules, sizes)
  # A parameter of the remainder is not stacked, and has one dimension less.
  if dim is not None and len(x.shape) == len(axes):
    dim += 1
  return Route(dim, axes, unit_SN, num_units)


def _check_alike(name: str, layers: stack_lib.Stack) -> None:
  for i, (one, last) in enumerate(zip(layers.group, layers.remainder)):
    if jax.tree.structure(one) != jax.tree.structure(last):
      raise ValueError(
        f'train.trainable takes other parameters of {name}.layers.group.{i} '
        f'than of {name}.layers.remainder.{i}, which the stages of a pipeline '
        'stack. Have it match the same of both, or set mesh.pipe=1.'
      )


def _has_value(x: Any) -> bool:
  return sharding.is_variable(x) and hasattr(x.get_value(), 'shape')


def _variables(tree: Any) -> list[nnx.Variable]:
  leaves = jax.tree.leaves(tree, is_leaf=sharding.is_variable)
  return [x for x in leaves if _has_value(x)]


def _layer_paths(model: model_lib.Transformer) -> tuple[str, ...]:
  return tuple(f'{name}.layers.' for name in model.towers)


def outside_layers(model: model_lib.Transformer) -> Any:
  """Returns a model with None in place of each parameter of its layers."""
  names = _layer_paths(model)

  def leaf(path: jax.tree_util.KeyPath, x: Any) -> Any:
    return None if sharding.path_name(path).startswith(names) else x

  return jax.tree_util.tree_map_with_path(leaf, model)


def with_stack(
  grads: Any,
  trained: model_lib.Transformer,
  name: str,
  layers: stack_lib.Stack,
  stacks: Sequence[Any],
) -> Any:
  """Adds the gradients of a tower's layers to those of a model.

  Args:
    grads: gradients so far, in the model's structure.
    trained: model with its trained parameters alone.
    name: name of the tower.
    layers: layers of the tower.
    stacks: gradients (U, ...) of each layer of a unit.
  """
  by_path = {}
  for i, whole in enumerate(stacks):
    group, last = split_units(whole, layers, i)
    for kind, part in (('group', group), ('remainder', last)):
      prefix = f'{name}.layers.{kind}.{i}.'
      flat = jax.tree_util.tree_leaves_with_path(part)
      by_path |= {prefix + sharding.path_name(p): a for p, a in flat}

  def leaf(path: jax.tree_util.KeyPath, _: Any) -> Any:
    path_name = sharding.path_name(path)
    return by_path.get(path_name, known.get(path_name))

  flat = jax.tree_util.tree_leaves_with_path(grads)
  known = {sharding.path_name(p): a for p, a in flat}
  return jax.tree_util.tree_map_with_path(leaf, trained)
