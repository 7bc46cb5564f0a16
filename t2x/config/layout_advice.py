"""Which layouts of the devices can work, and what to do where one cannot.

A layout is refused before anything is compiled, with the two nearest that
would do. Only shapes are looked at, so that no device is needed.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import functools
import itertools
import math
from typing import Any

from jax.sharding import AbstractMesh

from t2x.config import abstract_state
from t2x.config import consistency
from t2x.config import experiment
from t2x.config import partitioning
from t2x.parallel import mesh as mesh_lib
from t2x.training import train_state

# Changed in this order where two layouts are as near.
_AXES = ('data', 'fsdp', 'tensor', 'context', 'expert')
# So many layouts are compared with the shapes, which takes a second or two.
_MOST = 150
# So many with the config alone, which takes as long.
_MOST_CHECKED = 5000
# Of more devices there are too many layouts to go through.
_MOST_DEVICES = 2**16


def check(
  config: experiment.Experiment,
  num_devices: int,
  *,
  num_slices: int = 1,
  own: experiment.Experiment | None = None,
) -> None:
  """Refuses a config that cannot run on so many devices.

  Args:
    config: the experiment.
    num_devices: all of them.
    num_slices: number of slices in which they lie.
    own: the experiment whose layouts are advised first, as for `advice`.

  Raises:
    ValueError: or a subclass; with the nearest layouts that do work, where it
      is the layout that does not.
  """
  try:
    fit(config, num_devices, num_slices=num_slices)
  except ValueError as error:
    configs = [config] if own is None else [own, config]
    said = advice(error, configs, num_devices, num_slices=num_slices)
    raise type(error)(f'{error}{said}') from error


def fit(
  config: experiment.Experiment, num_devices: int, *, num_slices: int = 1
) -> None:
  """Raises what `check` does, without advice."""
  consistency.check(config, num_devices)
  _check_shapes(
    config, abstract_state.state_shapes(config), num_devices, num_slices
  )


def set_text(asked: mesh_lib.MeshConfig, mesh: mesh_lib.MeshConfig) -> str:
  """Returns the settings that lead from one mesh to the other."""
  needed = {}
  for axis in (*_AXES, 'pipe'):
    size = getattr(mesh, axis)
    if size != 1 or getattr(asked, axis) not in (1, -1):
      needed[axis] = size
  for axis in mesh_lib.AXES:
    size = getattr(mesh.dcn, axis)
    if size != getattr(asked.dcn, axis):
      needed[f'dcn.{axis}'] = size
  return ' '.join(f'mesh.{name}={size}' for name, size in needed.items())


def advice(
  error: ValueError,
  configs: Sequence[experiment.Experiment],
  num_devices: int,
  *,
  num_slices: int = 1,
  any_number: bool = False,
  write: Callable[[mesh_lib.MeshConfig, mesh_lib.MeshConfig], str] = set_text,
) -> str:
  """Returns a sentence on the two nearest layouts that work, or ''.

  Args:
    error: the error to mend; no layout mends a pipeline's own settings.
    configs: the experiment; then others, with more rows, whose layouts are
      sought where it has none.
    num_devices: all of them.
    num_slices: number of slices in which they lie.
    any_number: also other numbers of devices may be advised.
    write: function from the mesh that was asked for and one that works to
      text.
  """
  if isinstance(error, partitioning.PipelineError):
    return ''
  for config in configs:
    found = nearest(
      config, num_devices, num_slices=num_slices, any_number=any_number
    )
    if found:
      break
  else:
    return ''
  rows = config.data.batch_size
  given = f' with data.batch_size={rows}' if config is not configs[0] else ''
  texts = [write(config.mesh, mesh) for mesh in found]
  numbers = [_num_devices(mesh) for mesh in found]
  if {*numbers} == {num_devices}:
    of = f' of {_count(num_devices)}'
  else:
    of = ''
    texts = [f'{t} ({_count(num)})' for t, num in zip(texts, numbers)]
  return f' Layouts{of} that work{given}: {"; ".join(texts)}.'


def nearest(
  config: experiment.Experiment,
  num_devices: int,
  count: int = 2,
  *,
  num_slices: int = 1,
  any_number: bool = False,
) -> list[mesh_lib.MeshConfig]:
  """Returns meshes that work, the nearest to that of `config` first.

  The distance is the sum over the axes of |log2(size / asked)|; an axis that
  takes what remains (-1) may have any size. Pipeline stages and the parts over
  slices stay as they are, unless nothing works so.

  Args:
    config: the experiment.
    num_devices: all of them.
    count: the most meshes.
    num_slices: number of slices in which the devices lie.
    any_number: whether meshes of other numbers of devices are sought where
      none works.

  Returns:
    Fewer, or none, where not so many are found.
  """
  if num_devices > _MOST_DEVICES:
    return []
  try:
    shapes = abstract_state.state_shapes(config)
  except ValueError:  # The model itself cannot be, wherever it is put.
    return []

  def passes(mesh: mesh_lib.MeshConfig, check: Callable[..., Any]) -> bool:
    own = dataclasses.replace(config, mesh=mesh)
    try:
      check(own, _num_devices(mesh))
    except ValueError:
      return False
    return True

  def search(
    meshes: Iterable[mesh_lib.MeshConfig],
  ) -> Iterator[mesh_lib.MeshConfig]:
    meshes = sorted(meshes, key=lambda mesh: _distance(config.mesh, mesh))
    meshes = meshes[:_MOST_CHECKED]
    agree = (mesh for mesh in meshes if passes(mesh, consistency.check))
    for mesh in itertools.islice(agree, _MOST):
      if passes(mesh, check_shapes):
        yield mesh

  def check_shapes(own: experiment.Experiment, num: int) -> None:
    _check_shapes(own, shapes, num, num_slices)

  plainer = list(_plainer(config.mesh, num_slices))
  ways = [functools.partial(_layouts, num_devices=num_devices)]
  ways += [_others] if any_number else []
  for way, mesh in itertools.product(ways, plainer):
    found = list(itertools.islice(search(way(mesh)), count))
    if found:
      return found
  return []


def _check_shapes(
  config: experiment.Experiment,
  shapes: train_state.TrainState,
  num_devices: int,
  num_slices: int,
) -> None:
  sizes = mesh_lib.sizes(config.mesh, num_devices)
  mesh_lib.dcn_sizes(config.mesh, sizes, num_slices)
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  abstract_state.shardings_of(config, shapes, mesh)


def _layouts(
  asked: mesh_lib.MeshConfig, num_devices: int
) -> Iterator[mesh_lib.MeshConfig]:
  """Yields every way to deal the devices to the axes."""
  pipe = max(asked.pipe, 1)
  if num_devices % pipe:
    return
  for sizes in factorisations(num_devices // pipe, len(_AXES)):
    named = dict(zip(_AXES, sizes))
    yield dataclasses.replace(asked, **named, pipe=pipe)


def _others(asked: mesh_lib.MeshConfig) -> Iterator[mesh_lib.MeshConfig]:
  """Yields meshes about `asked`, of whatever number of devices."""
  near = [_near(max(getattr(asked, axis), 1)) for axis in _AXES]
  for sizes in itertools.product(*near):
    yield dataclasses.replace(asked, **dict(zip(_AXES, sizes)))


def _near(size: int) -> list[int]:
  """Returns its neighbours, its divisors, and the powers of two up to twice."""
  found = {size, size + 1, *(2**k for k in range(size.bit_length() + 1))}
  found |= {part for part in range(1, size) if size % part == 0}
  return sorted(found | {max(size - 1, 1)})


def _plainer(
  asked: mesh_lib.MeshConfig, num_slices: int
) -> Iterator[mesh_lib.MeshConfig]:
  """Yields `asked`, then fewer stages, and without its parts over slices."""
  remain = -1 if num_slices > 1 or asked.dcn.data == -1 else 1
  dcn = mesh_lib.Dcn(data=remain)
  fewer = [n for n in range(asked.pipe - 1, 0, -1) if asked.pipe % n == 0]
  for parts in dict.fromkeys((asked.dcn, dcn)):
    for pipe in (asked.pipe, *fewer):
      yield dataclasses.replace(asked, pipe=pipe, dcn=parts)


def _num_devices(mesh: mesh_lib.MeshConfig) -> int:
  return math.prod(getattr(mesh, axis) for axis in mesh_lib.AXES)


def _count(num: int) -> str:
  return '1 device' if num == 1 else f'{num} devices'


def factorisations(total: int, num: int) -> Iterator[tuple[int, ...]]:
  """Yields the tuples of `num` sizes whose product is `total`."""
  if num == 1:
    yield (total,)
    return
  for size in range(1, total + 1):
    if total % size == 0:
      for rest in factorisations(total // size, num - 1):
        yield (size, *rest)


def _distance(
  asked: mesh_lib.MeshConfig, mesh: mesh_lib.MeshConfig
) -> tuple[float, int, list[int]]:
  """Sorts layouts: how far, how many axes changed, then the first axes."""
  pairs = [
    (getattr(asked, axis), getattr(mesh, axis))
    for axis in _AXES
    if getattr(asked, axis) != -1
  ]
  far = sum(abs(math.log2(size / wish)) for wish, size in pairs)
  changed = sum(size != wish for wish, size in pairs)
  return round(far, 6), changed, [-getattr(mesh, axis) for axis in _AXES]
