"""scripts/sweep.py with real runs, and what it says."""

import json
import os
import pathlib
import signal

import commands
import pytest
import real_sweep
import tiny

from t2x.sweeps import study as study_lib

_RATES = (1e-3, 1e-2)
_DEVICES = ('--launcher_set', 'devices=8')


@pytest.fixture
def arguments(tmp_path):
  study = str(tmp_path / 'study')
  return real_sweep.arguments(tmp_path, study, _RATES, 8, *_DEVICES)


def _run(tmp_path, *arguments):
  env = {
    **os.environ,
    'TINY_DIRECTORY': str(tmp_path),
    'PYTHONPATH': str(pathlib.Path(tiny.__file__).parent),
  }
  return commands.run(real_sweep.SCRIPT, *arguments, env=env)


@pytest.mark.slow
def test_a_rate_sweep_that_is_killed_twice(tmp_path, arguments):
  """The sweep itself, and then a trial; results are those of plain runs."""
  study = tmp_path / 'study'
  first = real_sweep.start(tmp_path, *arguments)
  real_sweep.wait(
    lambda: (
      list(study.glob('trials/*/checkpoints/2/commit_success.txt'))
      or list(study.glob('trials/*/checkpoints/2'))
    )
  )
  first.kill()
  first.wait()
  for pipe in (first.stdout, first.stderr):
    pipe.close()
  second = real_sweep.start(tmp_path, *arguments)
  killed = []

  def kill_the_second_trial():
    if len(list(study.glob('trials/*/checkpoints'))) == 2:
      for job in study.glob('jobs/*.json'):
        killed.append(json.loads(job.read_text())['process'])
        os.kill(killed[-1], signal.SIGKILL)
    return killed or second.poll() is not None

  real_sweep.wait(kill_the_second_trial)
  said, errors = second.communicate(timeout=240)
  assert second.returncode == 0, (said, errors)
  assert killed and 'SIGKILL' in said and 'goes on' in said, said
  trials = study_lib.read(study).trials()
  assert [t.point['optim.learning_rate'] for t in trials] == [*_RATES]
  assert [t.state for t in trials] == ['complete'] * 2
  assert [t.outcome['failures'] for t in trials] == [0, 1]
  for trial, rate in zip(trials, _RATES):
    workdir = real_sweep.run_alone(tmp_path, rate, 8)
    assert tiny.losses(study / 'trials' / trial.key) == tiny.losses(workdir)
    rows = tiny.metrics.read_rows(workdir)
    assert trial.value == rows[-1]['eval/train/loss']


def test_a_dry_run_starts_nothing(tmp_path, arguments):
  done = _run(tmp_path, *arguments, '--dry_run')
  assert done.returncode == 0, done.stderr
  assert 'grid over optim.learning_rate, 2 trials' in done.stdout
  assert '--set optim.learning_rate=0.001' in done.stdout
  assert 'All together: ' in done.stdout
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
    (['--set', 'mesh.tensor=3'], 'None of the 2 points can run'),
    (['--launcher=gke', '--launcher_set', 'slice=v5e-17'], 'Near are v5e-16'),
  ],
)
def test_messages(tmp_path, arguments, more, message):
  if '--launcher=gke' in more:
    arguments = [a for a in arguments if a not in _DEVICES]
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
