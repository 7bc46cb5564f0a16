"""scripts/sweep.py with real runs, and what it says."""

import json
import os
import pathlib
import signal
import time

import commands
import pytest
import tiny

from t2x.sweeps import study as study_lib
from t2x.trainer import train

_ROOT = pathlib.Path(__file__).parents[2]
_SCRIPT = str(_ROOT / 'scripts' / 'sweep.py')
_EXPERIMENT = str(_ROOT / 'tests' / 'tiny_experiment.py')
_RATES = (1e-3, 1e-2)
_SETTINGS = {'train.num_steps': '8', 'data.eval_splits': 'train'}
_SWEEP = f"""
from t2x.sweeps import definition

def get_sweep():
  return definition.Sweep(
    parameters={{'optim.learning_rate': {_RATES}}}, metric='eval/train/loss'
  )
"""


@pytest.fixture
def arguments(tmp_path):
  (tmp_path / 'rates.py').write_text(_SWEEP)
  return [
    f'--experiment={_EXPERIMENT}',
    f'--sweep={tmp_path / "rates.py"}',
    f'--study={tmp_path / "study"}',
    '--launcher_set',
    'devices=8',
    *[p for n, v in _SETTINGS.items() for p in ('--set', f'{n}={v}')],
  ]


def _run(tmp_path, *arguments):
  env = {
    **os.environ,
    'TINY_DIRECTORY': str(tmp_path),
    'PYTHONPATH': str(_ROOT / 'tests'),
  }
  return commands.run(_SCRIPT, *arguments, env=env)


def _wait(condition, seconds=180):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


@pytest.mark.slow
def test_a_rate_sweep_that_is_killed_twice(tmp_path, arguments):
  """The sweep itself, and then a trial; results are those of plain runs."""
  study = tmp_path / 'study'
  first = tiny.start(tmp_path, *arguments, script=_SCRIPT)
  _wait(
    lambda: (
      list(study.glob('trials/*/checkpoints/2/commit_success.txt'))
      or list(study.glob('trials/*/checkpoints/2'))
    )
  )
  first.kill()
  first.wait()
  for pipe in (first.stdout, first.stderr):
    pipe.close()
  second = tiny.start(tmp_path, *arguments, script=_SCRIPT)
  killed = []

  def kill_the_second_trial():
    if len(list(study.glob('trials/*/checkpoints'))) == 2:
      for job in study.glob('jobs/*.json'):
        killed.append(json.loads(job.read_text())['process'])
        os.kill(killed[-1], signal.SIGKILL)
    return killed or second.poll() is not None

  _wait(kill_the_second_trial)
  said, errors = second.communicate(timeout=240)
  assert second.returncode == 0, (said, errors)
  assert killed and 'SIGKILL' in said and 'goes on' in said, said
  trials = study_lib.read(study).trials()
  assert [t.point['optim.learning_rate'] for t in trials] == [*_RATES]
  assert [t.state for t in trials] == ['complete'] * 2
  assert [t.outcome['failures'] for t in trials] == [0, 1]
  names = {n.replace('.', '__'): v for n, v in _SETTINGS.items()}
  for trial, rate in zip(trials, _RATES):
    workdir = tmp_path / f'plain-{rate}'
    config = tiny.experiment_of(tmp_path, **names, optim__learning_rate=rate)
    train.train(config, str(workdir), show=False)
    assert tiny.losses(study / 'trials' / trial.key) == tiny.losses(workdir)
    rows = tiny.metrics.read_rows(workdir)
    assert trial.value == rows[-1]['eval/train/loss']


def test_a_dry_run_starts_nothing(tmp_path, arguments):
  done = _run(tmp_path, *arguments, '--dry_run')
  assert done.returncode == 0, done.stderr
  assert 'grid over optim.learning_rate, 2 trials' in done.stdout
  assert '--set optim.learning_rate=0.001' in done.stdout
  assert 'TFLOP in all' in done.stdout
  assert not (tmp_path / 'study').exists()


@pytest.mark.parametrize(
  'more, message',
  [
    (['--launcher=slrum'], "Did you mean 'slurm'"),
    (['--launcher_set', 'device=8'], "Did you mean 'devices'"),
    (
      ['--sweep_set', 'metric=eval/test/loss'],
      "Did you mean 'eval/train/loss'",
    ),
    (['--sweep=none.py'], '--sweep=none.py: there is no such file'),
    (['--set', 'mesh.tensor=3'], '2 of 2 points cannot run'),
    (['--launcher=gke', '--launcher_set', 'slice=v5e-17'], 'Near are v5e-16'),
  ],
)
def test_messages(tmp_path, arguments, more, message):
  if '--launcher=gke' in more:
    arguments = [
      a for a in arguments if a not in ('--launcher_set', 'devices=8')
    ]
    more = [*more, '--launcher_set', 'image=i']
  done = _run(tmp_path, *arguments, *more, '--dry_run')
  assert done.returncode == 1
  assert message in done.stderr, done.stderr
  assert 'Traceback' not in done.stderr
  assert done.stderr.count('error:') == 1


def test_what_is_missing(tmp_path):
  for arguments, message in (
    ([], '--study is missing'),
    ([f'--study={tmp_path}'], '--sweep is missing'),
    ([f'--study={tmp_path}', '--show'], 'holds no study'),
  ):
    done = _run(tmp_path, *arguments)
    assert done.returncode == 1 and message in done.stderr, done.stderr
    assert 'Traceback' not in done.stderr
