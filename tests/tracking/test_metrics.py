import json
import math
import os
import subprocess
import sys

from etils import epath
import fsspec
from fsspec.implementations import memory
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from t2x.tracking import metrics


def _open(workdir, start_step=0, num_steps=9, **options):
  options = {'show': False, **options}
  return metrics.MetricsWriter(
    workdir, start_step=start_step, num_steps=num_steps, **options
  )


def _write(workdir, steps, start_step=0, scale=1.0):
  with _open(workdir, start_step) as writer:
    for step in steps:
      writer.write({'step': step, 'loss': scale / step})


def _scalars(workdir, tag):
  events = event_accumulator.EventAccumulator(
    os.fspath(workdir / 'tensorboard')
  )
  events.Reload()
  return [(e.step, e.value) for e in events.Scalars(tag)]


def _steps(workdir):
  return [row['step'] for row in metrics.read_rows(workdir)]


def test_a_row_is_one_json_object_on_one_line(tmp_path):
  row = {
    'step': 1,
    'loss': np.float32(0.5),
    'tokens': np.int64(7),
    'mfu': None,
    'eval/a/loss': 2.5,
  }
  with _open(tmp_path) as writer:
    writer.write(row)
    # Seen before any flush, so that a killed process loses no row.
    text = (tmp_path / 'metrics.jsonl').read_text()
  assert text.count('\n') == 1
  expected = {
    'step': 1,
    'loss': 0.5,
    'tokens': 7,
    'mfu': None,
    'eval/a/loss': 2.5,
  }
  assert json.loads(text) == expected
  assert metrics.read_rows(tmp_path) == [expected]


@pytest.mark.parametrize('value', [math.nan, math.inf, np.float32('-inf')])
def test_what_json_cannot_hold_is_null_and_named(tmp_path, value):
  with _open(tmp_path) as writer:
    writer.write({'step': 1, 'loss': value, 'mfu': None})
  # A strict reader: NaN and Infinity are not JSON.
  row = json.loads(
    (tmp_path / 'metrics.jsonl').read_text(), parse_constant=pytest.fail
  )
  assert row == {'step': 1, 'loss': None, 'mfu': None, 'non_finite': ['loss']}


def test_resuming_drops_later_rows_so_each_step_has_one(tmp_path):
  _write(tmp_path, range(1, 7))
  _write(tmp_path, range(5, 9), start_step=4, scale=2.0)
  rows = metrics.read_rows(tmp_path)
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
  assert rows[3]['loss'] == 1 / 4
  assert rows[4]['loss'] == 2 / 5
  assert os.listdir(tmp_path).count('metrics.jsonl.tmp') == 0


def test_starting_anew_drops_every_row(tmp_path):
  with _open(tmp_path) as writer:
    writer.write({'step': 0, 'eval/a/loss': 9.0})
  _write(tmp_path, [1])
  assert _steps(tmp_path) == [1]


@pytest.mark.parametrize('end', [b'', b'\xff\n', b'[' * 99_999])
def test_a_torn_last_line_is_left_out_and_then_dropped(tmp_path, end):
  _write(tmp_path, [1, 2, 3])
  path = tmp_path / 'metrics.jsonl'
  path.write_bytes(path.read_bytes()[:-9] + end)
  assert _steps(tmp_path) == [1, 2]
  _write(tmp_path, [3], start_step=2)
  assert _steps(tmp_path) == [1, 2, 3]
  assert len(path.read_text().splitlines()) == 3


def test_a_crash_while_dropping_rows_keeps_the_old_file(tmp_path, monkeypatch):
  _write(tmp_path, [1, 2, 3])

  def crash(*args):
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'replace', crash)
  with pytest.raises(KeyboardInterrupt):
    _open(tmp_path, start_step=1)
  assert _steps(tmp_path) == [1, 2, 3]


def test_a_second_row_for_a_step_is_refused(tmp_path):
  with _open(tmp_path, start_step=4) as writer:
    writer.write({'step': 5})
    with pytest.raises(AssertionError):
      writer.write({'step': 5})
  with _open(tmp_path, start_step=5) as writer:
    with pytest.raises(AssertionError):
      writer.write({'step': 5})


def test_other_processes_write_and_show_nothing(tmp_path, capsys):
  workdir = tmp_path / 'run'
  with _open(workdir, primary=False, show=True, header='MFU') as writer:
    writer.write({'step': 1, 'loss': 1.0})
    writer.flush()
  assert not workdir.exists()
  assert capsys.readouterr().out == ''


def test_flush_reaches_the_disk(tmp_path, monkeypatch):
  synced = []
  with _open(tmp_path) as writer:
    writer.write({'step': 1, 'loss': 3.0})
    monkeypatch.setattr(os, 'fsync', lambda f: synced.append(os.fstat(f)))
    writer.flush()
    rows = os.stat(tmp_path / 'metrics.jsonl')
    assert any(os.path.samestat(rows, stat) for stat in synced)
    # The events too, while the writer is still open.
    assert _scalars(tmp_path, 'train/loss') == [(1, 3.0)]


def test_a_full_disk_still_closes_the_rest(tmp_path, monkeypatch):
  writer = _open(tmp_path)
  writer.write({'step': 1, 'loss': 3.0})

  def fail(self):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(metrics._LocalRows, 'flush', fail)
    with pytest.raises(OSError, match='No space left'):
      writer.close()
  assert _scalars(tmp_path, 'train/loss') == [(1, 3.0)]
  writer.close()


def test_tensorboard_reads_the_events(tmp_path):
  with _open(tmp_path) as writer:
    writer.write({'step': 1, 'loss': math.nan, 'mfu': None})
    writer.write({'step': 2, 'loss': 0.5, 'eval/a/loss': 0.25})
  assert _scalars(tmp_path, 'train/loss') == [(2, 0.5)]
  assert _scalars(tmp_path, 'eval/a/loss') == [(2, 0.25)]


def test_tensorboard_hides_what_a_resumed_run_replaced(tmp_path):
  _write(tmp_path, range(1, 7))
  _write(tmp_path, [4, 5], start_step=3, scale=10.0)
  assert _scalars(tmp_path, 'train/loss') == [
    (1, 1.0),
    (2, 0.5),
    (3, pytest.approx(1 / 3)),
    (4, 2.5),
    (5, 2.0),
  ]


class _Bucket(memory.MemoryFileSystem):
  """A stand-in for cloud storage, which cannot append."""

  protocol = 'gcs'
  store = {}
  pseudo_dirs = ['']
  cachable = False

  @classmethod
  def _strip_protocol(cls, path):
    return '/' + path.removeprefix('gs://').strip('/')

  def _open(self, path, mode='rb', **kwargs):
    assert 'a' not in mode
    return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
  fs = _Bucket()
  backend = sys.modules[epath.Path('x')._backend.__class__.__module__]
  monkeypatch.setattr(
    backend._FileSystemSpecBackend, '_get_filesystem', lambda *_: fs
  )
  monkeypatch.setattr(_Bucket, 'store', {})
  assert isinstance(fs, fsspec.AbstractFileSystem)
  return epath.Path('gs://bucket/run')


def test_remote_rows_are_uploaded_whole_by_flush(bucket):
  writer = _open(bucket)
  writer.write({'step': 1, 'loss': 1.0})
  assert metrics.read_rows(bucket) == []
  writer.flush()
  assert _steps(bucket) == [1]
  writer.write({'step': 2, 'loss': 1.0})
  writer.flush()
  assert _steps(bucket) == [1, 2]
  writer.write({'step': 3, 'loss': 1.0})
  writer.close()
  assert _steps(bucket) == [1, 2, 3]
  _write(bucket, [3], start_step=2)
  assert [row['loss'] for row in metrics.read_rows(bucket)] == [1, 1, 1 / 3]


def test_remote_events_are_readable(bucket, tmp_path):
  _write(bucket, [1, 2])
  (path,) = (bucket / 'tensorboard').iterdir()
  (tmp_path / 'tensorboard').mkdir()
  (tmp_path / 'tensorboard' / path.name).write_bytes(path.read_bytes())
  assert _scalars(tmp_path, 'train/loss') == [(1, 1.0), (2, 0.5)]


def test_watching_does_not_import_jax():
  program = (
    'import sys; from t2x.tracking import metrics, run_report;'
    " assert not {'jax', 'tensorboardX', 'rich', 'matplotlib'} &"
    ' sys.modules.keys(), sys.modules.keys()'
  )
  subprocess.run([sys.executable, '-c', program], check=True)
