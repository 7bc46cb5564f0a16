"""Sweeps of the tiny experiment by scripts/sweep.py, with real runs."""

from collections.abc import Callable
from collections.abc import Sequence
import pathlib
import time

import tiny

from t2x.trainer import train

_ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = str(_ROOT / 'scripts' / 'sweep.py')
EXPERIMENT = str(_ROOT / 'tests' / 'tiny_experiment.py')
_SWEEP = """
from t2x.sweeps import definition

def get_sweep():
  return definition.Sweep(
    parameters={{'optim.learning_rate': {rates}}}, metric='eval/train/loss'
  )
"""


def arguments(
  directory: pathlib.Path,
  study: str,
  rates: Sequence[float],
  num_steps: int,
  *more: str,
) -> list[str]:
  """Writes a sweep over rates, and returns the script's arguments.

  Args:
    directory: directory for the sweep's file.
    study: directory of the study.
    rates: learning rates.
    num_steps: steps of each run.
    *more: more arguments.
  """
  file = directory / 'rates.py'
  file.write_text(_SWEEP.format(rates=tuple(rates)))
  settings = {'train.num_steps': num_steps, 'data.eval_splits': 'train'}
  return [
    f'--experiment={EXPERIMENT}',
    f'--sweep={file}',
    f'--study={study}',
    *more,
    *[part for n, v in settings.items() for part in ('--set', f'{n}={v}')],
  ]


def start(directory: pathlib.Path, *arguments: str):
  """Starts the script in a process of its own."""
  return tiny.start(directory, *arguments, script=SCRIPT)


def run_alone(
  directory: pathlib.Path, rate: float, num_steps: int
) -> pathlib.Path:
  """Runs one point by itself, on 8 devices, and returns its workdir."""
  workdir = directory / f'alone-{rate}'
  config = tiny.experiment_of(
    directory,
    train__num_steps=num_steps,
    data__eval_splits='train',
    optim__learning_rate=rate,
  )
  train.train(config, str(workdir), show=False)
  return workdir


def wait(condition: Callable[[], object], seconds: float = 300) -> None:
  """Waits until a condition holds."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)
