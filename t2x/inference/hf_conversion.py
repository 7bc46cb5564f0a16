"""Checkpoints of Hugging Face to runs, and runs to checkpoints.

conversion.to_run('path/of/gpt2', 'runs/gpt2')
conversion.from_run('runs/mine', 'path/of/mine')
"""

import json

import jax
import numpy as np

from t2x import files
from t2x.config import overrides
from t2x.data import tokenizers
from t2x.inference import loading
from t2x.interop import huggingface
from t2x.trainer import checkpointer
from t2x.trainer import workdir as workdir_lib
from t2x.training import train_state


def is_run(directory: str) -> bool:
  """Whether a run has left checkpoints in a directory."""
  return (files.path(directory) / 'checkpoints').exists()


def to_run(directory: str, workdir: str) -> int:
  """Makes a run, at its step 0, of a checkpoint of Hugging Face.

  Args:
    directory: of the checkpoint.
    workdir: of the run, new or empty; may be gs://.

  Returns:
    The number of parameters.

  Raises:
    ValueError: see `huggingface.read`; or there is something in `workdir`.
  """
  root = files.path(workdir)
  if root.exists() and any(root.iterdir()):
    raise ValueError(
      f'{workdir} is there already and nothing is written over. Name a new '
      '--to, or remove it.'
    )
  found = huggingface.read(directory)
  model = found.model  # What does not fit is said before anything is written.
  # Of its own copy, which stays with the run.
  own = root / 'tokenizer' / tokenizers.FILES
  config = huggingface.experiment_of(found, own)
  root.mkdir(parents=True, exist_ok=True)
  found.tokenizer.save(root / 'tokenizer')
  text = json.dumps(found.hf, indent=2) + '\n'
  files.write_whole(root / workdir_lib.HUGGINGFACE, text)
  if found.own_generation is not None:
    text = json.dumps(found.own_generation, indent=2) + '\n'
    files.write_whole(root / workdir_lib.GENERATION, text)
  if found.labels:
    workdir_lib.write_labels(workdir, found.labels)
  workdir_lib.write_versions(workdir)
  files.write_whole(root / 'config.json', overrides.dumps(config))
  state = train_state.of_model(model)
  saved = checkpointer.Checkpoints(workdir)
  done = saved.save(0, state, {}) and saved.wait()
  saved.close()
  if not done:
    raise ValueError(f'The checkpoint could not be written to {workdir}.')
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model))


def from_run(workdir: str, directory: str, step: int | None = None) -> str:
  """Writes a run's model as `transformers` loads it.

  Args:
    workdir: of the run.
    directory: new, or empty.
    step: of the checkpoint; default the newest.

  Returns:
    The family that computes the same, such as gpt2.

  Raises:
    ValueError: see `loading.load` and `huggingface.write`.
  """
  trained = loading.load(workdir, step=step)
  hf = workdir_lib.read_huggingface(workdir)
  return huggingface.write(
    directory,
    trained.model,
    trained.tokenizer,
    hf=hf,
    generation=trained.generation,
    labels=trained.labels,
    problem=trained.problem,
  )
