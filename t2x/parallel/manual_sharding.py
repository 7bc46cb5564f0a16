"""Shards of arrays, for code that exchanges them explicitly in a `shard_map`.

All other code names logical axes and leaves the exchanges to the compiler's
partitioner (t2x/parallel/sharding.py).
"""

from collections.abc import Callable
import functools
import math

from flax import nnx
import jax
from jax.sharding import PartitionSpec as P

from t2x.parallel import sharding


def auto_axes(axis: str) -> tuple[str, ...]:
  """Returns the mesh axes, of more than one device, that split a logical axis.

  Axes that a surrounding `shard_map` is manual over are left out. Outside
  `sharding.use` there are none.

  Args:
    axis: name of the logical axis.
  """
  return _axes_in_use(axis, manual=False)


def all_auto_axes() -> tuple[str, ...]:
  """Returns the mesh axes that `auto_axes` returns for any logical axis."""
  if not sharding.is_active():
    return ()
  sizes = jax.sharding.get_abstract_mesh().shape
  return tuple(a for a in free_axes() if sizes[a] > 1)


def free_axes() -> tuple[str, ...]:
  """Returns the mesh axes, of any size, that no `shard_map` is manual over."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(a for a in mesh.axis_names if a not in mesh.manual_axes)


def on_parts(fn: Callable, x: jax.Array, *axes: str | None) -> jax.Array:
  """Returns fn(x), a collective, computed on shards along the other mesh axes.

  In a `shard_map` that is manual over only some mesh axes, the partitioner
  gathers the operand of most collectives over all other axes. Here they are
  manual too.

  Args:
    fn: function that communicates over axes that are manual already; its result
      has the shape of its operand.
    x: operand of the function.
    *axes: logical axis of each dimension of x; None for one that is whole.
  """
  split = [auto_axes(axis) if axis else () for axis in axes]
  if not any(split):
    return fn(x)
  # All remaining axes are named, those of one device too (see `mesh`).
  spec = P(*split)
  return jax.shard_map(
    fn,
    in_specs=spec,
    out_specs=spec,
    axis_names={*free_axes()},
    check_vma=False,
  )(x)


def on_rows(fn: Callable, table: jax.Array, x_BT: jax.Array) -> jax.Array:
  """Returns fn(table, x_BT), computed by each device for its own rows.

  In the backward pass each device sums the table's gradients over its rows, and
  these sums are added over the devices.

  Args:
    fn: function from the table and one device's part of x_BT to an array
      (B, T, ...) of that device.
    table: array that every device has whole.
    x_BT: array of a batch, such as token ids.
  """
  rows, length = auto_axes('batch'), auto_axes('length')
  if not (rows or length):
    return fn(table, x_BT)
  return jax.shard_map(
    fn,
    in_specs=(P(), P(rows, length)),
    out_specs=P(rows, length),
    axis_names={*rows, *length},
    check_vma=False,
  )(table, x_BT)


def in_stage() -> bool:
  """Whether this is within a stage of a pipeline."""
  return sharding.PIPE in jax.sharding.get_abstract_mesh().manual_axes


def _axes_in_use(axis: str, *, manual: bool) -> tuple[str, ...]:
  axes, mesh = sharding.active_axes(axis), jax.sharding.get_abstract_mesh()
  return tuple(
    a for a in axes if mesh.shape[a] > 1 and (a in mesh.manual_axes) == manual
  )


def num_parts(axis: str) -> int:
  """Returns the number of devices over which the rules split a logical axis."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes[a] for a in sharding.active_axes(axis))


def fine_axes(*, manual: bool = False) -> tuple[str, ...]:
  """Returns the mesh axes that split a sequence only between layers.

  Args:
    manual: True for the axes that a surrounding `shard_map` is manual over,
      False for the others.
  """
  axes = _axes_in_use('norm_length', manual=manual)
  return tuple(a for a in axes if a not in sharding.active_axes('length'))


def manual_part(axis: str, size: int) -> tuple[jax.Array | int, int]:
  """Returns the start and the size of this device's part of a logical axis.

  They are (0, size) if no surrounding `shard_map` is manual over a mesh axis
  that splits it.

  Args:
    axis: name of the logical axis.
    size: size of the whole dimension.
  """
  axes = _axes_in_use(axis, manual=True)
  if not axes:
    return 0, size
  part = size // jax.lax.axis_size(axes)
  return jax.lax.axis_index(axes) * part, part


def manual_spec(variable: nnx.Variable, axes: tuple[str, ...]) -> P:
  """Returns the PartitionSpec of a parameter over some of the mesh axes.

  Args:
    variable: the parameter.
    axes: mesh axes to keep of those that the active rules name.
  """
  names = sharding.axes_of(variable, len(variable.shape))
  spec = sharding.to_spec(names, sharding.active_rules())
  kept = [tuple(a for a in sharding.mesh_axes(e) if a in axes) for e in spec]
  return P(*(entry or None for entry in kept))


def size(axes: tuple[str, ...]) -> int:
  """Returns the number of devices along mesh axes that are manual here."""
  return math.prod(jax.lax.axis_size(a) for a in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_parts(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Sums x over mesh axes, for a result that leaves the `shard_map` whole.

  JAX gives each device the same share of the result's gradient, 1 / size. The
  gradient of `psum` would sum these shares over the devices; here they are
  multiplied by the size instead, without communication.
  """
  return jax.lax.psum(x, axes)


sum_parts.defvjp(
  lambda x, axes: (sum_parts(x, axes), None),
  lambda axes, _, grad: (grad * size(axes),),
)


def platform() -> str:
  """Returns the platform of the active mesh's devices, else JAX's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform
