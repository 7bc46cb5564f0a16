"""Meshes of TPU chips that are not here: the TPU compiler needs none."""

import functools
import os

import jax
from jax.experimental import topologies
import pytest

from t2x import mesh as mesh_lib

# Read where libtpu is loaded: no question to a cloud's metadata server, and
# several test processes at once.
_ENVIRONMENT = {
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-8',
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
}


def mesh(topology: str = 'v5e:2x4', num_slices: int = 1, **sizes: int):
  """Returns a mesh to compile for, or skips the test where libtpu is missing.

  Args:
    topology: kind and shape of a slice; `v5e:2x4` has eight chips.
    num_slices: how many of them.
    **sizes: of the mesh axes, as for `mesh.MeshConfig`.
  """
  chips = devices(topology, num_slices)
  return mesh_lib.make(mesh_lib.MeshConfig(**sizes), chips)


@functools.cache
def devices(topology: str, num_slices: int = 1):
  """Returns the devices of a topology, such as `v5e:4x4`, or skips the test."""
  pytest.importorskip('libtpu', reason='compiling for TPU needs libtpu')
  options = {}
  if num_slices > 1:
    options['num_slices'] = num_slices
  if topology.startswith('v4'):  # One device a chip, as where they are rented.
    options['chip_config_name'] = 'megacore'
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
  return topologies.get_topology_desc(topology, 'tpu', **options).devices


def compile_text(lowered: jax.stages.Lowered, **options) -> str:
  """Returns the text of a program compiled for a TPU or for this machine.

  Args:
    lowered: the program.
    **options: of the compiler.
  """
  # Programs of absent devices can be written to JAX's cache but not read.
  name = 'jax_persistent_cache_min_compile_time_secs'
  before = getattr(jax.config, name)
  jax.config.update(name, 1e9)
  try:
    return lowered.compile(compiler_options=options).as_text()
  finally:
    jax.config.update(name, before)
