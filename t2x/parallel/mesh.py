"""Builds device meshes from axis sizes, within a slice and across slices.

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
from jax.sharding import AxisType
from jax.sharding import Mesh
import numpy as np

from t2x.parallel import simulated_devices
from t2x.parallel import torus

# Outermost first: the axes that communicate most get the nearest neighbours.
AXES = ('pipe', 'data', 'fsdp', 'expert', 'context', 'tensor')
# The order of the axes in a mesh. Where a `shard_map` is within another, the
# partitioner of jax 0.12 needs the axes of the inner one to come after those of
# the outer one, or to be all remaining axes; `context` is split within
# `tensor`.
_ORDER = ('pipe', 'data', 'fsdp', 'expert', 'tensor', 'context')


@dataclasses.dataclass(frozen=True, kw_only=True)
class _AxisSizes:
  """A size for each mesh axis; -1 stands for what remains."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  expert: int = 1
  pipe: int = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dcn(_AxisSizes):
  """Number of parts into which the slices cut each mesh axis.

  The numbers multiply to the number of slices, which the devices determine. One
  number can be -1, which stands for the slices that remain. By default slices
  multiply data parallelism, whose one reduction a step suits a slow network
  best. On two slices of 256, `mesh.data=2 mesh.fsdp=256` shards the weights
  within each slice, and `mesh.data=1 mesh.fsdp=512 mesh.dcn.data=1
  mesh.dcn.fsdp=2` over both.

  Attributes:
    data: parts of the `data` axis between slices.
    fsdp: parts of the `fsdp` axis between slices.
    tensor: parts of the `tensor` axis between slices.
    context: parts of the `context` axis between slices.
    expert: parts of the `expert` axis between slices.
    pipe: parts of the `pipe` axis between slices.
  """

  def __post_init__(self) -> None:
    _check(self, 'mesh.dcn', 'slices')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(_AxisSizes):
  """Number of devices along each mesh axis.

  One number can be -1, which stands for the devices that remain.

  Attributes:
    data: number of copies of the weights, each with its own rows.
    fsdp: number of parts of the weights, each with its own rows.
    tensor: number of parts of heads, feed-forward layers and vocabulary.
    context: number of parts of the sequence.
    expert: number of groups of experts.
    pipe: number of stages of layers.
    dcn: number of parts of each of these axes that lie in different slices.
  """

  dcn: Dcn = dataclasses.field(default_factory=Dcn)

  def __post_init__(self) -> None:
    _check(self, 'mesh', 'devices')


def _check(config: _AxisSizes, path: str, units: str) -> None:
  by_axis = _by_axis(config)
  for axis, size in by_axis.items():
    if size < 1 and size != -1:
      raise ValueError(
        f'{path}.{axis}={size}; a size is at least 1, or -1 for the {units} '
        'that remain.'
      )
  names = [f'{path}.{axis}' for axis, size in by_axis.items() if size == -1]
  if len(names) > 1:
    raise ValueError(
      f'{" and ".join(names)} are -1; only one axis can take the {units} that '
      f'remain. Give the others a size, as in --set {names[0]}=1.'
    )


def _by_axis(config: _AxisSizes) -> dict[str, int]:
  return {axis: getattr(config, axis) for axis in AXES}


def sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
  """Returns the size of each axis, with -1 resolved.

  Args:
    config: sizes of the mesh axes.
    num_devices: number of devices of all slices.

  Raises:
    ValueError: the sizes do not multiply to `num_devices`.
  """
  by_axis = _by_axis(config)
  result = _resolve(by_axis, num_devices)
  if result is None:
    fixed = _fixed(by_axis)
    raise ValueError(
      f'{mismatch(config, num_devices)} Change --set mesh.AXIS=SIZE (one may '
      'be -1), or simulate devices on a CPU: '
      f'XLA_FLAGS={simulated_devices.COUNT}={fixed}.'
    )
  return result


def mismatch(config: MeshConfig, num_devices: int) -> str:
  """Returns a message if sizes do not multiply to `num_devices`, else ''."""
  by_axis = _by_axis(config)
  if _resolve(by_axis, num_devices) is not None:
    return ''
  fixed = _fixed(by_axis)
  multiple = 'a multiple of ' if -1 in by_axis.values() else ''
  return (
    f'The mesh ({_text(by_axis) or "one device"}) needs {multiple}{fixed} '
    f'devices and there are {num_devices}.'
  )


def slice_of(device: Any) -> int:
  """Returns the number of the slice, or node of GPUs, that a device lies in."""
  # GPUs have it in `coords`. Their `slice_index` is always 0 if they are only
  # described (jax 0.10.2, 0.12.0.1).
  if getattr(device, 'platform', '') == 'gpu' and hasattr(device, 'coords'):
    return device.coords[0]
  return getattr(device, 'slice_index', 0)


def num_slices(devices: Sequence[Any]) -> int:
  """Returns the number of slices that the devices lie in.

  Args:
    devices: devices of any platform, also those of a described topology.

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
  """Returns the number of parts of each axis that lie in different slices.

  Args:
    config: sizes of the mesh axes.
    shape: number of devices along each axis, from `sizes`.
    slices: number of slices.

  Raises:
    ValueError: the parts do not multiply to `slices`, or do not divide the
      axes.
  """
  by_axis = _by_axis(config.dcn)
  parts = _resolve(by_axis, slices)
  if parts is None:
    fixed = _fixed(by_axis)
    multiple = 'a multiple of ' if -1 in by_axis.values() else ''
    raise ValueError(
      f'mesh.dcn ({_text(by_axis) or "one slice"}) needs {multiple}{fixed} '
      f'slices and the devices lie in {slices}. Change --set '
      'mesh.dcn.AXIS=SIZE (one may be -1).'
    )
  for axis, part in parts.items():
    if shape[axis] % part:
      raise ValueError(_part_message(axis, shape, part, slices))
  return parts


def _part_message(
  axis: str, shape: Mapping[str, int], part: int, slices: int
) -> str:
  others = [a for a in AXES if a != axis and shape[a] % slices == 0]
  instead = ''
  if others:
    instead = f', or --set mesh.dcn.{axis}=1 --set mesh.dcn.{others[0]}=-1'
  return (
    f'mesh.{axis}={shape[axis]} cannot be cut into mesh.dcn.{axis}={part} '
    f'parts over {slices} slices: a size counts the devices of all slices. Set '
    f'mesh.{axis} to a multiple of {part}{instead}.'
  )


def _resolve(by_axis: dict[str, int], total: int) -> dict[str, int] | None:
  """Replaces -1 so that sizes multiply to `total`; None if they cannot."""
  fixed = _fixed(by_axis)
  rest = total // fixed if -1 in by_axis.values() else 1
  if fixed * rest != total or not rest:
    return None
  return {axis: rest if size == -1 else size for axis, size in by_axis.items()}


def _fixed(by_axis: dict[str, int]) -> int:
  """Returns the product of the sizes that are not -1."""
  return math.prod(size for size in by_axis.values() if size != -1)


def _text(by_axis: dict[str, int]) -> str:
  return ', '.join(f'{a}={s}' for a, s in by_axis.items() if s != 1)


def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Builds a mesh, which has every axis.

  Within a slice the axes are placed along the links between chips, `tensor`
  first. Simulated devices keep their order.

  Args:
    config: sizes of the mesh axes.
    devices: devices of any platform, also those of a described topology; None
      for all devices of JAX's default platform.

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


def _placed(
  devices: Sequence[Any], shape: Mapping[str, int], parts: Mapping[str, int]
) -> np.ndarray:
  """Returns the devices in an array with one dimension for each of `AXES`.

  Args:
    devices: the devices of all slices.
    shape: number of devices along each axis.
    parts: number of parts of each axis that lie in different slices.
  """
  slices = collections.defaultdict(list)
  for device in devices:
    slices[slice_of(device)].append(device)
  within = {axis: shape[axis] // parts[axis] for axis in AXES}
  # JAX's hybrid meshes cannot tell apart nodes of GPUs that are not here.
  array = np.stack([torus.place(slices[i], within) for i in sorted(slices)])
  array = array.reshape([parts[axis] for axis in AXES] + [*within.values()])
  num = len(AXES)
  pairs = [dim for i in range(num) for dim in (i, num + i)]
  return array.transpose(pairs).reshape([shape[axis] for axis in AXES])
