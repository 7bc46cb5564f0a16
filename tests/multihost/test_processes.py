"""Several processes are one run: the same numbers, the same turns."""

import pathlib
import signal
import subprocess
import sys

import faulty
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest
import shared_runs
import tiny

from t2x.multihost import processes
from t2x.tracking import metrics

_STEPS = 10
_ROOT = pathlib.Path(__file__).parents[1]


def _finish(started) -> list[str]:
  """Waits for both; returns what each wrote to stderr."""
  try:
    errors = [process.communicate(timeout=180)[1] for process in started]
  finally:
    for process in started:
      process.kill()
  assert [process.returncode for process in started] == [0, 0], errors
  return errors


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """(directory, losses) of the same run in one process of eight devices."""
  directory = shared_runs.trained(
    tmp_path_factory, train__num_steps=_STEPS, data__eval_splits=''
  )
  return directory, tiny.losses(directory / 'run')


@pytest.mark.slow
def test_two_processes_stop_together_and_go_on(alone, tmp_path, monkeypatch):
  directory, expected = alone
  workdir = tmp_path / 'run'
  started = faulty.start_two(directory, workdir, monkeypatch, pause=0.4)
  tiny.wait_for(workdir / 'checkpoints' / '2', started)
  started[1].send_signal(signal.SIGTERM)  # Not the one that writes.
  errors = _finish(started)
  assert all('Stopped by a signal after step' in error for error in errors)
  stopped = tiny.saved_steps(workdir)[-1]
  assert 2 <= stopped < _STEPS
  # One of them cannot read the newest: both take the one before it.
  monkeypatch.setenv('UNREADABLE', str(stopped))
  _finish(faulty.start_two(directory, workdir, monkeypatch))
  assert (workdir / f'damaged_checkpoint_{stopped}').exists()
  np.testing.assert_allclose(tiny.losses(workdir), expected, rtol=2e-6)
  assert tiny.saved_steps(workdir)[-1] == _STEPS
  assert metrics.read_rows(workdir)[-1]['step'] == _STEPS


@pytest.mark.slow
def test_processes_whose_rows_have_gaps(alone, tmp_path, monkeypatch):
  directory, expected = alone
  monkeypatch.setenv('INTERLEAVED', '1')
  _finish(faulty.start_two(directory, tmp_path / 'run', monkeypatch))
  np.testing.assert_allclose(tiny.losses(tmp_path / 'run'), expected, rtol=2e-6)


@pytest.mark.slow
def test_stages_of_two_processes(alone, tmp_path, monkeypatch):
  directory, expected = alone
  staged = {'mesh__pipe': 2, 'mesh__tensor': 1, 'pipeline__microbatches': 2}
  workdir = tmp_path / 'run'
  _finish(faulty.start_two(directory, workdir, monkeypatch, **staged))
  np.testing.assert_allclose(tiny.losses(workdir), expected, rtol=2e-5)


@pytest.mark.slow
def test_bad_settings_end_both(alone, tmp_path, monkeypatch):
  directory, _ = alone
  started = faulty.start_two(
    directory, tmp_path / 'run', monkeypatch, model__embed_dim=15
  )
  outputs = [process.communicate(timeout=120) for process in started]
  for process, (_, error) in zip(started, outputs):
    assert process.returncode == 1
    assert 'embed_dim' in error or 'size 15' in error, error
  # What others than process 0 say bears their number; the runtime itself may
  # add that the other is gone.
  first, *rest = ''.join(outputs[1]).splitlines()
  assert first.startswith('[1] error: '), first
  assert not any('size 15' in s for s in rest if not s.startswith('[1] ')), rest


@pytest.mark.slow
def test_rows_split_over_processes_in_every_way():
  done = subprocess.run(
    [
      sys.executable,
      str(_ROOT.parent / 'scripts' / 'launch_local.py'),
      '--num_processes=2',
      '--devices_per_process=4',
      '--',
      str(_ROOT / 'split_rows.py'),
    ],
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr
  assert done.stdout == 'all parts are right\n'


def test_parts_of_rows():
  mesh = jax.make_mesh((2, 4), ('data', 'context'))
  split = NamedSharding(mesh, P('data', 'context'))
  batch = {'a': np.arange(64).reshape(4, 16), 'b': np.ones((4, 8), np.float32)}
  placed = processes.put(batch, split, np.arange(4), 4)
  for name, array in batch.items():
    np.testing.assert_array_equal(placed[name], array)
    assert placed[name].sharding == split


def test_a_process_alone_asks_nobody():
  mesh = jax.make_mesh((8,), ('data',))
  any_process = processes.AnyProcess(mesh)
  assert any_process(True) and not any_process(False)
  assert processes.all_agree(True, 'here') and not processes.all_agree(
    False, ''
  )
  assert processes.is_primary()
