"""GPUs and TPU chips, dealt among the runs of a machine."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import small_sweep

from t2x.hardware import backends
from t2x.sweeps import points
from t2x.sweeps import study as study_lib
from t2x.sweeps.launchers import accelerators
from t2x.sweeps.launchers import choice


@pytest.fixture
def gpus(tmp_path, monkeypatch):
  """A machine whose environment names four GPUs."""
  _pretend(monkeypatch, tmp_path, 'CUDA_VISIBLE_DEVICES', '4,5,6,7')
  monkeypatch.setattr(backends, 'has_module', lambda name: True)


@pytest.fixture
def chips(tmp_path, monkeypatch):
  """A machine whose environment names eight TPU chips."""
  _pretend(monkeypatch, tmp_path, 'TPU_VISIBLE_CHIPS', '0,1,2,3,4,5,6,7')
  monkeypatch.setattr(backends, 'has_tpu', lambda: True)


def _pretend(monkeypatch, tmp_path, variable, names):
  monkeypatch.setenv(variable, names)
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  monkeypatch.setattr(accelerators.tempfile, 'gettempdir', lambda: tmp_path)


@pytest.mark.parametrize('warm', ['true', 'false'])
def test_no_gpu_is_with_two_runs_at_a_time(gpus, tmp_path, monkeypatch, warm):
  monkeypatch.setenv('PAUSE', '0.05')
  made = choice.make('local', ['accelerators=2', f'warm={warm}'])
  study = study_lib.create(tmp_path / 'study', small_sweep.facts(tmp_path))
  worker = small_sweep.worker(
    study, parallel=4, command=small_sweep.python_command
  )
  worker._launcher = made
  assert made.devices == points.Devices(number=2)
  worker.run()
  made.close()
  had = [
    json.loads(file.read_text())
    for file in (tmp_path / 'study').glob('trials/*/accelerators')
  ]
  assert len(had) == 4 and {run['seen'] for run in had} == {'4,5', '6,7'}
  apart = []
  for one, other in itertools.combinations(had, 2):
    overlaps = one['began'] < other['ended'] and other['began'] < one['ended']
    apart.append(overlaps and one['seen'] != other['seen'])
    assert not overlaps or one['seen'] != other['seen']
  assert any(apart)


def test_a_run_keeps_its_gpus_when_the_dealer_is_killed(gpus):
  """And frees them with its end, however that comes."""
  code = """
import os, subprocess, sys, tempfile
from t2x.hardware import backends
from t2x.sweeps.launchers import accelerators
backends.has_module = lambda name: True
accelerators.tempfile.gettempdir = lambda: sys.argv[1]
held = accelerators.Dealer(4).take()
run = subprocess.Popen(['sleep', '60'], pass_fds=held.descriptors)
print(run.pid, flush=True)
run.wait()
"""
  folder = str(accelerators.tempfile.gettempdir())
  dealer = subprocess.Popen(
    [sys.executable, '-c', code, folder], stdout=subprocess.PIPE, text=True
  )
  assert dealer.stdout is not None
  run = int(dealer.stdout.readline())
  ours = accelerators.Dealer(2)
  assert ours.take() is None
  dealer.kill()
  dealer.wait()
  dealer.stdout.close()
  assert ours.take() is None
  os.kill(run, signal.SIGKILL)
  deadline = time.monotonic() + 10
  while (held := ours.take()) is None:
    assert time.monotonic() < deadline
    time.sleep(0.02)
  held.release()


def test_groups(gpus):
  dealer = accelerators.Dealer(2)
  first, second = dealer.take(), dealer.take()
  assert first is not None and second is not None and dealer.take() is None
  assert first.environment == {'CUDA_VISIBLE_DEVICES': '4,5'}
  assert accelerators.Dealer(None).take() is None, 'all, where some are taken'
  second.release()
  again = dealer.take()
  assert again is not None
  assert again.environment == {'CUDA_VISIBLE_DEVICES': '6,7'}


def test_chips_of_a_host(chips):
  held = accelerators.Dealer(4).take()
  assert held is not None
  assert held.environment == {
    'TPU_VISIBLE_CHIPS': '0,1,2,3',
    'TPU_CHIPS_PER_PROCESS_BOUNDS': '2,2,1',
    'TPU_PROCESS_BOUNDS': '1,1,1',
  }
  with pytest.raises(ValueError, match='by 1, 2, 4, 8'):
    accelerators.Dealer(3)


def test_what_is_refused(gpus, monkeypatch):
  with pytest.raises(ValueError, match='this machine has 4'):
    choice.make('local', ['accelerators=5'])
  with pytest.raises(ValueError, match='Give one of them'):
    choice.make('local', ['accelerators=2', 'devices=8'])
  monkeypatch.setenv('JAX_PLATFORMS', 'cpu')
  with pytest.raises(ValueError, match='has no GPU and no TPU'):
    choice.make('local', ['accelerators=1'])
  assert not accelerators.Dealer(None).has_any
