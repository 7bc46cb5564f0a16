import json
import multiprocessing
import os
import subprocess
import sys

from etils import epath
import optuna
import pytest

from t2x.sweeps import journal


def _study(directory):
  return optuna.create_study(
    storage=journal.storage(epath.Path(directory)),
    study_name='study',
    load_if_exists=True,
    sampler=optuna.samplers.RandomSampler(seed=0),
  )


def _add(study, num, name=''):
  for i in range(num):
    trial = study.ask()
    trial.set_user_attr('name', f'{name}{i}')
    study.tell(trial, float(i))


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
  _add(_study(tmp_path), 3)
  with open(tmp_path / 'journal.log', 'ab') as f:
    f.write(b'{"op_code": 4, "worker_')
  assert len(_study(tmp_path).trials) == 3
  _add(_study(tmp_path), 1)
  assert len(_study(tmp_path).trials) == 4
  for line in (tmp_path / 'journal.log').read_text().splitlines():
    json.loads(line)


_FULL = """
import resource, sys
sys.path.insert(0, sys.argv[2])
import test_journal
study = test_journal._study(sys.argv[1])
test_journal._add(study, 2)
size = (test_journal.pathlib_size(sys.argv[1]) + 60)
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
try:
  test_journal._add(study, 1)
except OSError as error:
  print('refused', error.errno)
"""


def pathlib_size(directory):
  return os.path.getsize(os.path.join(directory, 'journal.log'))


def test_a_full_disk_leaves_whole_lines(tmp_path):
  here = os.path.dirname(__file__)
  done = subprocess.run(
    [sys.executable, '-c', _FULL, str(tmp_path), here],
    capture_output=True,
    text=True,
  )
  assert done.stdout.startswith('refused'), done
  assert (tmp_path / 'journal.log').read_text().endswith('}\n')
  _add(_study(tmp_path), 1)
  assert [t.state.name for t in _study(tmp_path).trials][:2] == ['COMPLETE'] * 2


def test_a_large_study_has_a_snapshot(tmp_path):
  _add(_study(tmp_path), 102)
  assert (tmp_path / 'journal.log.snapshot').exists()
  again = _study(tmp_path)
  assert [t.value for t in again.trials] == [float(i) for i in range(102)]
  _add(again, 2)
  assert len(_study(tmp_path).trials) == 104


def _work(directory, name, objects):
  if objects:
    backend = journal.Objects(epath.Path(directory))
    storage = optuna.storages.JournalStorage(backend)
    study = optuna.create_study(
      storage=storage, study_name='study', load_if_exists=True
    )
  else:
    study = _study(directory)
  _add(study, 15, name)


@pytest.mark.parametrize('objects', [False, True], ids=['file', 'objects'])
def test_processes_share_a_journal(tmp_path, objects):
  context = multiprocessing.get_context('spawn')
  children = [
    context.Process(target=_work, args=(str(tmp_path), f'{i}-', objects))
    for i in range(3)
  ]
  for child in children:
    child.start()
  for child in children:
    child.join()
    assert child.exitcode == 0
  if objects:
    storage = optuna.storages.JournalStorage(
      journal.Objects(epath.Path(tmp_path))
    )
    trials = optuna.load_study(study_name='study', storage=storage).trials
  else:
    trials = _study(tmp_path).trials
  names = sorted(t.user_attrs['name'] for t in trials)
  assert names == sorted(f'{i}-{n}' for i in range(3) for n in range(15))
  assert {t.state.name for t in trials} == {'COMPLETE'}


def test_a_database_that_cannot_be_opened(tmp_path):
  for bad, message in (
    ('nonsense', '--storage=nonsense: the database'),
    ('sqlite:////nowhere/x.db', 'there is no directory /nowhere'),
    ('postgresql://me:secret@127.0.0.1:1/x', r'postgresql://me:\*\*\*@127'),
  ):
    with pytest.raises(ValueError, match=message) as refused:
      journal.check_url(bad)
    assert 'secret' not in str(refused.value)
  url = f'sqlite:///{tmp_path}/results.db'
  _add(
    optuna.create_study(storage=journal.storage(epath.Path(tmp_path), url)), 1
  )
  assert (tmp_path / 'results.db').exists()


def test_many_objects_are_put_together(tmp_path, monkeypatch):
  """Of three that belong together, the first reader needs one."""
  monkeypatch.setattr(journal, '_TOGETHER', 3)
  folder = epath.Path(tmp_path) / 'journal'
  writer = journal.Objects(folder)
  for number in range(8):
    writer.append_logs([{'number': number}, {'more': number}])
  names = sorted(path.name for path in folder.iterdir())
  assert [name for name in names if name.startswith('up_to')] == [
    'up_to_00000003.json',
    'up_to_00000006.json',
  ]
  for number in range(6):
    (folder / f'{number:08}.jsonl').rename(folder / f'{number:08}.away')
  (folder / '00000000.jsonl').write_text('')  # Looked for, and not read.
  entries = [*journal.Objects(folder).read_logs(0)]
  assert entries == [
    {name: number} for number in range(8) for name in ('number', 'more')
  ]


def test_a_line_that_is_no_entry(tmp_path):
  (tmp_path / 'journal.log').write_text('{"a": 1}\nnonsense\n{"b": 2}\n')
  with pytest.raises(ValueError, match='journal.log has a line that is no'):
    list(journal.File(str(tmp_path / 'journal.log')).read_logs(0))
