"""Sweeps of the tiny experiment, whose trials are stand-ins or real."""

import pathlib
import sys

import tiny

from t2x.sweeps import definition
from t2x.sweeps import ownership
from t2x.sweeps import points
from t2x.sweeps import scheduler
from t2x.sweeps import search
from t2x.sweeps import space
from t2x.sweeps import study as study_lib
from t2x.sweeps.launchers import launcher
from t2x.sweeps.launchers import local

_STAND_IN = pathlib.Path(__file__).parent / 'stand_in.py'
RATES = (1e-4, 1e-3, 1e-2, 1e-1)


def sweep(**changes) -> definition.Sweep:
  """Returns a sweep over four rates; `changes` are its fields."""
  fields = {
    'parameters': {'optim.learning_rate': RATES},
    'metric': 'eval/train/loss',
  }
  return definition.Sweep(**fields | changes)


def drawn(**changes) -> definition.Sweep:
  """Returns a sweep that draws rates."""
  return sweep(
    parameters={'optim.learning_rate': space.LogUniform(1e-4, 1.0)},
    search=search.RandomSearch(num_trials=12),
    **changes,
  )


def facts(directory: pathlib.Path, **changes) -> study_lib.Facts:
  """Returns the facts of a study of the tiny experiment."""
  config = tiny.experiment_of(directory, train__num_steps=8)
  return study_lib.Facts(
    experiment='tiny', config=config, sweep=sweep(**changes)
  )


def command(run: points.RunConfig, workdir: str) -> list[str]:
  """Returns the command line of a stand-in."""
  own = [p for n, v in run.settings.items() for p in ('--set', f'{n}={v}')]
  more = [f'--stop_after={run.stop_after}'] if run.stop_after else []
  start = [sys.executable, str(_STAND_IN), f'--workdir={workdir}']
  return [*start, *own, *more]


def python_command(run: points.RunConfig, workdir: str) -> list[str]:
  """Returns the command line of a stand-in that may be forked."""
  return ['python', *command(run, workdir)[1:]]


def job(study: study_lib.Study) -> launcher.LaunchJob:
  """Returns the job of a study's first point."""
  found = points.candidate(
    study.facts.config, study.sweep, {'optim.learning_rate': RATES[0]}
  )
  return scheduler.job_of(found.runs[0], command, study.directory)


def worker(study: study_lib.Study, **options) -> scheduler.Scheduler:
  """Returns a worker of a study, whose trials are stand-ins."""
  said: list[str] = []
  result = scheduler.Scheduler(
    study,
    local.LocalLauncher(local.LocalConfig(devices=8)),
    ownership.Workers(study.directory),
    **{
      'command': command,
      'parallel': 2,
      'say': said.append,
      'poll_seconds': 0.02,
      **options,
    },
  )
  result.said = said  # For tests alone.
  return result


def results(study: study_lib.Study) -> dict[str, tuple[str, float | None]]:
  """Returns key -> (state, value) of every trial."""
  return {trial.key: (trial.state, trial.value) for trial in study.trials()}


def starts(study: study_lib.Study) -> dict[str, int]:
  """Returns how often each run was started, by key."""
  return {
    file.parent.name: len(file.read_text().splitlines())
    for file in pathlib.Path(study.directory).glob('trials/*/starts')
  }
