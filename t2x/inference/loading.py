"""Loads a trained run, or a checkpoint of Hugging Face, for inference.

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
    workdir: directory of a run, or of a checkpoint of Hugging Face.
    step: step of the checkpoint; None for the newest.
    settings: overrides of the config such as 'model.dropout=0.1', as for --set;
      'mesh.tensor=8' spreads the model over eight devices.

  Raises:
    ValueError: there is no run or no such checkpoint, or a setting is invalid.
  """
  workdir = str(files.path(workdir))
  if huggingface.is_checkpoint(workdir):
    checkpoint = huggingface.read(workdir)
    config = huggingface.experiment_of(checkpoint, workdir)
    config, mesh, shapes = _placed(config, settings)
    model = jax.device_put(
      checkpoint.build(config.model),
      jax.tree.map(lambda x: x.sharding, shapes.model),
    )
    return trained_model.Trained(
      config=config,
      model=model,
      tokenizer=checkpoint.tokenizer,
      step=0,
      mesh=mesh,
      labels=checkpoint.labels,
      generation=_warn_of_ignored(workdir, checkpoint.generation),
      problem=labels_lib.problem(checkpoint.hf),
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
  # Training on classes gives one label to a text, whatever the head was before.
  has_classes = words.has_classes(config.data)
  return trained_model.Trained(
    config=config,
    model=model,
    tokenizer=tokenizer,
    step=step,
    mesh=mesh,
    labels=workdir_lib.read_labels(workdir),
    temperature=workdir_lib.read_temperature(workdir),
    generation=_warn_of_ignored(workdir, _generation(workdir, config)),
    corpus=workdir_lib.read_corpus(workdir),
    problem=labels_lib.SINGLE if has_classes else labels_lib.problem(hf),
  )


def _generation(
  workdir: str, config: experiment.Experiment
) -> generation_config.GenerationConfig:
  """Returns the generation settings of a run that began at a checkpoint."""
  return huggingface.generation_of(
    config.model,
    workdir_lib.read_huggingface(workdir) or {},
    workdir_lib.read_generation(workdir),
    workdir,
  )


def _warn_of_ignored(
  workdir: str, generation: generation_config.GenerationConfig
) -> generation_config.GenerationConfig:
  """Returns generation settings after a warning of those that are ignored."""
  if generation.ignored:
    _log.warning(
      '%s: settings of its texts that are not honoured: %s.',
      workdir,
      ', '.join(generation.ignored),
    )
  return generation


def _placed(
  config: experiment.Experiment, settings: Sequence[str]
) -> tuple[experiment.Experiment, jax.sharding.Mesh, train_state.TrainState]:
  """Returns the config with its settings, its mesh, and the state's shapes.

  The shapes are a state of `jax.ShapeDtypeStruct` with shardings.
  """
  config = dataclasses.replace(config, mesh=mesh_lib.MeshConfig(data=1))
  config = overrides.override(config, overrides.parse_settings(settings))
  devices = _devices(config.mesh)
  # How training divides rows into microbatches does not matter here.
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
  """Returns as many devices as the mesh asks for; all if an axis is -1."""
  sizes = [getattr(config, axis) for axis in mesh_lib.AXES]
  devices = jax.devices()
  return devices if -1 in sizes else devices[: math.prod(sizes)]
