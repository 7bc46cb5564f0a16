"""What becomes of the processes that scripts/launch_local.py starts."""

import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import commands
import numpy as np
import pytest
import shared_runs
import simulated
import tiny

from t2x.tracking import metrics
from t2x.trainer import train

_STEPS = 10
_ROOT = pathlib.Path(__file__).parents[2]
_LAUNCH = str(_ROOT / 'scripts' / 'launch_local.py')
_SETTINGS = (f'--set=train.num_steps={_STEPS}', '--set=data.eval_splits=')


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--num_processes=2'], 'no script: name it after --'),
    (
      ['--num_processes=2', __file__, '--workdir=a b'],
      r"come after --, as in -- \S+test_launch_local.py '--workdir=a b'",
    ),
    (['--'], 'no script: name it after --'),
    (['--num_processes=0', '--', __file__], '--num_processes=0; .* at least 1'),
    (['--devices_per_process=-1', '--', __file__], '=-1; it is at least 1'),
    (['--', 'nowhere.py'], 'nowhere.py: there is no such script'),
    (['--num_processes=two', '--', __file__], 'invalid int value'),
  ],
)
def test_what_cannot_be_launched(arguments, message):
  done = commands.run(_LAUNCH, *arguments)
  assert done.returncode == 2
  assert not done.stdout
  assert re.search(message, done.stderr), done.stderr


def _launch(directory, workdir, *arguments):
  """Launches tests/faulty.py as two processes of four devices."""
  return tiny.start(
    directory,
    '--num_processes=2',
    '--devices_per_process=4',
    '--',
    str(_ROOT / 'tests' / 'faulty.py'),
    f'--workdir={workdir}',
    *_SETTINGS,
    *arguments,
    script=_LAUNCH,
  )


def _child(launcher: subprocess.Popen, index: int) -> int:
  """Returns the id of a launched process."""
  path = pathlib.Path(f'/proc/{launcher.pid}/task/{launcher.pid}/children')
  for child in path.read_text().split():
    command = pathlib.Path(f'/proc/{child}/cmdline').read_bytes()
    if f'--process_id={index}'.encode() in command.split(b'\0'):
      return int(child)
  raise AssertionError(f'no process {index}')


_DEAF = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('deaf', flush=True)
time.sleep(300)
"""


def test_a_second_signal_ends_what_heeds_none(tmp_path):
  script = tmp_path / 'deaf.py'
  script.write_text(_DEAF)
  with subprocess.Popen(
    [sys.executable, _LAUNCH, '--num_processes=2', '--', str(script)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as launcher:
    assert launcher.stdout and launcher.stderr
    assert launcher.stdout.readline() == 'deaf\n'
    assert launcher.stderr.readline() == '[1] deaf\n'
    launcher.send_signal(signal.SIGTERM)
    assert 'the same signal again kills' in launcher.stderr.readline()
    assert launcher.poll() is None
    launcher.send_signal(signal.SIGTERM)
    _, error = launcher.communicate(timeout=30)
  assert launcher.returncode == 128 + signal.SIGKILL
  assert error.count('was killed by signal 9') == 2


@pytest.mark.slow
def test_a_killed_process_and_a_run_that_goes_on_with_fewer(
  tmp_path, tmp_path_factory, monkeypatch
):
  settings = {'train__num_steps': _STEPS, 'data__eval_splits': ''}
  alone = shared_runs.trained(tmp_path_factory, **settings)
  expected = tiny.losses(alone / 'run')
  config = tiny.experiment_of(alone, **settings)
  workdir = tmp_path / 'run'
  monkeypatch.setenv('PAUSE', '0.4')
  launcher = _launch(alone, workdir)
  tiny.wait_for(workdir / 'checkpoints' / '4', [launcher])
  os.kill(_child(launcher, 1), signal.SIGKILL)
  output, error = launcher.communicate(timeout=60)  # A minute at the most.
  assert launcher.returncode == 128 + signal.SIGKILL
  assert 'process 1 was killed by signal 9 (SIGKILL)' in error, error
  assert 'error: process 1 of 2 died' in error, error
  saved = tiny.saved_steps(workdir)[-1]
  assert 4 <= saved < _STEPS
  assert f'the last checkpoint in {workdir} is that of step {saved}' in error
  assert 'goes on from the last checkpoint' in error
  assert 'has not ended by itself' not in error
  assert 'tokens, 24 steps an epoch' in output

  four = tmp_path / 'four'
  shutil.copytree(workdir, four)
  train.train(config, str(workdir), show=False)  # Eight devices, one process.
  np.testing.assert_allclose(tiny.losses(workdir), expected, rtol=2e-6)
  monkeypatch.setenv('PAUSE', '0')
  monkeypatch.setenv('XLA_FLAGS', simulated.flags(4))
  done = tiny.run(alone, f'--workdir={four}', *_SETTINGS, '--set=mesh.fsdp=1')
  assert done.returncode == 0, done.stderr
  np.testing.assert_allclose(tiny.losses(four), expected, rtol=2e-6)
  assert tiny.history(four) == [{'mesh.fsdp': [2, 1]}]


@pytest.mark.slow
def test_a_slow_process_is_named_and_a_signal_reaches_all(
  tmp_path, monkeypatch
):
  monkeypatch.setenv('SLOW_INPUT', '0.2')
  workdir = tmp_path / 'run'
  launcher = _launch(tmp_path, workdir, '--set=train.num_steps=500')
  deadline = time.monotonic() + 120
  while len(metrics.read_rows(workdir)) < 25 and launcher.poll() is None:
    assert time.monotonic() < deadline, launcher.kill()
    time.sleep(0.2)
  launcher.send_signal(signal.SIGINT)
  output, error = launcher.communicate(timeout=60)
  assert launcher.returncode == 0, error
  said = [line for line in error.splitlines() if 'keeps the others' in line]
  assert 'Process 1 keeps the others waiting' in said[0], error
  assert ' its input took 0.2' in said[0]
  assert not any('Process 0 keeps' in line for line in said)
  stopped = [line for line in error.splitlines() if 'Stopped by' in line]
  assert len(stopped) == 2 and any(l.startswith('[1] ') for l in stopped), error
  # All that process 0 prints is whole, and nothing of another's is among it.
  assert output.rstrip().endswith('report.html, metrics.jsonl, checkpoints/')
  assert '[1]' not in output
  last = metrics.read_rows(workdir)[-1]['step']
  assert (workdir / 'checkpoints' / str(last)).exists()
