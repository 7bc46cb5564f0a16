"""A run that takes seconds: two layers, bytes, a few kilobytes of text.

As a script it is an experiment with the usual command line, whose data lies in
the directory $TINY_DIRECTORY.
"""

import json
import os
import pathlib
import subprocess
import sys
import time

import commands

from t2x import main
from t2x.config import experiment
from t2x.config import overrides
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import position
from t2x.models import decoder
from t2x.parallel import mesh as mesh_lib
from t2x.tracking import metrics
from t2x.trainer import checkpointer
from t2x.training import optim

_WORDS = 'the run goes on from where it stopped and no step is lost'.split()


def write_corpus(directory: pathlib.Path) -> str:
  """Writes twelve small documents and returns their glob."""
  directory.mkdir(parents=True, exist_ok=True)
  for i in range(12):
    words = [_WORDS[(i * 7 + j * (i + 3)) % len(_WORDS)] for j in range(120)]
    file = directory / f'{i}.txt'
    if not file.exists():  # A new time would be a new corpus.
      file.write_text(f'{i} ' + ' '.join(words))
  return str(directory / '*.txt')


def experiment_of(directory: pathlib.Path, **settings) -> experiment.Experiment:
  """Returns a tiny experiment whose data lies in `directory`.

  Args:
    directory: for the corpus and what is prepared of it.
    **settings: as for --set, `__` for the dots: `train__num_steps=3`.
  """
  config = experiment.Experiment(
    model=decoder.DecoderConfig(
      vocab_size=384,
      num_layers=2,
      embed_dim=16,
      attention=attention_config.Dense(num_heads=4, head_dim=4),
      mlp=mlp.MlpConfig(hidden=32),
      position=position.Learned(max_length=64),
    ),
    data=data.DataConfig(
      source='text_files',
      files=write_corpus(directory / 'corpus'),
      data_dir=str(directory / 'data'),
      length=32,
      batch_size=8,
      eval_splits=('train',),
      tokenizer=tokenizers.Bytes(),
    ),
    optim=optim.AdamW(
      learning_rate=1e-2, schedule=optim.Schedule(shape='constant')
    ),
    train=experiment.TrainConfig(
      num_steps=4, eval_every=0, eval_batches=1, checkpoint_every=2
    ),
    mesh=mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2),
  )
  texts = {n.replace('__', '.'): str(v) for n, v in settings.items()}
  return overrides.override(config, texts)


def run(
  directory: pathlib.Path, *arguments: str, script: str = __file__
) -> subprocess.CompletedProcess[str]:
  """Runs a script, by default this file, and waits for its end."""
  env = {**os.environ, 'TINY_DIRECTORY': str(directory)}
  return commands.run(script, *arguments, env=env)


def start(
  directory: pathlib.Path, *arguments: str, script: str = __file__, **options
):
  """Starts a script, by default this file, in a process of its own."""
  root = pathlib.Path(__file__).parents[1]
  env = {
    **os.environ,
    'PYTHONPATH': f'{root}:{root / "tests"}',
    'TINY_DIRECTORY': str(directory),
  }
  return subprocess.Popen(
    [sys.executable, script, *arguments],
    env=env,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


def wait_for(path: pathlib.Path, processes, seconds: float = 120) -> None:
  """Waits until `path` exists; fails if one of `processes` ends before."""
  deadline = time.monotonic() + seconds
  while not path.exists():
    ended = [p for p in processes if p.poll() is not None]
    if ended or time.monotonic() > deadline:
      for process in processes:
        process.kill()
      said = [process.communicate() for process in processes]
      raise AssertionError(f'{path} has not come: {said}')
    time.sleep(0.05)


def losses(workdir) -> list[float]:
  """Returns the losses of a run, whose steps must be 1, 2, 3, ..."""
  rows = metrics.read_rows(workdir)
  assert [row['step'] for row in rows] == list(range(1, len(rows) + 1))
  return [row['loss'] for row in rows]


def saved_and_restored(workdir, state, shapes):
  """Returns a train state after it was a checkpoint."""
  saved = checkpointer.Checkpoints(workdir, keep_last=1, keep_every=None)
  step = int(state.step)
  saved.save(step, state, {'step': step})
  saved.wait()
  restored = saved.restore(shapes)
  assert restored is not None and restored[0] == step
  saved.close()
  return restored[1]


def saved_steps(workdir) -> list[int]:
  """Returns the steps whose checkpoints are complete."""
  names = [p.name for p in (pathlib.Path(workdir) / 'checkpoints').iterdir()]
  return sorted(int(name) for name in names if name.isdigit())


def history(workdir) -> list[dict]:
  """Returns the changes of settings that a run has logged."""
  text = (pathlib.Path(workdir) / 'history.jsonl').read_text()
  return [json.loads(line)['changes'] for line in text.splitlines()]


if __name__ == '__main__':
  main.run(lambda: experiment_of(pathlib.Path(os.environ['TINY_DIRECTORY'])))


# Of an experiment that is to be as tiny.
_SMALL = {
  'model.vocab_size': 384,
  'model.num_layers': 2,
  'model.embed_dim': 16,
  'model.attention.head_dim': 4,
  'model.mlp.hidden': 32,
  'model.dropout': 0.1,
  'data.source': 'text_files',
  'data.eval_splits': '',
  'data.tokenizer': 'bytes',
  'data.length': 32,
  'data.batch_size': 8,
}


def small(directory: pathlib.Path, name: str = '') -> dict[str, object]:
  """Settings that make experiment `name` tiny, of data in `directory`."""
  files = write_corpus(directory / 'corpus')
  own = {'data.files': files, 'data.data_dir': directory / 'data'}
  settings = _SMALL | own
  if 'moe_tiny' in name:  # Its layers are of two kinds.
    hidden = settings.pop('model.mlp.hidden')
    settings |= {f'model.mlp_pattern.{i}.hidden': hidden for i in range(2)}
  return settings
