"""Converts checkpoints of Hugging Face to runs, and runs to such checkpoints.

hf_conversion.to_run('path/of/gpt2', 'runs/gpt2')
hf_conversion.from_run('runs/mine', 'path/of/mine')
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
  """Whether a directory holds the checkpoints of a run."""
  return (files.path(directory) / 'checkpoints').exists()


def to_run(directory: str, workdir: str) -> int:
  """Makes a run, at step 0, from a checkpoint of Hugging Face.

  Args:
    directory: directory of the checkpoint.
    workdir: directory of the run, new or empty; may be gs://.

  Returns:
    The number of parameters.

  Raises:
    ValueError: `huggingface.read` raises it, or `workdir` is not empty.
  """
  root = files.path(workdir)
  if root.exists() and any(root.iterdir()):
    raise ValueError(
      f'{workdir} is there already and nothing is written over. Name a new '
      '--to, or remove it.'
    )
  checkpoint = huggingface.read(directory)
  # The weights are read first, so that errors come before anything is written.
  model = checkpoint.model
  # The config names the run's own copy of the tokenizer.
  tokenizer_files = root / 'tokenizer' / tokenizers.FILES
  config = huggingface.experiment_of(checkpoint, tokenizer_files)
  root.mkdir(parents=True, exist_ok=True)
  checkpoint.tokenizer.save(root / 'tokenizer')
  text = json.dumps(checkpoint.hf, indent=2) + '\n'
  files.write_whole(root / workdir_lib.HUGGINGFACE, text)
  if checkpoint.own_generation is not None:
    text = json.dumps(checkpoint.own_generation, indent=2) + '\n'
    files.write_whole(root / workdir_lib.GENERATION, text)
  if checkpoint.labels:
    workdir_lib.write_labels(workdir, checkpoint.labels)
  workdir_lib.write_versions(workdir)
  files.write_whole(root / 'config.json', overrides.dumps(config))
  state = train_state.of_model(model)
  saved = checkpointer.Checkpoints(workdir)
  is_saved = saved.save(0, state, {}) and saved.wait()
  saved.close()
  if not is_saved:
    raise ValueError(f'The checkpoint could not be written to {workdir}.')
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(model))


def from_run(workdir: str, directory: str, step: int | None = None) -> str:
  """Writes a run's model as a checkpoint that `transformers` loads.

  Args:
    workdir: directory of the run.
    directory: directory to write, new or empty.
    step: step of the run's checkpoint; None for the newest.

  Returns:
    The `model_type` of the written checkpoint, such as gpt2.

  Raises:
    ValueError: `loading.load` or `huggingface.write` raises it.
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
