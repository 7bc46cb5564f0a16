"""Meshes of GPUs that are not here; see `t2x.hardware.target_devices`."""

import extras

from t2x.hardware import target_devices
from t2x.parallel import mesh as mesh_lib


def devices(topology: str = 'h100:8', num_slices: int = 1):
  """Returns the devices of nodes, or skips where their compiler is missing."""
  extras.need('jax_plugins.xla_cuda13', extra='plan-gpu')
  return target_devices.devices(topology, num_slices)


def mesh(topology: str = 'h100:8', num_slices: int = 1, **sizes: int):
  """Returns a mesh to compile for, or skips the test."""
  nodes = devices(topology, num_slices)
  return mesh_lib.make(mesh_lib.MeshConfig(**sizes), nodes)
