"""A lower bound on the time of a collective, from the bandwidth of the links.

The model takes collectives to go round rings along each side of a TPU's torus
that a mesh axis covers, in both directions where the side closes into a ring;
through the switch of a GPU's node; and between slices over each device's share
of the network, after the part within a slice ("How to Scale Your Model", Google
DeepMind, 2025, on sharded matrices). Latency, and other collectives on the same
links, are left out: a real collective takes longer.
"""

from collections.abc import Sequence
import dataclasses
import math

import jax
import numpy as np

from t2x.hardware import machines
from t2x.parallel import mesh as mesh_lib

_FLAT_RING = 16  # On v5e and v6e only a side of 16 chips closes.
_CUBE = 4  # Tori of three sides are made of cubes of four, or do not close.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axis:
  """The links along one mesh axis.

  Attributes:
    size: number of devices along the axis.
    slices: number of slices that these devices are spread over.
    sides: (length, closes into a ring) of each side of the torus that the axis
      covers within a slice. Empty for GPUs.
  """

  size: int
  slices: int = 1
  sides: tuple[tuple[int, bool], ...] = ()

  @property
  def within(self) -> int:
    """Number of devices along the axis within one slice."""
    return self.size // self.slices


def axes_of(mesh: jax.sharding.Mesh) -> dict[str, Axis]:
  """Returns the links along each axis of a mesh."""
  devices = mesh.devices
  axes = {}
  for i, name in enumerate(mesh.axis_names):
    line = np.moveaxis(devices, i, 0).reshape(devices.shape[i], -1)[:, 0]
    axes[name] = _axis(line, devices)
  return axes


def _axis(line: np.ndarray, devices: np.ndarray) -> Axis:
  slices = len({mesh_lib.slice_of(d) for d in line})
  if devices.flat[0].platform != 'tpu':
    return Axis(size=len(line), slices=slices)
  in_slice = [
    d for d in line if mesh_lib.slice_of(d) == mesh_lib.slice_of(line[0])
  ]
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
  span = np.ptp(np.array([d.coords for d in in_slice]), axis=0) + 1
  sides = tuple(
    (int(n), bool(n == side and closes(n)))
    for n, side in zip(span, extent)
    if n > 1
  )
  return Axis(size=len(line), slices=slices, sides=sides)


def reached(axis: Axis, between: bool | None) -> Axis:
  """Returns the part of an axis along which a collective goes.

  Args:
    axis: the whole axis.
    between: True for its slices alone, False for the devices within a slice,
      None for the whole axis, as in `Collective.between`.
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
  """Returns a lower bound on the seconds that one collective takes.

  Args:
    kind: one of `collectives.KINDS`.
    num_bytes: bytes on one device, as `Collective.bytes` counts them.
    axes: mesh axes along which its data moves.
    chip: the chip, which has the bandwidth of the links.
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


def _within(
  kind: str,
  num_bytes: float,
  num: int,
  sides: Sequence[tuple[int, bool]],
  link: float,
) -> float:
  """Returns the seconds of a collective's part within a slice.

  Args:
    kind: one of `collectives.KINDS`.
    num_bytes: bytes on one device, as `Collective.bytes` counts them.
    num: number of devices that take part.
    sides: sides of the torus, as in `Axis`.
    link: bandwidth of a link in one direction, in bytes per second.
  """
  if kind == 'collective-permute':
    return num_bytes / link
  share = (num - 1) / num
  if kind in ('all-to-all', 'ragged-all-to-all') and sides:
    # The links that each byte crosses; a device has two along each side.
    hops = sum(n / (4 if closed else 3) for n, closed in sides)
    return num_bytes * hops / (2 * len(sides) * link)
  lanes = sum(2 if closed else 1 for _, closed in sides) or 1
  passes = 2 if kind == 'all-reduce' else 1
  return passes * share * num_bytes / (lanes * link)


def _between(kind: str, num_bytes: float, within: int, slices: int) -> float:
  """Returns the bytes that a device sends to other slices.

  Args:
    kind: one of `collectives.KINDS`.
    num_bytes: bytes on one device, as `Collective.bytes` counts them.
    within: number of devices that take part in each slice.
    slices: number of slices that take part.
  """
  if kind == 'collective-permute':
    return num_bytes
  share = (slices - 1) / slices
  if kind in ('all-to-all', 'ragged-all-to-all'):
    return share * num_bytes
  # Reduced within a slice first, or gathered there afterwards.
  passes = 2 if kind == 'all-reduce' else 1
  return passes * share * num_bytes / within
