"""A trained run, or a checkpoint of Hugging Face, loaded for use.

trained = loading.load('runs/quickstart')
"""

from collections.abc import Sequence
import dataclasses
import logging
import math
from typing import Any

import jax

from t2x import files
from t2x.config import abstract_state
from t2x.config import experiment
from t2x.config import layout_advice
from t2x.config import overrides
from t2x.data import tokenizer_loading
from t2x.data import words
from t2x.inference import trained_model
from t2x.interop import generation_config
from t2x.interop import huggingface
from t2x.interop import labels as labels_lib
from t2x.parallel import mesh as mesh_lib
from t2x.trainer import checkpointer
from t2x.trainer import workdir as workdir_lib
from t2x.training import train_state

_log = logging.getLogger(__name__)


def load(
  workdir: str, *, step: int | None = None, settings: Sequence[str] = ()
) -> trained_model.Trained:
  """Restores a run's model, by default onto one device.

  Args:
    workdir: of the run, or the directory of a checkpoint of Hugging Face.
    step: of the checkpoint; default the newest.
    settings: as for --set; `mesh.tensor=8` spreads the model.

  Raises:
    ValueError: no run, no such checkpoint, or a setting that cannot be.
  """
  workdir = str(files.path(workdir))
  if huggingface.is_one(workdir):
    found = huggingface.read(workdir)
    config = huggingface.experiment_of(found, workdir)
    config, mesh, shapes = _placed(config, settings)
    model = jax.device_put(
      found.build(config.model),
      jax.tree.map(lambda x: x.sharding, shapes.model),
    )
    own = {'config': config, 'mesh': mesh, 'labels': found.labels}
    own['generation'] = _told(workdir, found.generation)
    own['problem'] = labels_lib.problem(found.hf)
    return trained_model.Trained(
      model=model, tokenizer=found.tokenizer, step=0, **own
    )
  config, mesh, shapes = _placed(workdir_lib.read_config(workdir), settings)
  wanted = dataclasses.replace(
    shapes, step=None, opt_state=None, num_skipped=None, carried={}
  )
  saved = checkpointer.Checkpoints(workdir)
  restored = saved.restore(wanted, step, partial=True)
  saved.close()
  if restored is None:
    raise ValueError(
      f'{workdir} has no checkpoint yet. Let the experiment run on: it saves '
      f'at the end and at train.checkpoint_every='
      f'{config.train.checkpoint_every} steps.'
    )
  step, state, _ = restored
  tokenizer = tokenizer_loading.load(files.path(workdir) / 'tokenizer')
  model = train_state.averaged_model(state, config.step_config)
  hf = workdir_lib.read_huggingface(workdir) or {}
  # Training on classes means one of them, whatever the head was before.
  trains = words.has_classes(config.data)
  return trained_model.Trained(
    config=config,
    model=model,
    tokenizer=tokenizer,
    step=step,
    mesh=mesh,
    labels=workdir_lib.read_labels(workdir),
    temperature=workdir_lib.read_temperature(workdir),
    generation=_told(workdir, _generation(workdir, config)),
    corpus=workdir_lib.read_corpus(workdir),
    problem=labels_lib.SINGLE if trains else labels_lib.problem(hf),
  )


def _generation(workdir: str, config: experiment.Experiment):
  """Returns how the texts of a run that came from elsewhere are written."""
  return huggingface.generation_of(
    config.model,
    workdir_lib.read_huggingface(workdir) or {},
    workdir_lib.read_generation(workdir),
    workdir,
  )


def _told(workdir: str, found: generation_config.Generation):
  """Returns what is asked for, after telling what of it is not done."""
  if found.ignored:
    _log.warning(
      '%s: settings of its texts that are not honoured: %s.',
      workdir,
      ', '.join(found.ignored),
    )
  return found


def _placed(config: experiment.Experiment, settings: Sequence[str]):
  """Returns the config with its settings, its mesh, and the state's shapes."""
  config = dataclasses.replace(config, mesh=mesh_lib.MeshConfig(data=1))
  config = overrides.override(config, overrides.parse_settings(settings))
  devices = _devices(config.mesh)
  # Rows that training deals to microbatches matter to nobody here.
  train = dataclasses.replace(config.train, accumulate=1)
  layout_advice.check(
    dataclasses.replace(config, train=train),
    len(devices),
    num_slices=mesh_lib.num_slices(devices),
  )
  mesh = mesh_lib.make(config.mesh, devices)
  shapes, _ = abstract_state.shapes_of(config, mesh)
  return config, mesh, shapes


def _devices(config: mesh_lib.MeshConfig) -> list[Any]:
  """Returns as many devices as the mesh asks for; -1 takes them all."""
  sizes = [getattr(config, axis) for axis in mesh_lib.AXES]
  devices = jax.devices()
  return devices if -1 in sizes else devices[: math.prod(sizes)]
