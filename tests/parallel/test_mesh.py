"""From axis sizes to a mesh, and what is said where they do not fit."""

import jax
import pytest

from t2x.parallel import mesh


def test_every_axis_is_there_and_one_takes_the_rest():
  assert mesh.sizes(mesh.MeshConfig(fsdp=2), 8) == {
    'pipe': 1,
    'data': 4,
    'fsdp': 2,
    'expert': 1,
    'context': 1,
    'tensor': 1,
  }
  assert mesh.sizes(mesh.MeshConfig(data=2, tensor=-1), 8)['tensor'] == 4
  assert mesh.sizes(mesh.MeshConfig(), 1)['data'] == 1


def test_mesh_over_all_devices_or_some():
  made = mesh.make(mesh.MeshConfig(data=2, fsdp=2, tensor=2))
  assert set(made.axis_names) == set(mesh.AXES)
  assert dict(made.shape) | {'data': 2, 'fsdp': 2, 'tensor': 2} == made.shape
  assert made.size == 8
  half = mesh.make(mesh.MeshConfig(), devices=jax.devices()[4:])
  assert set(half.devices.flat) == set(jax.devices()[4:])


def test_tensor_has_the_nearest_neighbours():
  made = mesh.make(mesh.MeshConfig(data=2, context=2, tensor=2))
  # Named before `context`, which is manual within it; placed after.
  assert made.axis_names[-2:] == ('tensor', 'context')
  ids = [
    [[d.id for d in row] for row in part] for part in made.devices.squeeze()
  ]
  assert ids == [[[0, 2], [1, 3]], [[4, 6], [5, 7]]]


@pytest.mark.parametrize('size', [0, -2])
def test_sizes_that_mean_nothing(size):
  message = rf'mesh\.fsdp={size}; a size is at least 1, or -1 for the devices'
  with pytest.raises(ValueError, match=message):
    mesh.MeshConfig(fsdp=size)


def test_two_open_axes():
  message = r'mesh\.data and mesh\.tensor are -1; only one axis can take'
  with pytest.raises(ValueError, match=message):
    mesh.MeshConfig(tensor=-1)  # data is -1 by default.


def test_too_many_for_the_devices():
  message = (
    r'The mesh \(data=4, tensor=4\) needs 16 devices and there are 8\. Change '
    r'--set mesh\.AXIS=SIZE .*device_count=16\.'
  )
  with pytest.raises(ValueError, match=message):
    mesh.make(mesh.MeshConfig(data=4, tensor=4))


def test_too_few_for_the_devices():
  message = r'\(one device\) needs 1 devices? and there are 8\.'
  with pytest.raises(ValueError, match=message):
    mesh.make(mesh.MeshConfig(data=1))


def test_the_rest_does_not_divide():
  message = (
    r'The mesh \(data=-1, fsdp=3\) needs a multiple of 3 devices and there '
    r'are 8\. Change --set'
  )
  with pytest.raises(ValueError, match=message):
    mesh.make(mesh.MeshConfig(fsdp=3))
