"""Collectives between slices of TPUs, in the program that each slice runs.

The compiler makes one program for each slice. Data for other slices goes by way
of the hosts, in `send` and `recv` instructions.
"""

import re

import jax
import numpy as np

from t2x.hlo import execution
from t2x.hlo import module
from t2x.hlo import overlap
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding

_KIND = re.compile(r'_xla_megascale_transfer_type="([A-Z_]+)"')
_GROUP = re.compile(r'_xla_megascale_target=\{\{([\d,>-]+)\}')
_RENDEZVOUS = re.compile(r'_xla_host_transfer_rendezvous="([^"]+)"')


def kind(instruction: module.Instruction) -> str | None:
  """Returns the kind of collective that a `send` between slices belongs to.

  None for every other instruction.
  """
  match = _KIND.search(instruction.attributes)
  if instruction.op != 'send' or not match:
    return None
  name = match[1].lower().replace('_', '-')
  return 'collective-permute' if name == 'one-to-one' else name


def places(mesh: sharding.AnyMesh, num: int) -> np.ndarray:
  """Returns the mesh coordinates of the devices of one slice's program.

  Args:
    mesh: the mesh of all slices; an AbstractMesh is one slice.
    num: number of devices that the program runs on.

  Returns:
    Indices, (num, axes).

  Raises:
    ValueError: a slice of the mesh has another number of devices.
  """
  shape = tuple(mesh.shape.values())
  concrete = isinstance(mesh, jax.sharding.Mesh)
  devices = mesh.devices if concrete else np.zeros(shape)
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


def axes_and_slices(
  instruction: module.Instruction, mesh: jax.sharding.Mesh
) -> tuple[tuple[str, ...], int]:
  """Returns the mesh axes of a `send`, and the number of slices that it joins.

  HLO writes groups of devices, `{{100000,200000},...}`, or all slices,
  `"{1,2}x{0:3}"`.
  """
  match = _GROUP.search(instruction.attributes)
  ids = {int(n) for n in re.findall(r'\d+', match[1])} if match else None
  group = [
    (place, device)
    for place, device in np.ndenumerate(mesh.devices)
    if ids is None or device.id in ids
  ]
  slices = [mesh_lib.slice_of(device) for _, device in group]
  if ids is None:  # One device of each slice.
    group = [group[slices.index(number)] for number in {*slices}]
  places = np.array([place for place, _ in group])
  moved = (places != places[0]).any(0)
  axes = tuple(a for a, differs in zip(mesh.axis_names, moved) if differs)
  return axes, len({*slices})


def is_hidden(scope: execution.Scope, send: module.Instruction) -> bool:
  """Whether matrix products run between a `send` and its `recv-done`."""
  name = _RENDEZVOUS.findall(send.attributes)
  receives, begun = set(), False
  for other in scope.computation.instructions.values():
    if other.op == 'recv' and _RENDEZVOUS.findall(other.attributes) == name:
      receives.add(other.name)
    if begun and other.op == 'recv-done' and receives & {*other.operands}:
      return False
    if begun and overlap.computes(scope, other):
      return True
    begun = begun or other.name == send.name
  return False
