"""Several processes are one run: the same numbers, the same turns."""

import signal
import socket
import time

import jax
import numpy as np
import pytest
import tiny

from t2x import metrics
from t2x import processes
from t2x import train

_STEPS = 10
# Two processes of four devices, joined before anything asks for devices.
_SCRIPT = """
import os, sys
rank, port = int(os.environ['RANK']), os.environ['PORT']
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=4'
import jax
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(f'127.0.0.1:{port}', 2, rank)
import pathlib, time
import tiny
from t2x import main, run
if rank == 1 and 'UNREADABLE' in os.environ:  # One process alone fails.
  from t2x import checkpoint_files
  handler = checkpoint_files.ocp.PyTreeCheckpointHandler
  restore = handler.restore

  def fail(self, folder, args):
    if folder.parent.name == os.environ['UNREADABLE']:
      raise ValueError('no such shard')
    return restore(self, folder, args=args)

  handler.restore = fail
if 'INTERLEAVED' in os.environ:  # As the hosts of a torus may be.
  from t2x import mesh
  make = mesh.make
  mesh.make = lambda c: make(c, jax.devices()[::2] + jax.devices()[1::2])
advance = run.Run.advance

def slow(self, step):  # Room for a signal between the first step and the last.
  advance(self, step)
  time.sleep(float(os.environ['PAUSE']))

run.Run.advance = slow
main.run(lambda: tiny.experiment_of(pathlib.Path(os.environ['TINY_DIRECTORY'])))
"""


def _free_port() -> str:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return str(s.getsockname()[1])


def _start(directory, workdir, monkeypatch, pause=0.0, **settings):
  settings = {
    'train__num_steps': _STEPS,
    'train__keep_last': 9,
    'data__eval_splits': '',
    **settings,
  }
  flags = [f'--set={n.replace("__", ".")}={v}' for n, v in settings.items()]
  script = directory / 'two.py'
  script.write_text(_SCRIPT)
  monkeypatch.setenv('PORT', _free_port())
  monkeypatch.setenv('PAUSE', str(pause))
  started = []
  for rank in range(2):
    monkeypatch.setenv('RANK', str(rank))
    started.append(
      tiny.start(directory, f'--workdir={workdir}', *flags, script=str(script))
    )
  return started


def _finish(started) -> list[str]:
  """Waits for both; returns what each wrote to stderr."""
  try:
    errors = [process.communicate(timeout=180)[1] for process in started]
  finally:
    for process in started:
      process.kill()
  assert [process.returncode for process in started] == [0, 0], errors
  return errors


def _steps(workdir):
  return sorted(int(p.name) for p in (workdir / 'checkpoints').iterdir())


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """(directory, losses) of the same run in one process of eight devices."""
  directory = tmp_path_factory.mktemp('alone')
  config = tiny.experiment_of(
    directory, train__num_steps=_STEPS, data__eval_splits=''
  )
  train.train(config, str(directory / 'run'), show=False)
  return directory, tiny.losses(directory / 'run')


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(alone, tmp_path, monkeypatch):
  directory, expected = alone
  workdir = tmp_path / 'run'
  started = _start(directory, workdir, monkeypatch, pause=0.4)
  rows = workdir / 'metrics.jsonl'
  deadline = time.monotonic() + 120
  while not (rows.exists() and rows.read_text().count('\n') >= 2):
    if time.monotonic() > deadline or started[0].poll() is not None:
      _finish(started)
    time.sleep(0.05)
  started[1].send_signal(signal.SIGTERM)  # Not the one that writes.
  errors = _finish(started)
  assert all('Stopped by a signal after step' in error for error in errors)
  stopped = _steps(workdir)[-1]
  assert 2 <= stopped < _STEPS
  # One of them cannot read the newest: both take the one before it.
  monkeypatch.setenv('UNREADABLE', str(stopped))
  _finish(_start(directory, workdir, monkeypatch))
  assert (workdir / f'damaged_checkpoint_{stopped}').exists()
  np.testing.assert_allclose(tiny.losses(workdir), expected, rtol=2e-6)
  assert _steps(workdir)[-1] == _STEPS
  assert metrics.read_rows(workdir)[-1]['step'] == _STEPS


@pytest.mark.slow
def test_processes_whose_rows_have_gaps(alone, tmp_path, monkeypatch):
  directory, expected = alone
  monkeypatch.setenv('INTERLEAVED', '1')
  _finish(_start(directory, tmp_path / 'run', monkeypatch))
  np.testing.assert_allclose(tiny.losses(tmp_path / 'run'), expected, rtol=2e-6)


@pytest.mark.slow
def test_bad_settings_end_both(alone, tmp_path, monkeypatch):
  directory, _ = alone
  started = _start(
    directory, tmp_path / 'run', monkeypatch, model__embed_dim=15
  )
  for process in started:
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert 'embed_dim' in error or 'size 15' in error, error


def test_a_process_alone_asks_nobody():
  mesh = jax.make_mesh((8,), ('data',))
  any_process = processes.AnyProcess(mesh)
  assert any_process(True) and not any_process(False)
  assert processes.all_agree(True, 'here') and not processes.all_agree(
    False, ''
  )
  assert processes.is_primary()
