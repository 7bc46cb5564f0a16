"""Exchanges between slices of TPUs, in the program that each slice runs.

The compiler makes one program for each slice, and sends to the others what
goes between them by way of the hosts.
"""

import re
from typing import Any

import jax
import numpy as np

from t2x.hlo import execution
from t2x.hlo import module
from t2x.hlo import overlap
from t2x.parallel import mesh as mesh_lib

_KIND = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_GROUP = re.compile(r'_xla_megascale_target=\{\{([\d,>-]+)\}')
_EXCHANGE = re.compile(r'_xla_host_transfer_rendezvous="([^"]+)"')


def kind(instruction: module.Instruction) -> str | None:
  """Returns the kind of exchange to which a slice sends; None for others."""
  found = _KIND.search(instruction.attributes)
  if instruction.op != 'send' or not found:
    return None
  name = found[1].lower().replace('_', '-')
  return 'collective-permute' if name == 'one-to-one' else name


def places(mesh: Any, num: int) -> np.ndarray:
  """Returns where on the mesh the devices of a program of one slice lie.

  Args:
    mesh: of real or absent devices.
    num: of the program's devices.

  Returns:
    (num, axes) indices.

  Raises:
    ValueError: a slice of the mesh has another number of devices.
  """
  shape = tuple(mesh.shape.values())
  # An abstract mesh is one slice.
  known = isinstance(mesh, jax.sharding.Mesh)
  devices = mesh.devices if known else np.zeros(shape)
  first = [
    place
    for place in np.ndindex(devices.shape)
    if mesh_lib.slice_of(devices[place]) == mesh_lib.slice_of(devices.flat[0])
  ]
  if len(first) != num:
    raise ValueError(
      f'The program is for {num} devices and the mesh has '
      f'{devices.size} ({dict(mesh.shape)}). Give the mesh that it was '
      'compiled for.'
    )
  return np.array(first)


def joined(
  instruction: module.Instruction, mesh: jax.sharding.Mesh
) -> tuple[tuple[str, ...], int]:
  """Returns the mesh axes along which a send goes, and among how many slices.

  They are groups of devices, `{{100000,200000},...}`, or all slices,
  `"{1,2}x{0:3}"`.
  """
  found = _GROUP.search(instruction.attributes)
  ids = {int(n) for n in re.findall(r'\d+', found[1])} if found else None
  group = [
    (place, device)
    for place, device in np.ndenumerate(mesh.devices)
    if ids is None or device.id in ids
  ]
  of = [mesh_lib.slice_of(device) for _, device in group]
  if ids is None:  # One device of each slice.
    group = [group[of.index(number)] for number in {*of}]
  places = np.array([place for place, _ in group])
  moved = (places != places[0]).any(0)
  axes = tuple(a for a, differs in zip(mesh.axis_names, moved) if differs)
  return axes, len({*of})


def is_hidden(scope: execution.Scope, send: module.Instruction) -> bool:
  """Whether products run from a send to what comes back of it."""
  name = _EXCHANGE.findall(send.attributes)
  own, begun = set(), False
  for other in scope.computation.instructions.values():
    if other.op == 'recv' and _EXCHANGE.findall(other.attributes) == name:
      own.add(other.name)
    if begun and other.op == 'recv-done' and own & {*other.operands}:
      return False
    if begun and overlap.computes(scope, other):
      return True
    begun = begun or other.name == send.name
  return False
