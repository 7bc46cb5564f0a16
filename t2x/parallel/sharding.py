"""Maps logical axes of arrays to mesh axes.

Modules name the logical axes of parameters (`axes=` metadata) and activations
(`constrain`). `Rules` has the mesh axes that split each logical axis.
"""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
import math
from typing import Any
from typing import Literal

from flax import nnx
import jax
from jax.sharding import AbstractMesh
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

MeshAxes = str | tuple[str, ...] | None
AnyMesh = Mesh | AbstractMesh  # An abstract one has sizes and no devices.

PIPE = 'pipe'  # The mesh axis of a pipeline's stages.


class ShardingError(ValueError):
  """The layout is impossible; raised before anything compiles."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """Mesh axes that split each logical axis; None leaves it whole.

  The default is FSDP x tensor parallelism.

  Attributes:
    batch: mesh axes of the rows of a batch.
    length: mesh axes of positions in attention and feed-forward layers.
    norm_length: mesh axes of positions between these layers, in norms, dropout
      and residuals; `context,tensor` is sequence parallelism (Korthikanti et
      al., 2022).
    act_embed: mesh axes of the embedding dimension of activations, which can
      stay whole where that of weights is split.
    embed: mesh axes of the embedding dimension of weights.
    vocab: mesh axes of the vocabulary.
    mlp: mesh axes of the hidden width of feed-forward layers.
    heads: mesh axes of the query heads.
    kv_heads: mesh axes of the key/value heads.
    head_dim: mesh axes of the width of a head.
    experts: mesh axes of the experts.
    layers: mesh axes of stacked layers; the pipeline sets `pipe` where its
      stages have equal numbers of layers.
    context_attention: exchange of attention over a split sequence: `ring` sends
      keys and values round a ring, `all_to_all` exchanges heads against
      sequence.
    balance_context: True to order causal rows in a zigzag for ring attention,
      so that all devices have the same work.
    reduce_dtype: dtype in which devices sum the gradients of weights; `compute`
      is that of the products. `float32` doubles the bytes of a bfloat16 model's
      reductions; the sum of thousands of devices may need it.
  """

  batch: MeshAxes = ('data', 'fsdp', 'expert')
  length: MeshAxes = 'context'
  norm_length: MeshAxes = 'context'
  act_embed: MeshAxes = None
  embed: MeshAxes = 'fsdp'
  vocab: MeshAxes = 'tensor'
  mlp: MeshAxes = 'tensor'
  heads: MeshAxes = 'tensor'
  kv_heads: MeshAxes = 'tensor'
  head_dim: MeshAxes = None
  experts: MeshAxes = 'expert'
  layers: MeshAxes = None
  context_attention: Literal['ring', 'all_to_all'] = 'ring'
  balance_context: bool = True
  reduce_dtype: Literal['compute', 'float32'] = 'compute'


# Fields of `Rules` that are not logical axes.
_SETTINGS = {'context_attention', 'balance_context', 'reduce_dtype'}

# User contexts are part of jit's cache key, so a compiled step is never reused
# under other rules.
_rules = jax.make_user_context(None)


@contextlib.contextmanager
def use(mesh: Mesh, rules: Rules) -> Iterator[None]:
  """Activates `mesh` and `rules` for `constrain` inside the block."""
  with jax.set_mesh(mesh), _rules(rules):
    yield


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
  """Shards an activation by its logical axes; the identity outside `use`.

  Inside a `shard_map` mesh axes that it is manual over are dropped, since there
  `x` is already this device's part along them.

  Args:
    x: the activation.
    *axes: logical axis of each dimension; None for one that stays whole.

  Raises:
    ShardingError: for the reasons of `to_spec`.
  """
  if not is_active():
    return x
  mesh = jax.sharding.get_abstract_mesh()
  manual = frozenset(mesh.manual_axes)
  spec = to_spec(axes, _rules.value, shape=x.shape, mesh=mesh, drop=manual)
  return jax.lax.with_sharding_constraint(x, spec)


def is_active() -> bool:
  """Whether this is inside `use`."""
  return _rules.value is not None


def active_rules() -> Rules:
  """Returns the rules of the surrounding `use`."""
  assert _rules.value is not None, 'outside sharding.use'
  return _rules.value


def active_axes(axis: str) -> tuple[str, ...]:
  """Returns the mesh axes of a logical axis; none outside `use`."""
  return mesh_axes(getattr(_rules.value, axis)) if is_active() else ()


def reduces_in_float32() -> bool:
  """Whether devices sum gradients in float32; False outside `use`."""
  return is_active() and _rules.value.reduce_dtype == 'float32'


def to_spec(
  axes: tuple[str | None, ...],
  rules: Rules,
  *,
  shape: tuple[int, ...] | None = None,
  mesh: AnyMesh | None = None,
  name: str = 'activation',
  drop: frozenset[str] = frozenset(),
) -> P:
  """Returns the PartitionSpec of an array by its logical axes.

  Args:
    axes: logical axis of each dimension; None for one that stays whole.
    rules: mesh axes of each logical axis.
    shape: shape of the array. With `mesh`, each dimension must be divisible by
      the sizes of its mesh axes; None checks nothing.
    mesh: mesh that the array is for; None checks no sizes.
    name: name of the array, for messages.
    drop: mesh axes to leave out.

  Raises:
    ShardingError: an axis is unknown or not in the mesh, the number of axes is
      not that of the dimensions, a mesh axis splits two dimensions, or the
      sizes of mesh axes do not divide a dimension.
  """
  known = {f.name for f in dataclasses.fields(rules)} - _SETTINGS
  where = name if shape is None else f'{name} of shape {tuple(shape)}'
  if shape is not None and len(shape) != len(axes):
    raise ShardingError(
      f'{where} has axes {tuple(axes)}: {len(axes)} names for {len(shape)} '
      'dimensions. Name each, or None where it stays whole.'
    )
  entries, owner = [], {}
  for dim, axis in enumerate(axes):
    if axis is not None and axis not in known:
      raise ShardingError(
        f'{where} names the logical axis {axis!r}; Rules knows '
        f'{", ".join(sorted(known))}.'
      )
    split = mesh_axes(getattr(rules, axis)) if axis else ()
    for mesh_axis in split:
      assert axis is not None
      _check_axis(mesh_axis, mesh, axis, where, axes, owner)
    split = tuple(a for a in split if a not in drop)
    if shape is not None and mesh is not None:
      _check_divides(shape[dim], dim, axis, split, mesh, where)
    entries.append(split[0] if len(split) == 1 else split or None)
  return P(*entries)


def check_rules(rules: Rules, sizes: Mapping[str, int]) -> None:
  """Checks rules against the axes of a mesh.

  Args:
    rules: mesh axes of each logical axis.
    sizes: number of devices along each mesh axis.

  Raises:
    ShardingError: a rule names an axis that the mesh does not have, or the axis
      of a pipeline's stages.
  """
  for field in dataclasses.fields(rules):
    if field.name not in _SETTINGS:
      names = mesh_axes(getattr(rules, field.name))
      for mesh_axis in names:
        _check_exists(mesh_axis, sizes, field.name)
      if sizes.get(PIPE, 1) > 1 and names:
        _check_stages(names, field.name)


def _check_exists(mesh_axis: str, sizes: Mapping[str, int], axis: str) -> None:
  if mesh_axis not in sizes:
    raise ShardingError(
      f'rules.{axis}={mesh_axis!r} names no mesh axis; the mesh has '
      f'{", ".join(sizes)}. Set rules.{axis} to one of these or none.'
    )


def _check_stages(names: Sequence[str], axis: str) -> None:
  if axis == 'layers' or PIPE in names:
    raise ShardingError(
      f'rules.{axis}={",".join(names)}: on a mesh of stages the pipeline says '
      'where stacked layers are, and no other dimension is split over '
      f'{PIPE!r}. Set rules.{axis} to other axes, or none for layers.'
    )


def _check_axis(
  mesh_axis: str,
  mesh: AnyMesh | None,
  axis: str,
  where: str,
  axes: Sequence[str | None],
  owner: dict[str, str],
) -> None:
  """Checks that a mesh axis exists and splits no other dimension.

  Args:
    mesh_axis: the mesh axis.
    mesh: mesh that the array is for; None checks no axes.
    axis: logical axis that it splits.
    where: text that names the array in messages.
    axes: logical axes of all dimensions.
    owner: logical axis that each mesh axis splits so far; updated.
  """
  if mesh is not None:
    _check_exists(mesh_axis, mesh.shape, axis)
  if mesh_axis in owner:
    raise ShardingError(
      f'{where} has axes {axes}: the dimensions {owner[mesh_axis]!r} and '
      f'{axis!r} both live on the mesh axis {mesh_axis!r}, which can split '
      f'only one. Set rules.{axis}=none or rules.{owner[mesh_axis]}=none.'
    )
  owner[mesh_axis] = axis


def _check_divides(
  size: int,
  dim: int,
  axis: str | None,
  split: Sequence[str],
  mesh: AnyMesh,
  where: str,
) -> None:
  """Checks that the sizes of mesh axes divide a dimension.

  Args:
    size: size of the dimension.
    dim: index of the dimension.
    axis: its logical axis.
    split: mesh axes that split it.
    mesh: mesh that the array is for.
    where: text that names the array in messages.
  """
  parts = math.prod(mesh.shape[a] for a in split)
  if size % parts:
    sizes = ', '.join(f'mesh.{a}={mesh.shape[a]}' for a in split)
    raise ShardingError(
      f'{where}: dimension {dim} ({axis!r}) of size {size} is not divisible '
      f'by {parts} ({sizes}; rules.{axis}={",".join(split)}). Choose a size '
      f'or a mesh that divides, or keep it whole: --set rules.{axis}=none.'
    )


def axes_of(variable: nnx.Variable, num_dims: int) -> tuple[str | None, ...]:
  """Returns the logical axis of each dimension of a parameter.

  Args:
    variable: the parameter, whose metadata has its logical axes.
    num_dims: number of its dimensions, which may include a stacked one.

  Raises:
    ShardingError: the parameter does not name every dimension.
  """
  axes = tuple(variable.get_metadata('axes'))
  stacked = num_dims - len(axes)
  if stacked not in (0, 1):
    raise ShardingError(
      f'A parameter of {num_dims} dimensions has axes {axes}; expected one '
      'name per dimension after at most one stacked dimension.'
    )
  return ('layers',) * stacked + axes


def is_variable(x: object) -> bool:
  """Whether a leaf of a tree is a parameter with logical axes."""
  return isinstance(x, nnx.Variable)


def shardings(tree: Any, mesh: AnyMesh, rules: Rules) -> Any:
  """Returns the sharding of every leaf of `tree`, a module or a train state.

  Parameters follow their `axes`; every other leaf is replicated.

  Args:
    tree: tree of arrays or ShapeDtypeStructs, parameters as `nnx.Variable`.
    mesh: mesh that the tree is for.
    rules: mesh axes of each logical axis.

  Raises:
    ShardingError: a parameter cannot be split as the rules say. The message
      names its path and shape, the rule, the size of the mesh axis, and ways
      out.
  """

  def leaf(path: jax.tree_util.KeyPath, x: Any) -> Any:
    if not is_variable(x) or not hasattr(x.get_value(), 'shape'):
      return jax.tree.map(lambda _: NamedSharding(mesh, P()), x)
    return x.replace(parameter_sharding(x, mesh, rules, path_name(path)))

  return jax.tree_util.tree_map_with_path(leaf, tree, is_leaf=is_variable)


def parameter_sharding(
  variable: nnx.Variable, mesh: AnyMesh, rules: Rules, name: str
) -> NamedSharding:
  """Returns the sharding of one parameter by its logical axes.

  The stages of a pipeline also split parameters that do not belong to one
  stage; see `pipe_dim`.

  Args:
    variable: the parameter, or its shape.
    mesh: mesh that it is for.
    rules: mesh axes of each logical axis.
    name: path of the parameter, for messages.
  """
  shape = variable.shape
  axes = axes_of(variable, len(shape))
  spec = to_spec(axes, rules, shape=shape, mesh=mesh, name=name)
  dim = pipe_dim(variable, rules, mesh.shape)
  entries = [*spec, *[None] * (len(shape) - len(spec))]
  if dim is not None:
    others = tuple(a for a in mesh_axes(entries[dim]) if a != PIPE)
    entries[dim] = (PIPE, *others) if others else PIPE
  return NamedSharding(mesh, P(*entries))


def pipe_dim(
  variable: nnx.Variable, rules: Rules, sizes: Mapping[str, int]
) -> int | None:
  """Returns the dimension of a parameter that the stages of a pipeline split.

  For stacked layers of equal stages it is the first. Otherwise it is, of the
  dimensions that the number of stages divides, the one that other mesh axes
  split into the fewest parts.

  Args:
    variable: the parameter, or its shape.
    rules: mesh axes of each logical axis.
    sizes: number of devices along each mesh axis.

  Returns:
    Index of the dimension; None without stages, or if they divide none.
  """
  num = sizes.get(PIPE, 1)
  if num == 1:
    return None
  axes = axes_of(variable, len(variable.shape))
  split = [mesh_axes(getattr(rules, a) if a else None) for a in axes]
  for dim, names in enumerate(split):
    if PIPE in names:
      return dim
  parts = [math.prod(sizes[a] for a in names) for names in split]
  dims = [
    dim
    for dim, size in enumerate(variable.shape)
    if axes[dim] != 'layers' and size % (num * parts[dim]) == 0
  ]
  return min(dims, key=lambda dim: parts[dim], default=None)


def path_name(path: jax.tree_util.KeyPath) -> str:
  """Returns a pytree path as a dotted name: `layers.0.attention.q_DNH`."""
  return '.'.join(jax.tree_util.keystr((k,), simple=True) for k in path)


def mesh_axes(axes: MeshAxes) -> tuple[str, ...]:
  """Returns the mesh axes of a rule as a tuple."""
  if axes is None:
    return ()
  return (axes,) if isinstance(axes, str) else tuple(axes)
