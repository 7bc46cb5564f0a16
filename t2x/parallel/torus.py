"""Lays out the devices of one slice so that mesh axes follow its links."""

from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
import numpy as np


def place(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
  """Returns the devices of a slice as an array, a dimension for each mesh axis.

  A mesh axis can take a part of a side of the torus.

  Args:
    devices: the devices of one slice. Devices other than TPUs keep their order.
    sizes: size of each mesh axis within the slice; the axis that communicates
      most is the last.

  Raises:
    ValueError: the TPU chips do not fill a box, or JAX cannot lay these sizes
      along its sides.
  """
  shape = [*sizes.values()]
  sides = _sides(devices) if devices[0].platform == 'tpu' else ()
  # `jax.make_mesh` places devices in the same way, but refuses several slices
  # and, on most TPUs, an axis that is not a whole side of the torus.
  split = {'allow_split_physical_axes': True}
  try:
    return mesh_utils.create_device_mesh(shape, devices, **split)
  except (NotImplementedError, TypeError):
    # JAX before 0.12 drops factors of sizes like 10, 14 or 28 as it divides
    # them, and ends in a TypeError.
    if not sides:
      raise
    raise ValueError(_message(sides, sizes)) from None


def _sides(devices: Sequence[Any]) -> tuple[int, ...]:
  """Returns the sides of a slice of TPUs longer than 1, in chips.

  Where a chip is two devices, the last side is that of its cores.
  """
  places = [(*d.coords, d.core_on_chip) for d in devices]
  sides = tuple(int(n) for n in np.ptp(places, axis=0) + 1)
  if math.prod(sides) != len(devices):
    raise ValueError(
      f'The {len(devices)} devices lie in a box of {_text(sides)} and do not '
      'fill it, so that a mesh has no links to lie along. Give all devices of '
      'a slice, or a box of them.'
    )
  return tuple(n for n in sides if n > 1)


def _message(sides: tuple[int, ...], sizes: Mapping[str, int]) -> str:
  text = lambda sizes: ', '.join(f'mesh.{a}={n}' for a, n in sizes.items())
  near = ' or '.join(map(text, _near(sides, sizes)))
  wanted = text({a: n for a, n in sizes.items() if n > 1})
  return (
    f'{wanted} (within a slice) cannot be laid along its torus of '
    f'{_text(sides)}: JAX {jax.__version__} does not divide these sides so '
    f'(from 0.12 on it does). Sizes of whole sides fit: {near}.'
  )


def _near(
  sides: tuple[int, ...], sizes: Mapping[str, int]
) -> list[dict[str, int]]:
  """Returns the two nearest choices of sizes that are made of whole sides."""
  axes = [axis for axis, size in sizes.items() if size > 1]
  distances = {}
  for choice in itertools.product(axes, repeat=len(sides)):
    whole = dict.fromkeys(axes, 1)
    for axis, side in zip(choice, sides):
      whole[axis] *= side
    distance = sum(abs(math.log(whole[a] / sizes[a])) for a in axes)
    distances.setdefault(tuple(whole.items()), distance)
  return [dict(w) for w in sorted(distances, key=lambda w: distances[w])[:2]]


def _text(sides: tuple[int, ...]) -> str:
  return 'x'.join(map(str, sides))
