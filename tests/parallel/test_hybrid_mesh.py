"""Meshes on TPU slices: what lies next to what, and what crosses slices."""

import dataclasses
import itertools

import numpy as np
import pytest
import tpu

from t2x.config import experiment
from t2x.config import overrides
from t2x.parallel import mesh


def groups(made, axis):
  """The devices of each group along an axis."""
  index = mesh.AXES.index(axis)
  return np.moveaxis(made.devices, index, -1).reshape(-1, made.shape[axis])


def place(device):
  return (*device.coords, device.core_on_chip)


def connected(group):
  """Whether chips of a group reach each other over links within the group."""
  places = {place(d) for d in group}
  seen, todo = set(), [place(group[0])]
  while todo:
    here = todo.pop()
    if here in seen or here not in places:
      continue
    seen.add(here)
    for dim, step in itertools.product(range(len(here)), (-1, 1)):
      todo.append((*here[:dim], here[dim] + step, *here[dim + 1 :]))
  return len(seen) == len(group)


def slices_of(group):
  return {getattr(d, 'slice_index', 0) for d in group}


@pytest.mark.parametrize(
  'name, slices, sizes',
  [
    ('v5e:4x4', 1, {'tensor': 4}),
    ('v5e:4x4', 1, {'fsdp': 4, 'tensor': 2}),
    ('v5e:4x4', 2, {'tensor': 4}),
    ('v5e:4x4', 2, {'data': 2, 'fsdp': 8, 'tensor': 2}),
    ('v5e:4x4', 2, {'data': 4, 'context': 2, 'tensor': 4}),
    ('v5p:2x2x2', 1, {'tensor': 4}),
    ('v5p:2x2x2', 2, {'data': 2, 'fsdp': 2, 'tensor': 4}),
    ('v5p:4x4x4', 2, {'data': 4, 'fsdp': 4, 'tensor': 8}),
    # `jax.make_mesh` cannot split the sides of these.
    ('v6e:4x4', 1, {'fsdp': 4, 'tensor': 2}),
    ('v5p:4x4x4', 1, {'fsdp': 4, 'tensor': 2}),
    ('tpu7x:2x2x1', 1, {'fsdp': 2, 'tensor': 2}),
  ],
)
def test_tensor_groups_are_neighbours_and_data_crosses(name, slices, sizes):
  devices = tpu.devices(name, slices)
  made = mesh.make(mesh.MeshConfig(**sizes), devices)
  assert set(made.devices.flat) == set(devices)
  assert dict(made.shape) | sizes == dict(made.shape)
  for group in groups(made, 'tensor'):
    assert len(slices_of(group)) == 1
    assert connected(group), [place(d) for d in group]
  for axis in ('fsdp', 'expert', 'context', 'pipe'):
    assert all(len(slices_of(g)) == 1 for g in groups(made, axis))
  assert all(len(slices_of(g)) == slices for g in groups(made, 'data'))


def test_connected_sees_a_gap():
  devices = tpu.devices('v5e:4x4')
  at = {tuple(d.coords[:2]): d for d in devices}
  assert connected([at[0, 0], at[0, 1], at[1, 1]])
  assert not connected([at[0, 0], at[0, 2]])


def test_slices_on_another_axis():
  devices = tpu.devices('v5e:4x4', 2)
  config = mesh.MeshConfig(
    data=2, fsdp=-1, tensor=4, dcn=mesh.Dcn(data=1, fsdp=2)
  )
  made = mesh.make(config, devices)
  assert made.shape['fsdp'] == 4
  assert all(len(slices_of(g)) == 2 for g in groups(made, 'fsdp'))
  assert all(len(slices_of(g)) == 1 for g in groups(made, 'data'))
  # The slice is the slowest part of the axis.
  for group in groups(made, 'fsdp'):
    assert [d.slice_index for d in group] == [0, 0, 1, 1]


def test_slices_on_two_axes():
  devices = tpu.devices('v5e:2x2', 4)
  config = mesh.MeshConfig(data=2, fsdp=-1, dcn=mesh.Dcn(data=-1, fsdp=2))
  made = mesh.make(config, devices)
  assert made.devices.shape == (1, 2, 8, 1, 1, 1)
  indices = [[d.slice_index for d in g] for g in groups(made, 'fsdp')]
  assert indices == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]


@dataclasses.dataclass(frozen=True)
class Node:
  """A GPU of a cluster, as far as a mesh looks at it."""

  id: int
  process_index: int
  slice_index: int
  platform: str = 'gpu'
  device_kind: str = 'NVIDIA H100 80GB HBM3'


NODES = [
  Node(id=i, process_index=i // 8, slice_index=i // 8) for i in range(32)
]


def test_nodes_of_gpus_are_slices():
  assert mesh.num_slices(NODES) == 4
  made = mesh.make(mesh.MeshConfig(fsdp=4, tensor=2), NODES[::-1])
  ids = [[d.id for d in g] for g in groups(made, 'tensor')]
  assert ids == [[i, i + 1] for i in range(0, 32, 2)]
  assert all(slices_of(g) == {0, 1, 2, 3} for g in groups(made, 'data'))


def test_one_slice_whatever_its_number():
  assert mesh.num_slices(NODES[8:16]) == 1
  made = mesh.make(mesh.MeshConfig(data=1, fsdp=-1), NODES[8:16])
  assert [d.id for d in made.devices.flat] == list(range(8, 16))


def test_simulated_devices_keep_their_order():
  made = mesh.make(mesh.MeshConfig(fsdp=2, tensor=2))
  assert [d.id for d in made.devices.flat] == list(range(8))


def test_slices_can_be_set_by_name():
  config = overrides.override(
    experiment.Experiment(), {'mesh.dcn.data': '1', 'mesh.dcn.fsdp': '-1'}
  )
  assert config.mesh.dcn == mesh.Dcn(data=1, fsdp=-1)


@pytest.mark.parametrize(
  'sizes, dcn, message',
  [
    (
      {'fsdp': 8},
      {'data': 3},
      r'mesh\.dcn \(data=3\) needs 3 slices and the devices lie in 4\. Change '
      r'--set mesh\.dcn\.AXIS=SIZE',
    ),
    (
      {'fsdp': 8},
      {'fsdp': 8},
      r'mesh\.dcn \(data=-1, fsdp=8\) needs a multiple of 8 slices and the '
      r'devices lie in 4',
    ),
    (
      {'data': 1, 'fsdp': -1},
      {},
      r'mesh\.data=1 cannot be cut into mesh\.dcn\.data=4 parts over 4 slices: '
      r'a size counts the devices of all slices\. Set mesh\.data to a multiple '
      r'of 4, or --set mesh\.dcn\.data=1 --set mesh\.dcn\.fsdp=-1\.',
    ),
    (
      {'data': 2, 'fsdp': 2, 'tensor': 8},
      {},
      r'Set mesh\.data to a multiple of 4, or .*mesh\.dcn\.tensor=-1\.',
    ),
  ],
)
def test_slices_that_do_not_fit(sizes, dcn, message):
  config = mesh.MeshConfig(**sizes, dcn=mesh.Dcn(**dcn))
  with pytest.raises(ValueError, match=message):
    mesh.make(config, NODES)


def test_a_way_out_that_is_named_works():
  dcn = mesh.Dcn(data=1, fsdp=-1)
  made = mesh.make(mesh.MeshConfig(data=1, fsdp=-1, dcn=dcn), NODES)
  assert made.shape['fsdp'] == 32


def test_one_slice_cannot_be_two():
  message = r'mesh\.dcn \(data=2\) needs 2 slices and the devices lie in 1\.'
  with pytest.raises(ValueError, match=message):
    mesh.make(mesh.MeshConfig(dcn=mesh.Dcn(data=2)))


def test_uneven_slices():
  with pytest.raises(ValueError, match='The slices have 8, 4 devices; a mesh'):
    mesh.make(mesh.MeshConfig(), NODES[:12])


def test_sizes_over_slices_that_mean_nothing():
  message = r'mesh\.dcn\.fsdp=0; a size is at least 1, or -1 for the slices'
  with pytest.raises(ValueError, match=message):
    mesh.Dcn(fsdp=0)
  message = (
    r'mesh\.dcn\.data and mesh\.dcn\.fsdp are -1; only one axis can take the '
    r'slices that remain\. Give the others a size, as in --set mesh\.dcn\.data='
  )
  with pytest.raises(ValueError, match=message):
    mesh.Dcn(fsdp=-1)
