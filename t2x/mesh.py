"""From axis sizes to a device mesh."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AxisType
from jax.sharding import Mesh

# Outermost first: the axes that talk most get the nearest neighbours.
AXES = ('pipe', 'data', 'fsdp', 'expert', 'context', 'tensor')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Sizes of the mesh axes; one may be -1, the devices that remain."""

  data: int = -1
  fsdp: int = 1
  tensor: int = 1
  context: int = 1
  expert: int = 1
  pipe: int = 1

  def __post_init__(self):
    sizes = {axis: getattr(self, axis) for axis in AXES}
    for axis, size in sizes.items():
      if size < 1 and size != -1:
        raise ValueError(
          f'mesh.{axis}={size}; a size is at least 1, or -1 for the devices '
          'that remain.'
        )
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
      raise ValueError(
        f'mesh.{" and mesh.".join(open_axes)} are -1; only one axis can take '
        'the devices that remain.'
      )


def sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
  """Returns the size of each axis, with -1 resolved.

  Raises:
    ValueError: the sizes do not multiply to `num_devices`.
  """
  result = {axis: getattr(config, axis) for axis in AXES}
  fixed = math.prod(size for size in result.values() if size != -1)
  given = ', '.join(f'{a}={s}' for a, s in result.items() if s != 1)
  way_out = (
    'Change --set mesh.AXIS=SIZE (one may be -1), or simulate devices on a '
    f'CPU: XLA_FLAGS=--xla_force_host_platform_device_count={fixed}.'
  )
  if -1 in result.values():
    if num_devices % fixed:
      raise ValueError(
        f'The mesh ({given}) needs a multiple of {fixed} devices and there '
        f'are {num_devices}. {way_out}'
      )
    return {
      a: num_devices // fixed if s == -1 else s for a, s in result.items()
    }
  if fixed != num_devices:
    raise ValueError(
      f'The mesh ({given or "one device"}) needs {fixed} devices and there '
      f'are {num_devices}. {way_out}'
    )
  return result


def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
  """Builds the mesh over `devices` (default: all), every axis present.

  Raises:
    ValueError: the sizes do not match the number of devices.
  """
  devices = list(jax.devices() if devices is None else devices)
  shape = sizes(config, len(devices))
  return jax.make_mesh(
    tuple(shape[axis] for axis in AXES),
    AXES,
    devices=devices,
    axis_types=(AxisType.Auto,) * len(AXES),
  )
