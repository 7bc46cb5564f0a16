"""From axis sizes to a device mesh, within a slice and across slices.

A slice is a set of accelerators with fast links of their own: a TPU slice, or a
node of GPUs. Slices reach each other over the data centre's network (DCN),
which is tens of times slower.
"""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh
from jax.sharding import AxisType
from jax.sharding import Mesh
import numpy as np

from t2x.parallel import simulated_devices
from t2x.parallel import torus

# A mesh of devices, or one of axis sizes alone.
AnyMesh = Mesh | AbstractMesh

# Outermost first: the axes that communicate most get the nearest neighbours.
AXES = ('pipe', 'data', 'fsdp', 'expert', 'context', 'tensor')
# The mesh names them in this order. Where the partitioner of jax 0.12 meets a
# `shard_map` within another, it needs the inner's axes to come after the
# outer's, or to be all that remain; `context` is split within `tensor`.
_ORDER = ('pipe', 'data', 'fsdp', 'expert', 'tensor', 'context')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dcn:
  """Into how many parts the slices cut each axis; one may be -1.

  The sizes multiply to the number of slices, which the devices themselves
  tell, and -1 stands for what remains of it. By default slices multiply data
  parallelism, whose one reduction a step suits a slow network best. On two
  slices of 256, `mesh.data=2 mesh.fsdp=256` shards the weights within each
  slice, and `mesh.data=1 mesh.fsdp=512 mesh.dcn.data=1 mesh.dcn.fsdp=2` over
  both.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  expert: int = 1
  pipe: int = 1

  def __post_init__(self):
    _check(self, 'mesh.dcn', 'slices')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the mesh axes; one may be -1, the devices that remain.

  Attributes:
    data: copies of the weights, each with its own rows.
    fsdp: parts of the weights, each with its own rows.
    tensor: parts of heads, feed-forward and vocabulary.
    context: parts of the sequence.
    expert: groups of experts.
    pipe: stages of layers.
    dcn: how much of each of these sizes lies between slices.
  """

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  expert: int = 1
  pipe: int = 1
  dcn: Dcn = dataclasses.field(default_factory=Dcn)

  def __post_init__(self):
    _check(self, 'mesh', 'devices')


def _check(config: MeshConfig | Dcn, path: str, what: str) -> None:
  given = _given(config)
  for axis, size in given.items():
    if size < 1 and size != -1:
      raise ValueError(
        f'{path}.{axis}={size}; a size is at least 1, or -1 for the {what} '
        'that remain.'
      )
  names = [f'{path}.{axis}' for axis, size in given.items() if size == -1]
  if len(names) > 1:
    raise ValueError(
      f'{" and ".join(names)} are -1; only one axis can take the {what} that '
      f'remain. Give the others a size, as in --set {names[0]}=1.'
    )


def _given(config: MeshConfig | Dcn) -> dict[str, int]:
  return {axis: getattr(config, axis) for axis in AXES}


def sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
  """Returns the size of each axis, with -1 resolved.

  Raises:
    ValueError: the sizes do not multiply to `num_devices`.
  """
  given = _given(config)
  result = _resolve(given, num_devices)
  if result is None:
    fixed = _fixed(given)
    raise ValueError(
      f'{mismatch(config, num_devices)} Change --set mesh.AXIS=SIZE (one may '
      'be -1), or simulate devices on a CPU: '
      f'XLA_FLAGS={simulated_devices.COUNT}={fixed}.'
    )
  return result


def mismatch(config: MeshConfig, num_devices: int) -> str:
  """Returns how the sizes do not multiply to `num_devices`; '' if they do."""
  given = _given(config)
  if _resolve(given, num_devices) is not None:
    return ''
  fixed = _fixed(given)
  multiple = 'a multiple of ' if -1 in given.values() else ''
  return (
    f'The mesh ({_text(given) or "one device"}) needs {multiple}{fixed} '
    f'devices and there are {num_devices}.'
  )


def slice_of(device: Any) -> int:
  """Returns the number of the slice, or node of GPUs, that a device lies in."""
  # XLA tells it of GPUs that are here and of absent ones; the `slice_index` of
  # absent ones is always 0 (jax 0.10.2, 0.12.0.1).
  if getattr(device, 'platform', '') == 'gpu' and hasattr(device, 'coords'):
    return device.coords[0]
  return getattr(device, 'slice_index', 0)


def num_slices(devices: Sequence[Any]) -> int:
  """Returns the number of slices in which the devices lie.

  Raises:
    ValueError: the slices have different numbers of devices.
  """
  counts = collections.Counter(map(slice_of, devices))
  if len(set(counts.values())) > 1:
    raise ValueError(
      f'The slices have {", ".join(map(str, counts.values()))} devices; a mesh '
      'needs as many of each. Leave the smaller ones out.'
    )
  return len(counts)


def dcn_sizes(
  config: MeshConfig, shape: Mapping[str, int], slices: int
) -> dict[str, int]:
  """Returns how many parts of each axis lie in different slices.

  Args:
    config: of the mesh.
    shape: what `sizes` returned.
    slices: their number.

  Raises:
    ValueError: the parts do not multiply to `slices`, or do not divide the
      axes.
  """
  given = _given(config.dcn)
  parts = _resolve(given, slices)
  if parts is None:
    fixed = _fixed(given)
    multiple = 'a multiple of ' if -1 in given.values() else ''
    raise ValueError(
      f'mesh.dcn ({_text(given) or "one slice"}) needs {multiple}{fixed} '
      f'slices and the devices lie in {slices}. Change --set '
      'mesh.dcn.AXIS=SIZE (one may be -1).'
    )
  for axis, part in parts.items():
    if shape[axis] % part:
      raise ValueError(_part_message(axis, shape, part, slices))
  return parts


def _part_message(axis, shape, part, slices) -> str:
  others = [a for a in AXES if a != axis and shape[a] % slices == 0]
  instead = ''
  if others:
    instead = f', or --set mesh.dcn.{axis}=1 --set mesh.dcn.{others[0]}=-1'
  return (
    f'mesh.{axis}={shape[axis]} cannot be cut into mesh.dcn.{axis}={part} '
    f'parts over {slices} slices: a size counts the devices of all slices. Set '
    f'mesh.{axis} to a multiple of {part}{instead}.'
  )


def _resolve(given: dict[str, int], total: int) -> dict[str, int] | None:
  """Puts what remains of `total` for -1; None where it does not come out."""
  fixed = _fixed(given)
  rest = total // fixed if -1 in given.values() else 1
  if fixed * rest != total or not rest:
    return None
  return {axis: rest if size == -1 else size for axis, size in given.items()}


def _fixed(given: dict[str, int]) -> int:
  """Returns the product of the sizes that are known."""
  return math.prod(size for size in given.values() if size != -1)


def _text(given: dict[str, int]) -> str:
  return ', '.join(f'{a}={s}' for a, s in given.items() if s != 1)


def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Builds the mesh over `devices` (default: all), every axis present.

  Within a slice the axes are placed along the links between chips, `tensor`
  first; simulated devices keep their order.

  Args:
    config: sizes.
    devices: of any platform, also those of a described topology.

  Raises:
    ValueError: the sizes do not match the number of devices or of slices, or
      cannot be laid along a TPU's torus.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = sizes(config, len(devices))
  slices = num_slices(devices)
  parts = dcn_sizes(config, shape, slices)
  array = _placed(devices, shape, parts)
  array = np.transpose(array, [AXES.index(axis) for axis in _ORDER])
  return Mesh(array, _ORDER, axis_types=(AxisType.Auto,) * len(_ORDER))


def _placed(devices, shape, parts) -> np.ndarray:
  """Returns devices by axis: parts within a slice, then between slices."""
  slices = collections.defaultdict(list)
  for device in devices:
    slices[slice_of(device)].append(device)
  within = {axis: shape[axis] // parts[axis] for axis in AXES}
  # JAX's own hybrid meshes cannot tell nodes of absent GPUs apart.
  array = np.stack([torus.place(slices[i], within) for i in sorted(slices)])
  array = array.reshape([parts[axis] for axis in AXES] + [*within.values()])
  num = len(AXES)
  pairs = [dim for i in range(num) for dim in (i, num + i)]
  return array.transpose(pairs).reshape([shape[axis] for axis in AXES])
