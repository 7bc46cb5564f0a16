"""An optimizer's state beside its parameters: per layer, and sharded like them.

Parameters of a stack of layers have leading dimensions that no logical axis
names; they are batch dimensions to whatever happens here.
"""

from collections.abc import Callable
import functools
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax

from t2x.parallel import sharding

HOST = 'pinned_host'  # The memory of a device's host, as JAX calls it.


def per_layer(
  tx: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Applies `tx` to each parameter alone, over its stacked dimensions.

  For transformations that look at a whole parameter (its shape, its root mean
  square), where a stack of layers must not count as one. Its state is a dict
  from the parameter's path to the state of `tx`.
  """

  def init(params: optax.Params) -> Any:
    return {
      name: _over_stack(tx.init, p, _state_axes(tx, p))(p)
      for name, p in arrays_by_name(params).items()
    }

  def update(
    updates: optax.Updates,
    state: Any,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, Any]:
    assert params is not None, 'per_layer needs the parameters'
    by_name = arrays_by_name(params)
    new_updates, new_state = {}, {**state}
    for name, u in arrays_by_name(updates).items():
      p = by_name[name]
      axes = _state_axes(tx, p)
      fn = _over_stack(tx.update, p, (0, axes), in_axes=(0, axes, 0))
      new_updates[name], new_state[name] = fn(u, state[name], p)

    def put_back(path: jax.tree_util.KeyPath, u: Any) -> Any:
      return new_updates.get(sharding.path_name(path), u)

    updates = jax.tree_util.tree_map_with_path(
      put_back, updates, is_leaf=sharding.is_variable
    )
    return updates, new_state

  return optax.GradientTransformation(init, update)


def arrays_by_name(tree: Any) -> dict[str, nnx.Variable]:
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


def _over_stack(
  fn: Callable[..., Any], p: nnx.Variable, out_axes: Any, in_axes: Any = 0
) -> Callable[..., Any]:
  for _ in range(_num_stacked(p)):
    fn = jax.vmap(fn, in_axes=in_axes, out_axes=out_axes)
  return fn


def _state_axes(tx: optax.GradientTransformation, p: nnx.Variable) -> Any:
  """Step counts are shared by the layers of a stack; the rest is stacked."""
  shape = p.shape[_num_stacked(p) :]
  one = jax.eval_shape(tx.init, p.replace(jax.ShapeDtypeStruct(shape, p.dtype)))
  return jax.tree.map(lambda leaf: 0 if leaf.ndim else None, one)


def shardings(
  opt_state: Any,
  params: optax.Params,
  mesh: sharding.AnyMesh,
  rules: sharding.Rules,
  *,
  offload: bool = False,
) -> Any:
  """Returns the sharding of every leaf of an optimizer's state.

  A moment of its parameter's shape is sharded like it; Adafactor's rows and
  columns lose the reduced dimension; everything else is replicated.

  Args:
    opt_state: shapes of the state.
    params: shapes of the trainable parameters.
    mesh: the mesh of devices, or of sizes alone.
    rules: the mesh axes of each logical axis.
    offload: whether moments lie in the memory of the devices' hosts.
  """
  kind = HOST if offload else None
  by_name = arrays_by_name(params)

  def leaf(path: jax.tree_util.KeyPath, x: Any) -> Any:
    if not _is_moment(x):
      return jax.tree.map(lambda _: NamedSharding(mesh, P()), x)
    p = _owner(path, by_name)
    spec = P() if p is None else _moment_spec(path, x, p, mesh, rules)
    return x.replace(NamedSharding(mesh, spec, memory_kind=kind))

  return jax.tree_util.tree_map_with_path(
    leaf, opt_state, is_leaf=sharding.is_variable
  )


def update_offloaded(
  tx: optax.GradientTransformation,
  grads: optax.Updates,
  opt_state: Any,
  params: optax.Params,
  *,
  norm: jax.Array,
  finite: jax.Array,
) -> tuple[optax.Params, Any]:
  """Returns new parameters, and the new state, whose moments lie on the hosts.

  Stacked layers are updated one by one in a loop, so that the moments of one
  are on the device at a time; without a loop the compiler would fetch all of
  them at the start.

  Args:
    tx: an optimizer that `optim.make` made; parameters meet in `norm` alone.
    grads: gradients, on the device.
    opt_state: the optimizer's state, its moments on the host.
    params: trainable parameters, on the device.
    norm: the norm of all gradients together.
    finite: whether parameters and moments change.
  """
  by_name = arrays_by_name(params)

  def update(
    grads: optax.Updates, state: Any, params: optax.Params
  ) -> tuple[optax.Params, Any]:
    state = _moved(state, jax.memory.Space.Device)
    updates, new_state = optax.with_extra_args_support(tx).update(
      grads, state, params, norm=norm
    )
    new = optax.apply_updates(params, updates), new_state
    keep = lambda a, b: jnp.where(finite, a, b)
    new_params, new_state = jax.tree.map(keep, new, (params, state))
    return new_params, _moved(new_state, jax.memory.Space.Host)

  new_params, new_state = params, opt_state
  for num in sorted({_num_layers(p) for p in by_name.values()}):
    names = {name for name, p in by_name.items() if _num_layers(p) == num}
    parts = [_part(t, names, by_name) for t in (grads, opt_state, params)]
    changed = _layer_by_layer(update, num, *parts) if num else update(*parts)
    filled = functools.partial(_filled, names, by_name)
    new_params, new_state = _map(filled, (new_params, new_state), changed)
  return new_params, new_state


def _layer_by_layer(
  update: Callable[..., Any],
  num: int,
  grads: optax.Updates,
  state: Any,
  params: optax.Params,
) -> tuple[optax.Params, Any]:
  """Returns update(grads, state, params), layer after layer."""

  def layer(tree: Any, i: jax.Array) -> Any:
    take = lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False)
    cut = lambda _, x: jax.tree.map(take, x) if _is_moment(x) else x
    return _map(cut, tree)

  def body(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
    old_state, old_params = carry
    # Each layer counts from where the step began.
    at = _map(lambda _, x, c: x if _is_moment(x) else c, old_state, state)
    new_params, new_state = update(
      layer(grads, i), layer(at, i), layer(old_params, i)
    )

    def put(_: jax.tree_util.KeyPath, x: Any, new: Any) -> Any:
      if not _is_moment(x):
        return new
      place = lambda a, b: jax.lax.dynamic_update_index_in_dim(a, b, i, 0)
      return jax.tree.map(place, x, new)

    return _map(put, old_state, new_state), _map(put, old_params, new_params)

  new_state, new_params = jax.lax.fori_loop(0, num, body, (state, params))
  return new_params, new_state


def _part(tree: Any, names: set[str], by_name: dict[str, nnx.Variable]) -> Any:
  """Empties the variables that belong to other parameters, as frozen ones."""

  def leaf(path: jax.tree_util.KeyPath, x: Any) -> Any:
    other = sharding.is_variable(x) and _owner_name(path, by_name) not in names
    return x.replace(None) if other else x

  return _map(leaf, tree)


def _filled(
  names: set[str],
  by_name: dict[str, nnx.Variable],
  path: jax.tree_util.KeyPath,
  x: Any,
  changed: Any,
) -> Any:
  """Takes what belongs to a part, and the step counts that all share."""
  owner = _owner_name(path, by_name)
  shared = owner is None and not sharding.is_variable(x)
  return changed if shared or owner in names else x


def _num_layers(p: nnx.Variable) -> int:
  return p.shape[0] if _num_stacked(p) else 0


def _map(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
    fn, tree, *rest, is_leaf=sharding.is_variable
  )


def _moved(opt_state: Any, space: Any) -> Any:
  move = lambda _, x: jax.device_put(x, space) if _is_moment(x) else x
  return _map(move, opt_state)


def _is_moment(x: Any) -> bool:
  """Whether a leaf is of a parameter's size; step counts are not."""
  return sharding.is_variable(x) and has_value(x)


def _owner(
  path: jax.tree_util.KeyPath, by_name: dict[str, nnx.Variable]
) -> nnx.Variable | None:
  """Finds the parameter that a leaf of the state belongs to, by its path."""
  name = _owner_name(path, by_name)
  return None if name is None else by_name[name]


def _owner_name(
  path: jax.tree_util.KeyPath, by_name: dict[str, nnx.Variable]
) -> str | None:
  for i, key in enumerate(path):
    # The second are the dicts of `per_layer`.
    for name in (sharding.path_name(path[i:]), sharding.path_name((key,))):
      if name in by_name:
        return name
  return None


def _moment_spec(
  path: jax.tree_util.KeyPath,
  x: nnx.Variable,
  p: nnx.Variable,
  mesh: sharding.AnyMesh,
  rules: sharding.Rules,
) -> P:
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
