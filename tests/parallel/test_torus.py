"""Mesh axes laid along the links of a torus."""

import dataclasses
import math

import jax
import numpy as np
import pytest
import tpu

from t2x.parallel import mesh
from t2x.parallel import torus


@dataclasses.dataclass(frozen=True)
class Gpu:
  """Of an absent node, as XLA describes it: without a slice of its own."""

  id: int
  coords: tuple[int, int, int]
  platform: str = 'gpu'
  device_kind: str = 'NVIDIA H100 80GB HBM3'
  slice_index: int = 0


def test_axes_that_are_parts_of_sides():
  """Without splitting them, JAX has no mesh of 64 x 4 for 16 x 16 chips."""
  chips = tpu.devices('v5e:16x16')
  made = mesh.make(mesh.MeshConfig(data=1, fsdp=64, tensor=4), chips)
  for group in made.devices.reshape(64, 4):
    places = np.array([d.coords for d in group])
    assert np.ptp(places, axis=0).sum() == 3  # Neighbours, in a row.


def test_sides_that_jax_does_not_divide():
  chips = tpu.devices('v5p:16x20x28')
  config = mesh.MeshConfig(data=7, fsdp=320, tensor=4)
  if jax.__version_info__ >= (0, 12):
    assert mesh.make(config, chips).size == 8960
    return
  message = (
    r'mesh\.data=7, mesh\.fsdp=320, mesh\.tensor=4 \(within a slice\) cannot '
    r'be laid along its torus of 16x20x28: JAX .* Sizes of whole sides fit: '
    r'mesh\.data=16, mesh\.fsdp=560, mesh\.tensor=1 or mesh\.data=20'
  )
  with pytest.raises(ValueError, match=message):
    mesh.make(config, chips)
  sizes = {'data': 16, 'fsdp': 560, 'tensor': 1}
  assert torus.place(chips, sizes).shape == (16, 560, 1)


def test_a_part_of_a_slice():
  chips = tpu.devices('v5e:4x4')
  box = [d for d in chips if max(d.coords) < 2]
  assert mesh.make(mesh.MeshConfig(), box).size == 4
  message = (
    r'The 3 devices lie in a box of 2x2x1x1 and do not fill it, .* Give all '
    r'devices of a slice, or a box of them\.'
  )
  with pytest.raises(ValueError, match=message):
    mesh.make(mesh.MeshConfig(), box[:3])


def test_nodes_of_absent_gpus_are_slices():
  nodes = [Gpu(i, (i // 8, 0, i % 8)) for i in range(32)]
  assert mesh.num_slices(nodes) == 4
  config = mesh.MeshConfig(
    data=4, fsdp=4, tensor=2, dcn=mesh.Dcn(data=2, fsdp=2)
  )
  made = mesh.make(config, nodes).devices.reshape(4, 4, 2)
  ids = np.vectorize(lambda d: d.id)(made)
  # By hand: an axis counts its part between nodes first.
  for d, f, t in np.ndindex(ids.shape):
    node = 2 * (d // 2) + f // 2
    assert ids[d, f, t] == 8 * node + 4 * (d % 2) + 2 * (f % 2) + t
  assert math.prod(ids.shape) == len({*ids.flat})
