"""Meshes of TPU chips that are not here; see `t2x.hardware.target_devices`."""

import extras
import jax

from t2x.config import catalog
from t2x.config import experiment as experiment_lib
from t2x.config import overrides
from t2x.hardware import target_devices
from t2x.parallel import mesh as mesh_lib

# An experiment that compiles in seconds.
TINY = (
  'model.num_layers=2',
  'model.dtype=bfloat16',
  'data.batch_size=8',
  'data.length=128',
  'optim=adamw',
)


def config_of(
  *settings: str, experiment: str = 'gpt2_tiny'
) -> experiment_lib.Experiment:
  """Returns an experiment with settings, as for --set."""
  config = catalog.load(experiment)
  return overrides.override(config, overrides.parse_settings([*settings]))


def mesh(topology: str = 'v5e:2x4', num_slices: int = 1, **sizes: int):
  """Returns a mesh to compile for, or skips the test where libtpu is missing.

  Args:
    topology: kind and shape of a slice; `v5e:2x4` has eight chips.
    num_slices: how many of them.
    **sizes: of the mesh axes, as for `mesh.MeshConfig`.
  """
  chips = devices(topology, num_slices)
  return mesh_lib.make(mesh_lib.MeshConfig(**sizes), chips)


def devices(topology: str, num_slices: int = 1):
  """Returns the devices of a topology, such as `v5e:4x4`, or skips the test."""
  extras.need('libtpu', extra='plan')
  return target_devices.devices(topology, num_slices)


def compile_text(lowered: jax.stages.Lowered, **options) -> str:
  """Returns the text of a program compiled for a TPU or for this machine.

  Args:
    lowered: the program.
    **options: of the compiler.
  """
  text = target_devices.compile(lowered, options).as_text()
  assert text is not None
  return text
