"""Parses the groups of devices among which a collective communicates."""

from collections.abc import Mapping
import math
import re

import numpy as np

from t2x.hlo import module


def axes(
  instruction: module.Instruction, sizes: Mapping[str, int], places: np.ndarray
) -> tuple[str, ...]:
  """Returns the mesh axes along which the devices of a group differ.

  Args:
    instruction: a collective.
    sizes: number of devices along each mesh axis.
    places: mesh coordinates of the program's devices, (devices, axes).
  """
  moved = np.zeros(len(sizes), bool)
  for group in device_groups(instruction.attributes, len(places)):
    members = places[group]
    moved |= (members != members[:1]).any(0)
  return tuple(axis for axis, m in zip(sizes, moved) if m)


def device_groups(attributes: str, num_devices: int) -> list[list[int]]:
  """Returns the groups of devices of a collective, in any of HLO's forms.

  The groups are listed, `{{0,1},{2,3}}`, where `{}` is all devices; or they are
  the rows of a transposed range, `[2,4]<=[4,2]T(1,0)`; or named axes of a mesh
  of the compiler's own, `mesh['a'=2,'b'=4] {'b'}`. The pairs of a permute count
  as groups.

  Args:
    attributes: `Instruction.attributes` of the collective.
    num_devices: number of devices that the program runs on.
  """
  start = re.search(r'(?:replica_groups|source_target_pairs)=', attributes)
  assert start, attributes
  text = attributes[start.end() :]
  if text.startswith('mesh['):
    return _named_groups(text)
  if text.startswith('{}'):
    return [list(range(num_devices))]
  if text.startswith('{'):
    groups = re.findall(r'\{([\d,]+)\}', text[: text.index('}}') + 2])
    return [_numbers(group) for group in groups]
  iota = re.match(r'\[([\d,]+)\](<=\[[\d,]+\](?:T\([\d,]+\))?)', text)
  assert iota, text[:200]
  return _range(iota[2]).reshape(_numbers(iota[1])).tolist()


def _numbers(text: str) -> list[int]:
  return [int(number) for number in text.split(',')]


def _range(text: str) -> np.ndarray:
  """Parses `[4,2]T(1,0)`: 0, 1, ... in a shape, transposed."""
  shape, order = re.findall(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', text)[0]
  ids = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
  return ids.transpose(_numbers(order)) if order else ids


def _named_groups(text: str) -> list[list[int]]:
  # mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(1)2}
  match = re.match(
    r'mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}', text
  )
  assert match, text[:200]
  sizes = {a: int(n) for a, n in re.findall(r"'(\w+)'=(\d+)", match[1])}
  num = math.prod(sizes.values())
  ids = _range(match[2] if match[2] else f'[{num}]')
  # Each joined axis, or a part of one: 'axis':(size before)size.
  parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", match[3])
  shape, joined = [], []
  for axis, size in sizes.items():
    done = 1
    cuts = [(int(b or 1), int(n or size)) for a, b, n in parts if a == axis]
    for before, length in sorted(cuts):
      shape += [before // done, length]
      joined.append(len(shape) - 1)
      done = before * length
    shape.append(size // done)
  ids = np.moveaxis(ids.reshape(shape), joined, range(-len(joined), 0))
  return ids.reshape(-1, math.prod(ids.shape[-len(joined) :])).tolist()
