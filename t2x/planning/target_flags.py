"""Command-line flags of scripts that compile for devices that are not here."""

from collections.abc import Sequence
import pathlib
from typing import Any

from absl import flags

from t2x import main as main_lib
from t2x.config import catalog
from t2x.config import experiment
from t2x.config import layout_advice
from t2x.config import layout_flag
from t2x.hardware import target_devices
from t2x.parallel import mesh as mesh_lib
from t2x.planning import remedies

flags.disclaim_key_flags()  # They are the script's: --helpshort lists them.


def define() -> None:
  """Defines the flags of the experiment, the devices and the layout."""
  flags.DEFINE_string('experiment', None, 'Its name, or a path.')
  flags.DEFINE_string('config', None, 'A saved config.json instead.')
  flags.DEFINE_string('topology', None, 'v5e:4x4, v5p:4x4x8, h100:8, cpu:8.')
  flags.DEFINE_integer('num_slices', 1, 'How many of them.', lower_bound=1)
  flags.DEFINE_string('layout', None, 'Sizes: data=2,fsdp=2,tensor=2.')
  main_lib.define_set_flag()


def experiment_of() -> tuple[str, experiment.Experiment]:
  """Returns the name and the config of the experiment, every --set applied."""
  values = flags.FLAGS
  config = main_lib.resolve(lambda: catalog.load(values.experiment))
  return pathlib.Path(values.experiment or values.config).stem, config


def laid_out(
  config: experiment.Experiment, devices: tuple[Any, ...]
) -> experiment.Experiment:
  """Returns an experiment in the layout of --layout, or in its own.

  Args:
    config: the experiment, from `experiment_of`.
    devices: the devices, from `target_devices.devices`.

  Raises:
    ValueError: it cannot run in this layout; the message names the nearest
      layouts in which it can.
  """
  text = flags.FLAGS.layout
  slices = mesh_lib.num_slices(devices)
  if text is None:
    layout_advice.check(config, len(devices), num_slices=slices)
    return config
  layout = layout_flag.parse(text)
  applied = layout.applied(config, slices)
  layout.check(applied, len(devices), num_slices=slices, dcn=config.mesh.dcn)
  return applied


def devices(host: str | None = None) -> tuple[Any, ...]:
  """Returns the devices of --topology and --num_slices.

  Args:
    host: type of the hosts' processors, as for `target_devices.devices`.

  Raises:
    ValueError: --topology is missing, or there is no such topology.
  """
  values = flags.FLAGS
  if not values.topology:
    raise ValueError(
      '--topology=NAME is missing: a kind of TPU and the shape of a slice '
      '(v5e:4x4, v5p:4x4x8), a kind of GPU and how many a node has (h100:8), '
      'or simulated devices (cpu:8).'
    )
  return target_devices.devices(values.topology, values.num_slices, host)


def flags_for(settings: Sequence[str], mesh: mesh_lib.MeshConfig) -> str:
  """Returns the flags to change on the command line for new settings.

  Args:
    settings: settings to change, as `name=value` for --set.
    mesh: the mesh that they lead to.
  """
  text = flags.FLAGS.layout
  if text is None:
    return remedies.set_text(settings, mesh)
  return layout_flag.parse(text).changed(settings, mesh)
