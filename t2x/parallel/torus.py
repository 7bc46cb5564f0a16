"""Devices of one slice laid out so that mesh axes follow the links between."""

from collections.abc import Mapping
from collections.abc import Sequence
import itertools
import math
from typing import Any

import jax
from jax.experimental import mesh_utils
import numpy as np


def place(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
  """Returns the devices by axis; an axis may take a part of a torus's side.

  Args:
    devices: of one slice; all but TPUs keep the order of their numbers.
    sizes: axis -> size within the slice, the one that talks most last.

  Raises:
    ValueError: TPU chips that fill no box, or sizes that JAX cannot lay along
      the sides of theirs.
  """
  shape = [*sizes.values()]
  sides = _sides(devices) if devices[0].platform == 'tpu' else ()
  # `jax.make_mesh` places devices in the same way, but refuses several slices,
  # and on most TPUs an axis that is not a whole side of the torus.
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
  """Returns the sides in chips, and in cores where a chip is two devices."""
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
  given = text({a: n for a, n in sizes.items() if n > 1})
  return (
    f'{given} (within a slice) cannot be laid along its torus of '
    f'{_text(sides)}: JAX {jax.__version__} does not divide these sides so '
    f'(from 0.12 on it does). Sizes of whole sides fit: {near}.'
  )


def _near(sides, sizes) -> list[dict[str, int]]:
  """Returns sizes nearest to those given, each a product of whole sides."""
  axes = [axis for axis, size in sizes.items() if size > 1]
  found = {}
  for choice in itertools.product(axes, repeat=len(sides)):
    whole = dict.fromkeys(axes, 1)
    for axis, side in zip(choice, sides):
      whole[axis] *= side
    away = sum(abs(math.log(whole[a] / sizes[a])) for a in axes)
    found.setdefault(tuple(whole.items()), away)
  return [dict(w) for w in sorted(found, key=lambda w: found[w])[:2]]


def _text(sides: tuple[int, ...]) -> str:
  return 'x'.join(map(str, sides))
