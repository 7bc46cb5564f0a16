"""How a TPU lays arrays out: in tiles, of which the last may be part empty."""

import itertools
import math

LANES, SUBLANES = 128, 8


def padded(shape: tuple[int, ...], itemsize: int) -> int:
  """Returns the bytes of an array as a TPU lays it out.

  Its two minor dimensions come in tiles of 8 x 128: the compiler takes those
  that fill them best.

  Args:
    shape: of the array.
    itemsize: bytes of a number.
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
