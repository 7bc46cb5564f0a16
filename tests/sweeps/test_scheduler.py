"""Whole sweeps, whose runs are processes that compute nothing."""

import dataclasses
import errno
import math
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import small_sweep

from t2x.sweeps import checks
from t2x.sweeps import journal
from t2x.sweeps import ownership
from t2x.sweeps import scheduler
from t2x.sweeps import search
from t2x.sweeps import space
from t2x.sweeps import study as study_lib
from t2x.sweeps import text
from t2x.sweeps.launchers import launcher as launcher_lib


@pytest.fixture
def make(tmp_path):
  def create(**changes):
    facts = small_sweep.facts(tmp_path, **changes)
    return study_lib.create(tmp_path / 'study', facts)

  return create


def _losses():
  return [(math.log10(rate) + 2) ** 2 + 1 / 8 for rate in small_sweep.RATES]


def test_a_sweep_runs_each_point_once(make):
  study = make()
  worker = small_sweep.worker(study)
  worker.run()
  trials = study.trials()
  assert [t.number for t in trials] == [0, 1, 2, 3]
  assert [t.state for t in trials] == ['complete'] * 4
  assert [t.value for t in trials] == pytest.approx(_losses())
  assert [*trials[0].values] == list(range(1, 9))
  assert trials[0].outcome == {'seconds': 4.0, 'failures': 0, 'steps': 8}
  assert set(small_sweep.starts(study).values()) == {1}
  best = study.best()
  assert best is not None and best.point == {'optim.learning_rate': 1e-2}
  table = text.table(study)
  assert table.splitlines()[1].split()[1] == '0.01'
  assert '4 of 4 trials: 4 complete' in table
  # Once more: nothing is left to do.
  small_sweep.worker(study_lib.read(study.directory)).run()
  assert set(small_sweep.starts(study).values()) == {1}
  assert len(study.trials()) == 4


def test_the_next_trial_starts_when_one_ends(make, monkeypatch):
  pauses = []
  sleep = time.sleep
  monkeypatch.setattr(
    scheduler.time, 'sleep', lambda s: (pauses.append(s), sleep(s))
  )
  study = make()
  worker = small_sweep.worker(study)
  worker.run()
  assert len(study.trials()) == 4
  assert pauses and max(pauses) < 0.5


def test_seeds_are_averaged(make):
  study = make(seeds=(0, 10))
  small_sweep.worker(study).run()
  values = [t.value for t in study.trials()]
  assert values == pytest.approx([loss + 0.005 for loss in _losses()])
  assert len(small_sweep.starts(study)) == 8


def test_the_best_row_and_the_other_direction(make):
  study = make(result='best', direction='maximize')
  small_sweep.worker(study).run()
  first = study.trials()[0]
  assert first.value == pytest.approx(5.0)
  best = study.best()
  assert best is not None and best.number == 0


def test_a_run_that_dies_is_tried_again(make, monkeypatch):
  monkeypatch.setenv('DIE', '3:1')
  study = make()
  worker = small_sweep.worker(study)
  worker.run()
  assert [t.value for t in study.trials()] == pytest.approx(_losses())
  assert {t.outcome['failures'] for t in study.trials()} == {1}
  assert set(small_sweep.starts(study).values()) == {2}
  assert any('exit status 3: died as asked' in line for line in worker.said)


def test_a_run_that_dies_at_the_same_place_is_given_up(make, monkeypatch):
  monkeypatch.setenv('NO_ROWS', '1')
  study = make()
  small_sweep.worker(study).run()
  assert {t.state for t in study.trials()} == {'failed'}
  assert set(small_sweep.starts(study).values()) == {2}
  assert 'ended before its last step' in study.trials()[0].outcome['error']
  assert 'trial 0 failed after step 0' in text.table(study)
  assert study.best() is None


def test_a_run_that_diverges_is_a_result(make, monkeypatch):
  monkeypatch.setenv('NAN_ABOVE', '0.05')
  study = make()
  small_sweep.worker(study).run()
  last = study.trials()[3]
  assert (last.state, last.value) == ('complete', math.inf)
  assert small_sweep.starts(study)[last.key] == 1
  assert 'diverged' in text.table(study)


def test_a_metric_that_no_row_has(make, monkeypatch):
  monkeypatch.setenv('SILENT', '1')
  study = make()
  with pytest.raises(ValueError, match='no row of run .* has it'):
    small_sweep.worker(study).run()


@pytest.mark.parametrize(
  'pruning',
  [search.Asha(min_steps=2, reduction=2), search.Median(num_complete=2)],
)
def test_bad_trials_end_early(make, monkeypatch, pruning):
  monkeypatch.setenv('PAUSE', '0.05')
  sweep = small_sweep.drawn(pruning=pruning)
  study = make(
    parameters=sweep.parameters, search=sweep.search, pruning=pruning
  )
  small_sweep.worker(study).run()
  trials = study.trials()
  states = [t.state for t in trials]
  assert len(trials) == 12 and states.count('pruned') >= 3
  assert states.count('complete') >= 2
  best = study.best()
  assert best is not None
  assert best.value == min(t.value for t in trials if t.state == 'complete')
  for trial in trials:
    last = max(trial.values)
    assert last == 8 if trial.state == 'complete' else last < 8
    if trial.state == 'pruned':  # It was stopped, and not only marked.
      rows = (study.workdir(trial.key) / 'metrics.jsonl').read_text()
      assert len(rows.splitlines()) < 8


def test_suggestions_come_near_the_best(make):
  study = make(
    parameters={'optim.learning_rate': space.LogUniform(1e-6, 1e2)},
    search=search.Tpe(num_trials=24, num_random=8, seed=1),
  )
  small_sweep.worker(study).run()
  trials = study.trials()
  assert len(trials) == 24
  assert len({t.key for t in trials}) == 24
  far = [abs(math.log10(t.point['optim.learning_rate']) + 2) for t in trials]
  assert sum(far[12:]) < 0.7 * sum(far[:12])


def test_a_population_copies_its_best(make):
  way = search.PopulationBased(population=4, generations=4, seed=2)
  study = make(
    parameters={'optim.learning_rate': space.LogUniform(1e-6, 1e2)}, search=way
  )
  small_sweep.worker(study).run()
  trials = {trial.slot: trial for trial in study.trials()}
  assert len(trials) == 16
  assert {t.state for t in trials.values()} == {'complete'}
  copied = 0
  for slot, trial in trials.items():
    generation = int(slot[1:4])
    assert max(trial.values) == 2 * (generation + 1)
    rows = (study.workdir(trial.key) / 'metrics.jsonl').read_text()
    assert len(rows.splitlines()) == 2 * (generation + 1)  # Its parent's too.
    if generation:
      (parent,) = trial.origin.parents
      before = {
        t.key: t for s, t in trials.items() if f'g{generation - 1:03}' in s
      }
      own = trials[f'g{generation - 1:03}{slot[4:]}']
      if parent != own.key:
        copied += 1
        assert before[parent].value == min(t.value for t in before.values())
        ratio = (
          trial.point['optim.learning_rate']
          / before[parent].point['optim.learning_rate']
        )
        assert ratio == pytest.approx(0.8) or ratio == pytest.approx(1.25)
  assert copied == 3
  # A second time there is nothing to do, and the draws are the same.
  small_sweep.worker(study_lib.read(study.directory)).run()
  assert len(study.trials()) == 16


def test_members_that_are_alike_have_runs_of_their_own(make):
  """Listed values repeat in a population, and losers may draw alike."""
  way = search.PopulationBased(population=6, generations=3, share=0.5)
  study = make(search=way)
  small_sweep.worker(study, parallel=3).run()
  trials = study.trials()
  assert len({t.key for t in trials}) == len(trials) == 18
  starts = small_sweep.starts(study)  # With those of the state's owners.
  assert {starts[t.key] - int(t.slot[1:4]) for t in trials} == {1}
  # A trial's own seconds, without those of the rows that came along.
  steps = {'g000': 2, 'g001': 3, 'g002': 3}
  for trial in trials:
    assert trial.outcome['seconds'] == 0.5 * steps[trial.slot[:4]]


def test_a_copy_that_was_cut_off_is_made_again(make, monkeypatch):
  way = search.PopulationBased(population=2, generations=2)
  study = make(
    parameters={'optim.learning_rate': space.LogUniform(1e-6, 1e2)}, search=way
  )
  copied = []

  def copy_a_part(source, to, without):
    copied.append(to)
    if len(copied) == 1:
      to.mkdir()
      (to / 'metrics.jsonl').write_text('')
      raise OSError('the disk is full')
    return copy(source, to, without)

  copy = scheduler.files.copy_directory
  monkeypatch.setattr(scheduler.files, 'copy_directory', copy_a_part)
  with pytest.raises(OSError, match='the disk is full'):
    small_sweep.worker(study).run()
  small_sweep.worker(study_lib.read(study.directory)).run()
  assert len(study.trials()) == 4
  for trial in study.trials():
    rows = (study.workdir(trial.key) / 'metrics.jsonl').read_text()
    assert len(rows.splitlines()) == (8 if trial.slot > 'g001' else 4)


def test_a_population_without_a_finite_result(make, monkeypatch):
  monkeypatch.setenv('NAN_ABOVE', '0')
  way = search.PopulationBased(population=2, generations=2)
  worker = small_sweep.worker(make(search=way))
  with pytest.raises(ValueError, match='there is none to go on from'):
    worker.run()


def test_points_that_a_config_refuses_are_left_out(make):
  parameters = {'model.attention.num_kv_heads': (2, 3, 4)}
  study = make(parameters=parameters)
  with pytest.raises(ValueError, match='num_kv_heads=3'):
    small_sweep.worker(study).run()
  worker = small_sweep.worker(study, skip_impossible=True)
  worker.run()
  assert len(study.trials()) == 2
  assert sum('left out' in line for line in worker.said) == 1


class _Refusing:
  """A launcher that refuses so many times, and then is the one it wraps."""

  def __init__(self, launcher, times):
    self._launcher, self.times = launcher, times

  def __getattr__(self, name):
    return getattr(self._launcher, name)

  def submit(self, jobs):
    if self.times:
      self.times -= 1
      raise launcher_lib.LaunchError('no quota')
    return self._launcher.submit(jobs)


def test_a_launcher_that_refuses_is_asked_again(make):
  study = make()
  worker = small_sweep.worker(study, retry_seconds=0.01)
  worker._launcher = _Refusing(worker._launcher, 5)
  worker.run()
  assert [t.value for t in study.trials()] == pytest.approx(_losses())
  assert {t.outcome['failures'] for t in study.trials()} == {0}
  assert 'not started: no quota; tried again in' in worker.said[0]


def test_a_launcher_that_refuses_for_good(make):
  """Nothing is recorded as failed: the same command goes on later."""
  study = make()
  worker = small_sweep.worker(study, retry_seconds=0.001)
  worker._launcher = _Refusing(worker._launcher, 10**6)
  with pytest.raises(launcher_lib.LaunchError, match='no quota\nThat was'):
    worker.run()
  small_sweep.worker(study).run()
  assert [t.value for t in study.trials()] == pytest.approx(_losses())


def test_what_is_pruned_stays_so(make, monkeypatch):
  """Also where the worker is killed before the trial has ended."""
  study = make(pruning=search.Median(num_complete=1))
  begun = small_sweep.worker(study, parallel=1)
  begun._fill()  # One trial, begun and left.
  (trial,) = study.trials()
  study.mark_pruned(trial, 3)
  small_sweep.worker(study).run()
  first, *others = study.trials()
  assert (first.state, first.pruned_at) == ('pruned', 3)
  assert {t.state for t in others} <= {'complete', 'pruned'}
  for child in begun._launcher._children.values():
    child.wait()


def test_a_worker_that_was_held_up_lets_go(make, monkeypatch):
  """Its trial was taken over: it ends its run and writes nothing more."""
  monkeypatch.setenv('PAUSE', '0.05')
  study = make(parameters={'optim.learning_rate': (1e-2,)})
  slow = small_sweep.worker(study)
  with slow._workers.at_work():
    slow._fill()
    (trial,) = study.trials()
    claim = study.directory / 'claims' / f'{trial.slot}.001.json'
    claim.write_text('{"worker": "another"}')
    slow._poll()
  assert not slow._active
  assert 'another worker has taken it over' in slow.said[-1]
  assert study.trials()[0].state == 'running'


def test_what_changes_results_may_not_change(make, tmp_path):
  study = make()
  train = dataclasses.replace(study.facts.config.train, eval_batches=3)
  config = dataclasses.replace(study.facts.config, train=train)
  facts = dataclasses.replace(study.facts, config=config)
  with pytest.raises(ValueError, match='train.eval_batches: .* -> 3'):
    study_lib.create(study.directory, facts)


def test_a_hypercube_is_not_made_larger(make):
  ranges = {'optim.learning_rate': space.LogUniform(1e-4, 1.0)}
  cube = lambda num: search.LatinHypercube(num_trials=num)
  make(parameters=ranges, search=cube(4))
  with pytest.raises(ValueError, match='sweep.search.num_trials: 4 -> 5'):
    make(parameters=ranges, search=cube(5))


def test_a_metric_may_change_before_there_are_results(make):
  make(metric='eval/train/los')
  study = make()
  small_sweep.worker(study).run()
  assert study.best().value is not None
  with pytest.raises(ValueError, match='sweep.metric'):
    make(metric='eval/train/accuracy')


def test_a_population_varies_no_sizes(make):
  way = search.PopulationBased(population=4, generations=4)
  facts = make(search=way, parameters={'model.num_layers': (1, 2)}).facts
  with pytest.raises(ValueError, match='and no sizes'):
    checks.check_population(facts.sweep, facts.config)


def test_a_space_that_is_used_up(make):
  study = make(search=search.Tpe(num_trials=9))
  worker = small_sweep.worker(study)
  worker.run()
  assert sorted(t.point['optim.learning_rate'] for t in study.trials()) == [
    *small_sweep.RATES
  ]
  assert any('the search ends' in line for line in worker.said)


def test_a_sweep_that_is_stopped_goes_on(make, monkeypatch):
  monkeypatch.setenv('PAUSE', '0.1')
  study = make()
  worker = small_sweep.worker(study)
  threading.Timer(0.6, worker.stop).start()
  worker.run()
  states = [t.state for t in study.trials()]
  assert 'running' in states and len(states) < 4
  again = small_sweep.worker(study_lib.read(study.directory))
  again.run()
  assert any('goes on' in line for line in again.said)
  assert [t.value for t in study.trials()] == pytest.approx(_losses())
  # Each step was taken once: runs went on from where they were.
  for trial in study.trials():
    rows = (study.workdir(trial.key) / 'metrics.jsonl').read_text()
    assert len(rows.splitlines()) == 8


_WORKER = """
import pathlib, sys
sys.path[:0] = sys.argv[2:]
import small_sweep
from t2x.sweeps import study
small_sweep.worker(study.read(sys.argv[1])).run()
"""


def _start(study):
  tests = pathlib.Path(__file__).parents[1]
  return subprocess.Popen(
    [sys.executable, '-c', _WORKER, str(study.directory), str(tests)]
    + [str(tests / 'sweeps')],
    stdout=subprocess.DEVNULL,
  )


def _wait_for_starts(study, num):
  deadline = time.monotonic() + 60
  while sum(small_sweep.starts(study).values()) < num:
    assert time.monotonic() < deadline
    time.sleep(0.02)


def _gone(process: int) -> bool:
  return ownership.start_of(process) is None


@pytest.mark.slow
def test_a_killed_sweep_and_a_killed_run(make, monkeypatch):
  monkeypatch.setenv('PAUSE', '0.2')
  study = make()
  first = _start(study)
  _wait_for_starts(study, 2)
  runs = [
    int(line)
    for file in pathlib.Path(study.directory).glob('trials/*/starts')
    for line in file.read_text().splitlines()
  ]
  first.kill()
  first.wait()
  # Its runs were told, and save.
  deadline = time.monotonic() + 20
  while not all(map(_gone, runs)):
    assert time.monotonic() < deadline
    time.sleep(0.05)
  second = _start(study)
  _wait_for_starts(study, 4)
  newest = [
    int(file.read_text().splitlines()[-1])
    for file in pathlib.Path(study.directory).glob('trials/*/starts')
  ]
  os.kill(newest[-1], signal.SIGKILL)
  assert second.wait(timeout=60) == 0
  assert [t.value for t in study.trials()] == pytest.approx(_losses())
  assert [t.state for t in study.trials()] == ['complete'] * 4


@pytest.mark.slow
def test_two_workers_share_the_trials(make, monkeypatch):
  monkeypatch.setenv('PAUSE', '0.05')
  sweep = small_sweep.drawn()
  study = make(parameters=sweep.parameters, search=sweep.search)
  children = [_start(study), _start(study)]
  assert [child.wait(timeout=120) for child in children] == [0, 0]
  trials = study.trials()
  assert len(trials) == len({t.key for t in trials}) == 12
  assert {t.state for t in trials} == {'complete'}
  assert set(small_sweep.starts(study).values()) == {1}
  assert len({t.worker for t in trials}) == 2


def test_a_worker_that_ends_as_it_is_looked_at(make, monkeypatch):
  """Its last trial is over by then, and is not run once more."""
  study = make()
  first = small_sweep.worker(study)
  second = small_sweep.worker(study_lib.read(study.directory))
  trials = second._study.trials

  def late():
    found = trials()
    if not found:
      first.run()  # Between two of the second worker's looks.
    return found

  monkeypatch.setattr(second._study, 'trials', late)
  second.run()
  assert len(study.trials()) == 4
  assert set(small_sweep.starts(study).values()) == {1}


def test_another_study_is_refused(make, tmp_path):
  study = make()
  with pytest.raises(ValueError, match='holds a study of something else:\n .*'):
    make(direction='maximize')
  with pytest.raises(ValueError, match='sweep.parameters.optim.learning_rate'):
    make(parameters={'optim.learning_rate': (1.0,)})
  other = small_sweep.facts(tmp_path)
  config = other.config
  train = dataclasses.replace(config.train, num_steps=9)
  config = dataclasses.replace(config, train=train)
  with pytest.raises(ValueError, match='config.train.num_steps: 8 -> 9'):
    study_lib.create(study.directory, dataclasses.replace(other, config=config))
  make(max_retries=5)  # Another rule for what is to come.
  with pytest.raises(ValueError, match='holds no study'):
    study_lib.read(tmp_path)


def test_results_in_a_database(tmp_path):
  facts = small_sweep.facts(tmp_path)
  url = f'sqlite:///{tmp_path}/results.db'
  studies = [
    study_lib.create(
      tmp_path / name, dataclasses.replace(facts, storage=url, name=name)
    )
    for name in ('one', 'other')
  ]
  for study in studies:
    small_sweep.worker(study).run()
  for study in studies:
    trials = study_lib.read(study.directory).trials()
    assert [t.value for t in trials] == pytest.approx(_losses())
  assert not (tmp_path / 'one' / 'journal.log').exists()


@pytest.mark.parametrize('what', ['append_logs', 'write_whole'])
def test_a_disk_that_is_full(make, monkeypatch, what):
  """The sweep ends as the journal or a job cannot be written, and goes on."""
  monkeypatch.setenv('PAUSE', '0.02')
  study = make()
  owner = {'append_logs': journal.File, 'write_whole': scheduler.files}[what]
  real, calls = getattr(owner, what), []

  def fails_in_the_middle(*args):
    calls.append(1)
    if len(calls) in (9, 10):
      raise OSError(errno.ENOSPC, 'No space left on device')
    return real(*args)

  with monkeypatch.context() as patch:
    patch.setattr(owner, what, fails_in_the_middle)
    worker = small_sweep.worker(study)
    with pytest.raises(OSError, match='No space left'):
      for _ in range(9):  # A sign of life may fail, which is no matter.
        worker.run()
  again = small_sweep.worker(study_lib.read(study.directory))
  again.run()
  assert [t.value for t in study.trials()] == pytest.approx(_losses())
  assert [t.state for t in study.trials()] == ['complete'] * 4
