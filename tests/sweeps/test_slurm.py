"""Sweeps on SLURM, whose programs are stood in for by ones that run tasks."""

import math
import os
import pathlib
import re
import signal
import threading
import time

import pytest
import slurm_stand_in
import small_sweep

from t2x.sweeps import study as study_lib
from t2x.sweeps.launchers import launcher
from t2x.sweeps.launchers import slurm


@pytest.fixture
def queue(tmp_path, monkeypatch):
  directory = tmp_path / 'slurm'
  slurm_stand_in.install(directory)
  monkeypatch.setenv('SLURM_STAND_IN', str(directory))
  monkeypatch.setenv('PATH', f'{directory}:{os.environ["PATH"]}')
  return directory / 'queue'


def _launcher(**changes):
  config = slurm.SlurmConfig(devices_per_node=8, poll_seconds=0.05, **changes)
  return slurm.SlurmLauncher(config)


def _worker(study, **options):
  worker = small_sweep.worker(study, parallel=4, **options)
  worker._launcher = _launcher()
  return worker


def _losses():
  return [(math.log10(rate) + 2) ** 2 + 1 / 8 for rate in small_sweep.RATES]


@pytest.fixture
def study(tmp_path):
  return study_lib.create(tmp_path / 'study', small_sweep.facts(tmp_path))


def test_a_sweep_is_one_array(queue, study):
  _launcher().check()
  _worker(study).run()
  assert [t.value for t in study.trials()] == pytest.approx(_losses())
  assert set(small_sweep.starts(study).values()) == {1}
  (script,) = queue.glob('*.sh')
  assert '#SBATCH --array=0-3\n' in script.read_text()


def test_a_worker_that_ends_as_it_hands_in(queue, study, monkeypatch):
  """The next one finds the array, and hands in none."""
  monkeypatch.setenv('PAUSE', '0.2')
  first = _worker(study)
  submit = first._launcher.submit

  def submit_and_end(jobs):
    submit(jobs)
    raise SystemExit('killed')

  monkeypatch.setattr(first._launcher, 'submit', submit_and_end)
  with pytest.raises(SystemExit):
    first.run()
  assert not study.trials()[0].value
  second = _worker(study)
  second.run()
  assert [t.value for t in study.trials()] == pytest.approx(_losses())
  assert set(small_sweep.starts(study).values()) == {1}
  assert len([*queue.glob('*.sh')]) == 1


def test_what_a_process_gets_of_its_node():
  text = _launcher(nodes=2, gpus_per_node=4, cpus_per_task=9).render(
    [
      launcher.LaunchJob(
        name='a', command=['x'], workdir='w', log='l', group='g'
      )
    ]
  )
  assert 'export JAX_LOCAL_DEVICE_IDS=0,1,2,3\n' in text
  assert 'export SRUN_CPUS_PER_TASK=9\n' in text


def test_a_study_in_a_bucket_is_refused():
  job = launcher.LaunchJob(
    name='a', command=['x'], workdir='gs://b/s/trials/k', log='l', group='g'
  )
  with pytest.raises(ValueError, match='a directory that all nodes share'):
    _launcher().render([job])


def test_a_task_that_must_save_is_queued_again(queue, study, monkeypatch):
  monkeypatch.setenv('PAUSE', '0.1')
  told = []

  def time_is_over():
    deadline = time.monotonic() + 30
    while len(small_sweep.starts(study)) < 4 and time.monotonic() < deadline:
      time.sleep(0.02)
    for file in queue.glob('*.process'):
      os.kill(int(file.read_text()), signal.SIGTERM)
      told.append(file.stem)

  thread = threading.Thread(target=time_is_over)
  thread.start()
  _worker(study).run()
  thread.join()
  assert len(told) == 4
  assert [t.value for t in study.trials()] == pytest.approx(_losses())
  assert set(small_sweep.starts(study).values()) == {2}
  assert len([*queue.glob('*.sh')]) == 1  # SLURM did it by itself.


def test_a_failed_task_is_handed_in_again(queue, study, monkeypatch):
  monkeypatch.setenv('DIE', '3:1')
  worker = _worker(study)
  worker.run()
  assert [t.value for t in study.trials()] == pytest.approx(_losses())
  assert {t.outcome['failures'] for t in study.trials()} == {1}
  assert any('exit status 3: died as asked' in line for line in worker.said)


def test_a_sweep_that_is_stopped_leaves_its_tasks(queue, study, monkeypatch):
  monkeypatch.setenv('PAUSE', '0.1')
  worker = _worker(study)
  threading.Timer(0.5, worker.stop).start()
  worker.run()
  assert {t.state for t in study.trials()} == {'running'}
  _worker(study_lib.read(study.directory)).run()
  assert [t.value for t in study.trials()] == pytest.approx(_losses())
  assert set(small_sweep.starts(study).values()) == {1}


def test_what_is_pruned_is_cancelled(queue, study, monkeypatch):
  monkeypatch.setenv('PAUSE', '1')
  job = small_sweep.job(study)
  own = _launcher()
  (handle,) = own.submit([job])
  deadline = time.monotonic() + 20
  while not small_sweep.starts(study):
    assert time.monotonic() < deadline
    time.sleep(0.02)
  assert own.state(handle).phase == 'running'
  own.cancel(handle)
  while not own.state(handle).is_over:
    assert time.monotonic() < deadline + 20
    time.sleep(0.05)


def test_a_task_that_vanished(queue, study):
  own = _launcher()
  handle = {'task': '77_0', 'log': str(study.directory / 'logs' / 'x.log')}
  assert own.state(handle) == launcher.JobState(
    phase='lost', message='it left the queue'
  )


def test_without_slurm(tmp_path, monkeypatch):
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(ValueError, match="no program 'sbatch' on PATH. Give the"):
    _launcher().check()


def test_the_script_asks_for_what_submitit_asks(study):
  """Its lines, for the same wishes, as submitit 1.5.4 prints them."""
  config = slurm.SlurmConfig(
    nodes=2, gpus_per_node=8, time='03:00:00', save_seconds=120, partition='p'
  )
  job = small_sweep.job(study)
  script = slurm.SlurmLauncher(config).script([job] * 6, 3)
  lines = re.findall('#SBATCH (.*)', script)
  submitit = {
    '--array=0-5%3',
    '--nodes=2',
    '--ntasks-per-node=1',
    '--gpus-per-node=8',
    '--open-mode=append',
    '--partition=p',
  }
  assert submitit <= set(lines)
  # submitit signals its own Python process, by USR2; a run takes TERM.
  assert '--signal=TERM@120' in lines and '--requeue' in lines
  assert job.text in script.replace("'\"'\"'", "'")
  assert pathlib.Path(job.log).with_suffix('.status').name in script
