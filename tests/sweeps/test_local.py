"""Runs as processes of this machine, forked from one that has imported all."""

import os
import signal
import time

import pytest
import small_sweep

from t2x.sweeps import ownership
from t2x.sweeps import study as study_lib
from t2x.sweeps.launchers import choice
from t2x.sweeps.launchers import launcher
from t2x.sweeps.launchers import local


@pytest.fixture(scope='module')
def warm():
  made = local.LocalLauncher(local.LocalConfig(devices=8))
  yield made
  made.close()


@pytest.fixture
def job(tmp_path):
  """A job whose stand-in is started as `python SCRIPT`."""
  facts = small_sweep.facts(tmp_path)
  own = small_sweep.job(study_lib.create(tmp_path / 'study', facts))
  return launcher.LaunchJob(
    name=own.name,
    command=('python', *own.command[1:]),
    workdir=own.workdir,
    log=own.log,
    group=own.group,
  )


def _end(made, handle):
  deadline = time.monotonic() + 60
  while not (state := made.state(handle)).is_over:
    assert time.monotonic() < deadline
    time.sleep(0.02)
  return state


def test_a_fork_ends_as_a_process_would(warm, job, monkeypatch):
  (handle,) = warm.submit([job])
  assert _end(warm, handle).phase == 'ended'
  assert os.path.exists(f'{job.workdir}/finished.json')
  os.unlink(f'{job.workdir}/metrics.jsonl')
  monkeypatch.setenv('DIE', '3:9')  # The environment is that of each start.
  (handle,) = warm.submit([job])
  state = _end(warm, handle)
  assert (state.phase, state.message) == ('failed', 'exit status 3')
  assert warm.logs(handle) == 'died as asked'


def test_a_fork_is_told_to_end_and_killed(warm, job, monkeypatch):
  monkeypatch.setenv('PAUSE', '0.2')
  (handle,) = warm.submit([job])
  while not os.path.exists(f'{job.workdir}/metrics.jsonl'):
    time.sleep(0.02)
  warm.cancel(handle)
  assert _end(warm, handle).phase == 'ended'
  assert not os.path.exists(f'{job.workdir}/finished.json')
  (handle,) = warm.submit([job])
  os.kill(handle['process'], signal.SIGKILL)
  assert _end(warm, handle).message == 'signal 9 (SIGKILL)'


def test_forks_end_with_their_server(job, monkeypatch):
  monkeypatch.setenv('PAUSE', '0.2')
  made = local.LocalLauncher(local.LocalConfig(devices=8))
  (handle,) = made.submit([job])
  number, started = handle['process'], handle['started']
  while not os.path.exists(f'{job.workdir}/metrics.jsonl'):
    time.sleep(0.02)
  made.close()
  deadline = time.monotonic() + 20
  while ownership.start_of(number) == started:
    assert time.monotonic() < deadline
    time.sleep(0.02)
  assert not os.path.exists(f'{job.workdir}/finished.json')
  # A later process knows the job by its handle.
  other = local.LocalLauncher(local.LocalConfig(devices=8))
  assert other.state(handle).phase == 'lost'


def test_processes_share_devices(job):
  made = choice.make('local', ['devices=8', 'processes=2'])
  text = made.render([job])
  assert text.startswith(
    'python scripts/launch_local.py --num_processes=2 --devices_per_process=4 '
    '-- '
  )
  alone = choice.make('local', ['devices=4']).render([job])
  assert alone.startswith('JAX_PLATFORMS=cpu XLA_FLAGS=')
  assert 'device_count=4' in alone and ' python /' in alone
  with pytest.raises(ValueError, match='cannot be shared by launcher'):
    choice.make('local', ['devices=8', 'processes=3'])
  with pytest.raises(ValueError, match='say how many these are'):
    choice.make('local', ['processes=3'])
