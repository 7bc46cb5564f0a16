"""Sizes of arrays as a TPU lays them out, padded to whole tiles."""

import itertools
import math

LANES, SUBLANES = 128, 8


def padded(shape: tuple[int, ...], itemsize: int) -> int:
  """Returns the bytes of an array as a TPU lays it out.

  The two minor dimensions are padded to tiles of 8 x 128. The compiler chooses
  as minor the dimensions that need least padding.

  Args:
    shape: shape of the array.
    itemsize: bytes of an element.
  """
  if len(shape) < 2:
    tile = LANES * SUBLANES if shape else LANES
    return itemsize * _up(math.prod(shape), tile)
  pairs = itertools.permutations(shape, 2)
  return itemsize * min(_tiled(shape, *pair) for pair in pairs)


def _tiled(shape: tuple[int, ...], lanes: int, rows: int) -> int:
  tall = min(SUBLANES, 1 << (rows - 1).bit_length())
  whole = math.prod(shape)
  return whole // (lanes * rows) * _up(lanes, LANES) * _up(rows, tall)


def _up(size: int, multiple: int) -> int:
  return -(-size // multiple) * multiple
