"""Which layouts of the devices can work, and what to do where one cannot.

A layout is refused before anything is compiled, with the two nearest that
would do. Only shapes are looked at, so that no device is needed.
"""

from collections.abc import Iterator
import dataclasses
import itertools
import math
from typing import Any

from jax.sharding import AbstractMesh

from t2x import consistency
from t2x import experiment
from t2x import mesh as mesh_lib
from t2x import program

# Changed in this order where two layouts are as near.
_AXES = ('data', 'fsdp', 'tensor', 'context', 'expert')
# So many layouts are compared with the shapes, which takes a second or two.
_MOST = 150


def check(
  config: experiment.Experiment, num_devices: int, *, num_slices: int = 1
) -> None:
  """Refuses a config that cannot run on so many devices.

  Args:
    config: the experiment.
    num_devices: all of them.
    num_slices: in which they lie.

  Raises:
    ValueError: or a subclass; with the nearest layouts that do work, where it
      is the layout that does not.
  """
  try:
    consistency.check(config, num_devices)
    _check_shapes(config, program.state_shapes(config), num_devices, num_slices)
  except ValueError as error:
    found = nearest(config, num_devices, num_slices=num_slices)
    if not found:
      raise
    raise type(error)(
      f'{error} Layouts of {num_devices} devices that work: {"; ".join(found)}.'
    ) from error


def nearest(
  config: experiment.Experiment,
  num_devices: int,
  count: int = 2,
  *,
  num_slices: int = 1,
) -> list[str]:
  """Returns layouts that work, the nearest to that of `config` first.

  The distance is the sum over the axes of |log2(size / asked)|; an axis that
  takes what remains (-1) may have any size. Pipeline stages stay as they are.

  Args:
    config: the experiment.
    num_devices: all of them.
    count: the most layouts.
    num_slices: in which the devices lie.

  Returns:
    Settings such as 'mesh.data=4 mesh.tensor=2'; fewer, or none, where not so
    many are found.
  """
  try:
    shapes = program.state_shapes(config)
  except ValueError:  # The model itself cannot be, wherever it is put.
    return []

  def passes(candidate, check, *args):
    try:
      check(candidate, *args)
    except ValueError:
      return False
    return True

  layouts = sorted(
    _layouts(config.mesh, num_devices),
    key=lambda mesh: _distance(config.mesh, mesh),
  )
  candidates = (dataclasses.replace(config, mesh=mesh) for mesh in layouts)
  fit = (c for c in candidates if passes(c, consistency.check, num_devices))
  args = _check_shapes, shapes, num_devices, num_slices
  good = (c for c in itertools.islice(fit, _MOST) if passes(c, *args))
  first = itertools.islice(good, count)
  return [_text(config.mesh, candidate.mesh) for candidate in first]


def _check_shapes(
  config: experiment.Experiment, shapes: Any, num_devices: int, num_slices: int
) -> None:
  sizes = mesh_lib.sizes(config.mesh, num_devices)
  mesh_lib.dcn_sizes(config.mesh, sizes, num_slices)
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  program.shardings_of(config, shapes, mesh)


def _layouts(
  asked: mesh_lib.MeshConfig, num_devices: int
) -> Iterator[mesh_lib.MeshConfig]:
  """Yields every way to deal the devices to the axes."""
  pipe = max(asked.pipe, 1)
  if num_devices % pipe:
    return
  for sizes in _factorisations(num_devices // pipe, len(_AXES)):
    named = dict(zip(_AXES, sizes))
    yield dataclasses.replace(asked, **named, pipe=pipe)


def _factorisations(total: int, num: int) -> Iterator[tuple[int, ...]]:
  """Yields the tuples of `num` sizes whose product is `total`."""
  if num == 1:
    yield (total,)
    return
  for size in range(1, total + 1):
    if total % size == 0:
      for rest in _factorisations(total // size, num - 1):
        yield (size, *rest)


def _distance(asked: mesh_lib.MeshConfig, mesh: mesh_lib.MeshConfig):
  """Sorts layouts: how far, how many axes changed, then the first axes."""
  pairs = [
    (getattr(asked, axis), getattr(mesh, axis))
    for axis in _AXES
    if getattr(asked, axis) != -1
  ]
  far = sum(abs(math.log2(size / wish)) for wish, size in pairs)
  changed = sum(size != wish for wish, size in pairs)
  return round(far, 6), changed, [-getattr(mesh, axis) for axis in _AXES]


def _text(asked: mesh_lib.MeshConfig, mesh: mesh_lib.MeshConfig) -> str:
  """Returns the settings that lead from one layout to the other."""
  sizes = {axis: getattr(mesh, axis) for axis in (*_AXES, 'pipe')}
  needed = {
    axis: size
    for axis, size in sizes.items()
    if size != 1 or getattr(asked, axis) not in (1, -1)
  }
  return ' '.join(f'mesh.{axis}={size}' for axis, size in needed.items())
