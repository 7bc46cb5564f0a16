"""Which part of an array a device holds, for code that moves parts by hand.

Everything else names logical axes and leaves the moves to the partitioner
(t2x/parallel/sharding.py).
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

  Those that a surrounding `shard_map` is manual over are left out, and there
  are none outside `use`.
  """
  return _axes_in_use(axis, manual=False)


def all_auto_axes() -> tuple[str, ...]:
  """Returns all mesh axes that `auto_axes` could return."""
  if not sharding.is_active():
    return ()
  sizes = jax.sharding.get_abstract_mesh().shape
  return tuple(a for a in free_axes() if sizes[a] > 1)


def free_axes() -> tuple[str, ...]:
  """Returns the mesh axes, of any size, that no `shard_map` is manual over."""
  mesh = jax.sharding.get_abstract_mesh()
  return tuple(a for a in mesh.axis_names if a not in mesh.manual_axes)


def on_parts(fn: Callable, x: jax.Array, *axes: str | None) -> jax.Array:
  """Returns fn(x), a collective, of what each device has along other axes.

  In a `shard_map` that is manual over some mesh axes alone, the partitioner
  gathers the operand of most collectives over all others.

  Args:
    fn: exchanges over axes that are manual already; keeps the dimensions.
    x: its operand.
    *axes: logical names of its dimensions, or None.
  """
  split = [auto_axes(axis) if axis else () for axis in axes]
  if not any(split):
    return fn(x)
  # All that remain are named, those of one device too (see `mesh`).
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

  Each device sums the table's gradients of its rows; then those sums are added
  over the devices.

  Args:
    fn: (table, x_BT of one device) -> (B, T, ...) of that device.
    table: whole on every device.
    x_BT: rows of a batch.
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
  """Returns over how many devices the active rules split a logical axis."""
  sizes = jax.sharding.get_abstract_mesh().shape
  return math.prod(sizes[a] for a in sharding.active_axes(axis))


def fine_axes(*, manual: bool = False) -> tuple[str, ...]:
  """Returns the mesh axes that split a sequence only between layers.

  Args:
    manual: those that a surrounding `shard_map` is manual over; else those
      that it is not.
  """
  axes = _axes_in_use('norm_length', manual=manual)
  return tuple(a for a in axes if a not in sharding.active_axes('length'))


def manual_part(axis: str, size: int) -> tuple[jax.Array | int, int]:
  """Returns where this device's part of a logical axis starts, and its size.

  Of an axis of which a surrounding `shard_map` holds a part; (0, size) of one
  that is whole.

  Args:
    axis: logical name.
    size: of the whole dimension.
  """
  axes = _axes_in_use(axis, manual=True)
  if not axes:
    return 0, size
  part = size // jax.lax.axis_size(axes)
  return jax.lax.axis_index(axes) * part, part


def manual_spec(variable: nnx.Variable, axes: tuple[str, ...]) -> P:
  """Returns how some mesh axes split a parameter under the active rules."""
  names = sharding.axes_of(variable, len(variable.shape))
  spec = sharding.to_spec(names, sharding.active_rules())
  kept = [tuple(a for a in sharding.mesh_axes(e) if a in axes) for e in spec]
  return P(*(entry or None for entry in kept))


def size(axes: tuple[str, ...]) -> int:
  """Returns the devices of some mesh axes that are manual here."""
  return math.prod(jax.lax.axis_size(a) for a in axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_parts(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """psum of what leaves the `shard_map` whole.

  Each device is given the same share of its gradient, 1 / size, so that their
  sum, which `psum` would ask the devices for, is known.
  """
  return jax.lax.psum(x, axes)


sum_parts.defvjp(
  lambda x, axes: (sum_parts(x, axes), None),
  lambda axes, _, grad: (grad * size(axes),),
)


def platform() -> str:
  """Returns what the devices of the active mesh are, else JAX's default."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform
