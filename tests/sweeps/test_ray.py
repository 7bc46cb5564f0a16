"""Sweeps on a real Ray cluster of this machine."""

import contextlib
import math
import os
import signal
import sys
import threading

import extras
import psutil
import pytest
import real_sweep
import small_sweep
import tiny

from t2x.sweeps import points
from t2x.sweeps import study as study_lib
from t2x.sweeps.launchers import choice
from t2x.sweeps.launchers import ray_cluster

extras.need('ray', extra='ray')
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def cluster():
  import ray

  patch = pytest.MonkeyPatch()
  patch.setenv('PAUSE', '0.8')  # Actors have the cluster's environment.
  ray.init(
    num_cpus=4,
    namespace='t2x',
    include_dashboard=False,
    log_to_driver=False,
    configure_logging=False,
  )
  yield ray
  ray.shutdown()
  patch.undo()


def _launcher():
  return ray_cluster.RayLauncher(ray_cluster.RayConfig(hosts=2, devices=4))


def _losses():
  return [(math.log10(rate) + 2) ** 2 + 1 / 8 for rate in small_sweep.RATES]


def _worker(study, **options):
  worker = small_sweep.worker(study, **options)
  worker._launcher = _launcher()
  return worker


@pytest.fixture
def study(tmp_path):
  return study_lib.create(tmp_path / 'study', small_sweep.facts(tmp_path))


@contextlib.contextmanager
def _killing(find):
  """Kills the first process that `find` returns; yields those it killed."""
  killed, ended = [], threading.Event()

  def kill():
    while not killed and not ended.wait(0.05):
      for number in find()[:1]:
        with contextlib.suppress(ProcessLookupError):
          os.kill(number, signal.SIGKILL)
          killed.append(number)

  thread = threading.Thread(target=kill)
  thread.start()
  try:
    yield killed
  finally:
    ended.set()
    thread.join()


def _second_processes(study):
  """Returns the second process of each run."""
  return [
    int(text.split()[0])
    for file in study.directory.glob('trials/*/others')
    if (text := file.read_text())
  ]


@pytest.mark.filterwarnings('ignore')
def test_a_sweep_whose_worker_is_killed(cluster, study):
  """One of the two processes of a run."""
  del cluster
  worker = _worker(study)
  with _killing(lambda: _second_processes(study)) as killed:
    worker.run()
  assert killed
  assert [t.value for t in study.trials()] == pytest.approx(_losses())
  assert sum(t.outcome['failures'] for t in study.trials()) == 1
  assert any('SIGKILL' in line for line in worker.said), worker.said


def test_settings():
  made = choice.make('ray', ['hosts=2', 'devices=4'])
  assert made.devices == points.Devices(number=8)
  tpu = choice.make('ray', ['slice=v6e-16', 'num_slices=2'])
  assert tpu.devices == points.Devices(number=32, num_slices=2, chip='v6e')
  with pytest.raises(ValueError, match='say what a run gets on each host'):
    choice.make('ray')


@pytest.mark.filterwarnings('ignore')
def test_real_runs_of_two_processes(cluster, tmp_path, monkeypatch):
  """A killed process costs a start, and no number."""
  del cluster
  config = tiny.experiment_of(
    tmp_path, train__num_steps=6, data__eval_splits='train'
  )
  facts = study_lib.Facts(
    experiment='tiny',
    config=config,
    sweep=small_sweep.sweep(parameters={'optim.learning_rate': (1e-3, 1e-2)}),
  )
  study = study_lib.create(tmp_path / 'study', facts)

  def command(run, workdir):
    settings = {'train.num_steps': '6', 'data.eval_splits': 'train'}
    own = [
      part
      for name, value in {**settings, **run.settings}.items()
      for part in ('--set', f'{name}={value}')
    ]
    start = [sys.executable, real_sweep.EXPERIMENT, f'--workdir={workdir}']
    # Actors have the environment of the cluster, which began before.
    return ['env', f'TINY_DIRECTORY={tmp_path}', *start, *own]

  def second_processes():
    """Returns that of the first run once that has saved a step."""
    if not list(study.directory.glob('trials/*/checkpoints/2')):
      return []
    found = psutil.process_iter(['pid', 'cmdline'])
    lines = {p.pid: ' '.join(p.info['cmdline'] or ()) for p in found}
    parts = real_sweep.EXPERIMENT, '--process_id=1'
    return [i for i, text in lines.items() if all(p in text for p in parts)]

  worker = _worker(study, parallel=1, command=command)
  with _killing(second_processes) as killed:
    worker.run()
  assert killed, worker.said
  trials = study.trials()
  assert [t.state for t in trials] == ['complete'] * 2, worker.said
  for trial, rate in zip(trials, (1e-3, 1e-2)):
    alone = real_sweep.run_alone(tmp_path, rate, 6)
    workdir = study.directory / 'trials' / trial.key
    assert tiny.losses(workdir) == pytest.approx(tiny.losses(alone), rel=1e-6)
