"""How fast the links between devices could carry an exchange: a model.

Collectives are taken to go round rings: along each side of a TPU's torus that a
mesh axis covers, in both directions, where the side closes into a ring; into
the switch of a GPU's node; and between slices over each device's share of the
network, after the part within a slice ("How to Scale Your Model", Google
DeepMind, 2025, on sharded matrices). Latency, and other exchanges on the same
links, are left out: a real exchange takes longer.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from t2x.hardware import machines
from t2x.parallel import mesh as mesh_lib

_FLAT_RING = 16  # On v5e and v6e only a side of 16 chips closes.
_CUBE = 4  # Tori of three sides are made of cubes of four, or do not close.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
  """Where the devices of one mesh axis lie.

  Attributes:
    size: devices.
    slices: among which they lie.
    sides: length of each side of the torus that the axis goes along, within a
      slice, and whether it closes into a ring. Empty for GPUs.
  """

  size: int
  slices: int = 1
  sides: tuple[tuple[int, bool], ...] = ()

  @property
  def within(self) -> int:
    return self.size // self.slices


def axes_of(mesh: Any) -> dict[str, Axis]:
  """Returns the axes of a mesh of real or absent devices."""
  devices = mesh.devices
  found = {}
  for i, name in enumerate(mesh.axis_names):
    line = np.moveaxis(devices, i, 0).reshape(devices.shape[i], -1)[:, 0]
    found[name] = _axis(line, devices)
  return found


def _axis(line: Sequence[Any], devices: np.ndarray) -> Axis:
  slices = len({mesh_lib.slice_of(d) for d in line})
  if devices.flat[0].platform != 'tpu':
    return Axis(size=len(line), slices=slices)
  own = [d for d in line if mesh_lib.slice_of(d) == mesh_lib.slice_of(line[0])]
  first = mesh_lib.slice_of(devices.flat[0])
  whole = np.array(
    [d.coords for d in devices.flat if mesh_lib.slice_of(d) == first]
  )
  extent = np.ptp(whole, axis=0) + 1
  if len(extent) == 3 and extent[2] > 1:
    closed = all(n % _CUBE == 0 for n in extent)
    closes = lambda n: closed
  else:
    closes = lambda n: n >= _FLAT_RING
  span = np.ptp(np.array([d.coords for d in own]), axis=0) + 1
  sides = tuple(
    (int(n), bool(n == side and closes(n)))
    for n, side in zip(span, extent)
    if n > 1
  )
  return Axis(size=len(line), slices=slices, sides=sides)


def reached(axis: Axis, between: bool | None) -> Axis:
  """Returns the part of an axis along which an exchange goes.

  Args:
    axis: whole.
    between: as `Collective.between`.
  """
  if between is None:
    return axis
  if between:
    return Axis(size=axis.slices, slices=axis.slices)
  return dataclasses.replace(axis, size=axis.within, slices=1)


def seconds(
  kind: str,
  num_bytes: float,
  axes: Sequence[Axis],
  chip: machines.Chip,
) -> float:
  """Returns the least seconds that one exchange could take.

  Args:
    kind: of `collectives.KINDS`.
    num_bytes: on one device, as `Collective.bytes` counts them.
    axes: along which its data moves.
    chip: whose links they are.
  """
  slices = math.prod(axis.slices for axis in axes)
  within = math.prod(axis.within for axis in axes)
  sides = [side for axis in axes for side in axis.sides]
  inner = outer = 0.0
  if within > 1:
    inner = _within(kind, num_bytes, within, sides, chip.link)
  if slices > 1:
    outer = _between(kind, num_bytes, within, slices) / chip.network
  return inner + outer


def _within(kind, num_bytes, num, sides, link) -> float:
  if kind == 'collective-permute':
    return num_bytes / link
  share = (num - 1) / num
  if kind in ('all-to-all', 'ragged-all-to-all') and sides:
    # Each byte crosses so many links, of which a device has two along a side.
    hops = sum(n / (4 if closed else 3) for n, closed in sides)
    return num_bytes * hops / (2 * len(sides) * link)
  lanes = sum(2 if closed else 1 for _, closed in sides) or 1
  passes = 2 if kind == 'all-reduce' else 1
  return passes * share * num_bytes / (lanes * link)


def _between(kind, num_bytes, within, slices) -> float:
  """Returns the bytes that a device sends to other slices."""
  if kind == 'collective-permute':
    return num_bytes
  share = (slices - 1) / slices
  if kind in ('all-to-all', 'ragged-all-to-all'):
    return share * num_bytes
  # Reduced within a slice first, or gathered there afterwards.
  passes = 2 if kind == 'all-reduce' else 1
  return passes * share * num_bytes / within
