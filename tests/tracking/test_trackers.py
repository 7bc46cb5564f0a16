import json
import logging
import os
import pathlib
import subprocess
import sys
import threading

import extras
import pytest

from t2x.config import experiment
from t2x.config import overrides
from t2x.tracking import metrics
from t2x.tracking import trackers

_ROOT = pathlib.Path(__file__).parents[2]
_CONFIG = {'optim.learning_rate': 0.5, 'train.ema_decay': None, 'n/a': ' '}


class _Fake:
  """Keeps what it is given, and fails where it is told to."""

  def __init__(self, fail=(), last_step=0):
    self.calls = []
    self.fail = fail
    self.last_step = last_step
    self.wait = None

  def start(self, run):
    self.run = run
    self._do('start')
    return trackers.Started(
      identifier=run.identifier or 'new', last_step=self.last_step
    )

  def write(self, step, values):
    self._do(f'write {step}')
    self.calls[-1] += f' {values}'

  def flush(self):
    self._do('flush')

  def close(self):
    self._do('close')

  def _do(self, call):
    if self.wait is not None:
      self.wait.wait(30)
    self.calls.append(call)
    if any(call.startswith(f) for f in self.fail):
      raise RuntimeError('the service is down')


def _background(fake, workdir, *, start_step=0, **options):
  run = trackers.RunInfo(
    project='t2x', name='a', config=_CONFIG, folder=workdir, num_steps=9
  )
  kept = trackers._Kept(trackers.files.path(workdir) / 'fake.json', 't2x')
  return trackers.Background('fake', fake, run, kept, start_step, **options)


def _write(workdir, part, steps, start_step=0):
  with metrics.MetricsWriter(
    workdir, start_step=start_step, num_steps=9, show=False, trackers=[part]
  ) as writer:
    for step in steps:
      row = {'step': step, 'loss': 1 / step, 'mfu': None, 'x': float('nan')}
      writer.write(row)
    assert writer.flush()


def test_rows_in_order_and_the_end(tmp_path):
  fake = _Fake()
  _write(tmp_path, _background(fake, tmp_path), [1, 2])
  assert fake.calls == [
    'start',
    "write 1 {'train/loss': 1.0}",
    "write 2 {'train/loss': 0.5}",
    'flush',
    'flush',
    'close',
  ]
  kept = json.loads((tmp_path / 'fake.json').read_text())
  assert kept == {'id': 'new', 'project': 't2x', 'step': 2}


def test_a_run_goes_on_and_repeats_no_step(tmp_path):
  _write(tmp_path, _background(_Fake(), tmp_path), [1, 2, 3])
  fake = _Fake()
  part = _background(fake, tmp_path, start_step=1)
  _write(tmp_path, part, [2, 3, 4], start_step=1)
  assert fake.run.identifier == 'new'
  writes = [c.split()[1] for c in fake.calls if c.startswith('write')]
  assert writes == ['4']
  # What the tracker itself knows counts too.
  fake = _Fake(last_step=6)
  part = _background(fake, tmp_path, start_step=4)
  _write(tmp_path, part, [5, 6, 7], start_step=4)
  writes = [c.split()[1] for c in fake.calls if c.startswith('write')]
  assert writes == ['7']
  fake = _Fake()
  _write(tmp_path, _background(fake, tmp_path), [1])
  assert fake.run.identifier is None  # Begun anew, it is another run.


def test_another_project_is_another_run(tmp_path):
  _write(tmp_path, _background(_Fake(), tmp_path), [1])
  text = (tmp_path / 'fake.json').read_text()
  for other in (text.replace('t2x', 'other'), '', '[]', '{"id": 1}'):
    (tmp_path / 'fake.json').write_text(other)
    fake = _Fake()
    _write(tmp_path, _background(fake, tmp_path, start_step=1), [2], 1)
    assert fake.run.identifier is None


@pytest.mark.parametrize(
  'fail, missing', [(['start'], 3), (['write'], 3), (['write 2'], 1)]
)
def test_a_failing_tracker_stops_nothing(tmp_path, caplog, fail, missing):
  fake = _Fake(fail)
  _write(tmp_path, _background(fake, tmp_path), [1, 2, 3])
  assert [r['step'] for r in metrics.read_rows(tmp_path)] == [1, 2, 3]
  errors = [r for r in caplog.records if r.levelno == logging.ERROR]
  assert len(errors) == 1
  assert 'fake failed (RuntimeError: the service is down)' in caplog.text
  assert f'fake lacks {missing} rows of this run' in caplog.text
  assert ('close' in fake.calls) == (fail != ['start'])


@pytest.mark.parametrize('fail', ['flush', 'close'])
def test_a_tracker_that_fails_at_the_end(tmp_path, caplog, fail):
  fake = _Fake([fail])
  _write(tmp_path, _background(fake, tmp_path), [1])
  assert caplog.text.count('the service is down') == 1
  assert fake.calls[-1] == 'close'


def test_a_tracker_that_hangs_holds_nothing_up(tmp_path, caplog):
  fake = _Fake()
  fake.wait = threading.Event()
  part = _background(fake, tmp_path, close_seconds=0.1)
  _write(tmp_path, part, [1, 2])
  assert 'fake has not taken all rows after 0 s' in caplog.text
  assert len(metrics.read_rows(tmp_path)) == 2
  fake.wait.set()


def test_more_rows_than_memory_holds(tmp_path, caplog, monkeypatch):
  monkeypatch.setattr(trackers, '_MOST_WAITING', 2)
  fake = _Fake()
  fake.wait = threading.Event()
  part = _background(fake, tmp_path)
  for step in range(1, 6):
    part.write({'step': step, 'loss': 1.0})
  fake.wait.set()
  part.close()
  assert 'fake lacks 3 rows' in caplog.text
  assert [c.split()[0] for c in fake.calls].count('write') == 2


def test_no_row_and_no_import(tmp_path):
  fake = _Fake()
  part = _background(fake, tmp_path)
  part.flush()
  part.close()
  assert fake.calls == []


def test_remote_workdirs_keep_the_id(tmp_path, caplog, monkeypatch):
  caplog.set_level(logging.INFO)
  monkeypatch.setattr(trackers.files, 'is_remote', lambda _: True)
  monkeypatch.setenv('TMPDIR', str(tmp_path))
  monkeypatch.setattr(trackers.tempfile, 'tempdir', None)
  fake = _Fake()
  part = _background(fake, tmp_path)
  part.write({'step': 1, 'loss': 1.0})
  part.close()
  assert fake.run.folder.parent == tmp_path
  assert fake.run.folder.name.startswith('t2x-fake-')
  assert caplog.text.count('cannot lie in an object store') == 1
  assert json.loads((tmp_path / 'fake.json').read_text())['step'] == 1


def test_names_are_checked_in_the_config():
  config = overrides.override(
    experiment.Experiment(), {'train.trackers': 'wandb,mlflow'}
  )
  assert config.train.trackers == ('wandb', 'mlflow')
  with pytest.raises(ValueError, match="no tracker 'wandbd'.* mean 'wandb'"):
    experiment.TrainConfig(trackers=('wandbd',))
  with pytest.raises(ValueError, match="no tracker 'MLFlow'.* mean 'mlflow'"):
    experiment.TrainConfig(trackers=('MLFlow',))
  with pytest.raises(ValueError, match='TensorBoard are always written'):
    experiment.TrainConfig(trackers=('tensorboard',))
  with pytest.raises(ValueError, match='stands there twice'):
    experiment.TrainConfig(trackers=('mlflow', 'mlflow'))
  with pytest.raises(ValueError, match="tracker_project=' '"):
    experiment.TrainConfig(tracker_project=' ')


def test_a_missing_library(tmp_path, monkeypatch):
  # A folder of its name is no library.
  (tmp_path / 'wandb').mkdir()
  monkeypatch.setattr(sys, 'path', [str(tmp_path)])
  monkeypatch.delitem(sys.modules, 'wandb', raising=False)
  monkeypatch.setattr(sys, 'path_importer_cache', {})
  with pytest.raises(ValueError, match='bash scripts/setup.sh wandb$'):
    trackers.check_installed(['wandb'])
  trackers.check_installed([])


# Each library in a process of its own, as in a run; twice, of which the second
# goes on from step 2.
_RUN = """
import logging, sys
from t2x.tracking import metrics, trackers
logging.basicConfig(level=logging.WARNING)
name, workdir, start = sys.argv[1], sys.argv[2], int(sys.argv[3])
trackers.check_installed([name])
config = {'optim.learning_rate': 0.5, 'train.ema_decay': None, 'n.a': ' '}
config['train.keep_last'] = start
parts = trackers.open_all(
  [name], workdir, project='tests', config=config, start_step=start,
  num_steps=6,
)
with metrics.MetricsWriter(
  workdir, start_step=start, num_steps=6, show=False, trackers=parts
) as writer:
  for step in range(start + 1, start + 5):
    row = {'step': step, 'loss': 1 / step, 'mfu': None}
    if step % 2 == 0:
      row['eval/held_out/loss'] = 2 / step
    writer.write(row)
  writer.flush()
assert parts[0]._missing == 0
"""


def _run_twice(name, workdir):
  """Runs steps 1 to 4, then from step 2 on to 6."""
  ours = ('WANDB_', 'MLFLOW_', 'TRACKIO_')
  kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
  for start in (0, 2):
    done = subprocess.run(
      [sys.executable, '-c', _RUN, name, str(workdir), str(start)],
      env=kept | {'PYTHONPATH': str(_ROOT)},
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stderr
    assert 'failed' not in done.stderr and 'lacks' not in done.stderr
  return json.loads((workdir / 'trackers' / f'{name}.json').read_text())


_LOSSES = [(step, pytest.approx(1 / step)) for step in range(1, 7)]


@pytest.mark.slow
def test_wandb_offline(tmp_path):
  extras.need('wandb', extra='wandb')
  workdir = tmp_path / 'run'
  kept = _run_twice('wandb', workdir)
  folders = sorted((workdir / 'wandb').glob('offline-run-*'))
  assert len(folders) == 2
  steps, configs = [], []
  for folder in folders:
    (file,) = folder.glob('*.wandb')
    assert file.name == f'run-{kept["id"]}.wandb'
    for record in _wandb_records(file):
      if record.HasField('run'):
        assert (record.run.run_id, record.run.project) == (kept['id'], 'tests')
        assert record.run.display_name == 'run'
        configs += [
          (i.key, json.loads(i.value_json)) for i in record.run.config.update
        ]
      if record.HasField('history'):
        row = {
          i.key or '/'.join(i.nested_key): json.loads(i.value_json)
          for i in record.history.item
        }
        steps.append((record.history.step.num or row['_step'], row))
  assert [(s, row['train/loss']) for s, row in steps] == _LOSSES
  assert [row.get('eval/held_out/loss') for _, row in steps][3] == 0.5
  assert ('optim.learning_rate', 0.5) in configs


def _wandb_records(file):
  """Yields the records of an offline run, by W&B's own form of files."""
  from wandb.proto import wandb_internal_pb2

  for data in _wandb_chunks(file.read_bytes()):
    record = wandb_internal_pb2.Record()
    record.ParseFromString(data)
    yield record


def _wandb_chunks(data):
  """Yields the data of a LevelDB log: blocks of 32 KiB, headers of 7 bytes."""
  assert data[:4] == b':W&B'
  place, whole = 7, b''
  while place + 7 <= len(data):
    if 32768 - place % 32768 < 7:
      place += 32768 - place % 32768
      continue
    size = int.from_bytes(data[place + 4 : place + 6], 'little')
    kind = data[place + 6]  # 1 whole, 2 first, 3 middle, 4 last.
    whole += data[place + 7 : place + 7 + size]
    place += 7 + size
    if kind in (1, 4):
      yield whole
      whole = b''


@pytest.mark.slow
def test_mlflow_in_the_workdir(tmp_path):
  extras.need('mlflow', extra='mlflow')
  workdir = tmp_path / 'run'
  kept = _run_twice('mlflow', workdir)
  read = """
import json, sys
import mlflow
client = mlflow.MlflowClient(f'sqlite:///{sys.argv[1]}/mlruns/mlflow.db')
experiment = client.get_experiment_by_name('tests')
(run,) = client.search_runs([experiment.experiment_id])
metrics = {
  name: [
    (m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)
  ]
  for name in run.data.metrics
}
print(json.dumps([
  run.info.run_id, run.info.run_name, run.info.status, run.data.params,
  run.data.tags, metrics,
]))
"""
  identifier, name, status, params, tags, values = _output(read, workdir)
  assert (identifier, name, status) == (kept['id'], 'run', 'FINISHED')
  assert params['optim.learning_rate'] == '0.5'
  assert params['train.keep_last'] == '0'
  assert tags['changed.train.keep_last'] == '2'
  assert [tuple(pair) for pair in values['train/loss']] == _LOSSES
  assert values['eval/held_out/loss'][0] == [2, 1.0]


@pytest.mark.slow
def test_trackio_in_the_workdir(tmp_path):
  extras.need('trackio', extra='trackio')
  workdir = tmp_path / 'run'
  kept = _run_twice('trackio', workdir)
  read = """
import json, os, sys
os.environ['TRACKIO_DIR'] = f'{sys.argv[1]}/trackio'
import trackio
from trackio import sqlite_storage
(run,) = trackio.Api().runs('tests')
rows = sqlite_storage.SQLiteStorage.get_logs('tests', run.name, run_id=run.id)
print(json.dumps([run.name, run.config, rows]))
"""
  name, config, rows = _output(read, workdir)
  assert name == kept['id'] and name.startswith('run-')
  assert config['optim.learning_rate'] == 0.5
  assert [(r['step'], r['train/loss']) for r in rows] == _LOSSES
  assert rows[1]['eval/held_out/loss'] == 1.0
  assert (workdir / 'trackio' / 'tests.db').exists()


def _output(program, workdir):
  """Returns the JSON that a program prints last."""
  done = subprocess.run(
    [sys.executable, '-c', program, str(workdir)],
    env=os.environ | {'MLFLOW_DISABLE_TELEMETRY': 'true'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return json.loads(done.stdout.splitlines()[-1])
