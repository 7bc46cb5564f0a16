"""An optimizer's state beside its parameters: per layer, and sharded like them.

Parameters of a stack of layers have leading dimensions that no logical axis
names; they are batch dimensions to whatever happens here.
"""

from collections.abc import Callable
from typing import Any

from flax import nnx
import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from t2x import sharding


def per_layer(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Applies `tx` to each parameter alone, over its stacked dimensions.

  For transformations that look at a whole parameter (its shape, its root mean
  square), where a stack of layers must not count as one. Its state is a dict
  from the parameter's path to the state of `tx`.
  """

  def init(params):
    return {
      name: _over_stack(tx.init, p, _state_axes(tx, p))(p)
      for name, p in named(params).items()
    }

  def update(updates, state, params=None):
    assert params is not None, 'per_layer needs the parameters'
    by_name = named(params)
    new_updates, new_state = {}, {}
    for name, u in named(updates).items():
      p = by_name[name]
      axes = _state_axes(tx, p)
      fn = _over_stack(tx.update, p, (0, axes), in_axes=(0, axes, 0))
      new_updates[name], new_state[name] = fn(u, state[name], p)

    def put_back(path, u):
      return new_updates.get(sharding.path_name(path), u)

    updates = jax.tree_util.tree_map_with_path(
      put_back, updates, is_leaf=sharding.is_variable
    )
    return updates, new_state

  return optax.GradientTransformation(init, update)


def named(tree: Any) -> dict[str, nnx.Variable]:
  """Returns path -> variable, for the variables that hold an array."""
  flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=sharding.is_variable)
  return {
    sharding.path_name(path): leaf
    for path, leaf in flat
    if sharding.is_variable(leaf) and has_value(leaf)
  }


def has_value(p: nnx.Variable) -> bool:
  """Whether a variable holds an array, and not a mask of optax."""
  return hasattr(p.get_value(), 'shape')


def _num_stacked(p: nnx.Variable) -> int:
  return len(p.shape) - len(p.get_metadata('axes'))


def _over_stack(fn, p, out_axes: Any, in_axes: Any = 0) -> Callable:
  for _ in range(_num_stacked(p)):
    fn = jax.vmap(fn, in_axes=in_axes, out_axes=out_axes)
  return fn


def _state_axes(tx: optax.GradientTransformation, p: nnx.Variable) -> Any:
  """Step counts are shared by the layers of a stack; the rest is stacked."""
  shape = p.shape[_num_stacked(p) :]
  one = jax.eval_shape(tx.init, p.replace(jax.ShapeDtypeStruct(shape, p.dtype)))
  return jax.tree.map(lambda leaf: 0 if leaf.ndim else None, one)


def shardings(opt_state: Any, params: Any, mesh: Mesh, rules) -> Any:
  """Returns the sharding of every leaf of an optimizer's state.

  A moment of its parameter's shape is sharded like it; Adafactor's rows and
  columns lose the reduced dimension; everything else is replicated.

  Args:
    opt_state: shapes of the state.
    params: shapes of the trainable parameters.
    mesh: the device mesh.
    rules: logical axis -> mesh axes.
  """
  by_name = named(params)

  def leaf(path, x):
    if not sharding.is_variable(x) or not has_value(x):
      return jax.tree.map(lambda _: NamedSharding(mesh, P()), x)
    p = _owner(path, by_name)
    spec = P() if p is None else _moment_spec(path, x, p, mesh, rules)
    return x.replace(NamedSharding(mesh, spec))

  return jax.tree_util.tree_map_with_path(
    leaf, opt_state, is_leaf=sharding.is_variable
  )


def _owner(path: Any, by_name: dict[str, nnx.Variable]):
  """Finds the parameter that a leaf of the state belongs to, by its path."""
  for i, key in enumerate(path):
    name = sharding.path_name(path[i:])
    if name in by_name:
      return by_name[name]
    if sharding.path_name((key,)) in by_name:  # The dicts of `per_layer`.
      return by_name[sharding.path_name((key,))]
  return None


def _moment_spec(path, x, p, mesh, rules) -> P:
  spec = list(sharding.parameter_sharding(p, mesh, rules, '').spec)
  spec += [None] * (len(p.shape) - len(spec))
  if x.shape == p.shape:
    return P(*spec)
  names = sharding.path_name(path).split('.')
  stacked = _num_stacked(p)
  # The order in which optax picks the two dimensions that it factors.
  order = np.argsort(p.shape[stacked:])
  if len(order) > 1 and {'v_row', 'v_col'} & set(names):
    dropped = stacked + int(order[-1] if 'v_row' in names else order[-2])
    # Where nothing is factored, rows and columns are dummies of size 1.
    if x.shape == p.shape[:dropped] + p.shape[dropped + 1 :]:
      return P(*spec[:dropped], *spec[dropped + 1 :])
  return P()
