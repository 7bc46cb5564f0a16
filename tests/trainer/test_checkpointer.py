import gc
import logging
import os
import pathlib
import re
import shutil
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from t2x.tracking import metrics
from t2x.tracking import run_report
from t2x.trainer import checkpoint_files
from t2x.trainer import checkpointer
from t2x.trainer import train

# What fails leaves its tasks for the garbage collector to complain about.
_GARBAGE = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)
_NO_SPACE = OSError(28, 'No space left on device')


def _state(scale: float = 1.0):
  scale = float(scale)
  return {
    'layers': [scale * jnp.arange(3000.0), jnp.full((7, 11), scale)],
    'step': jnp.asarray(int(scale)),
    'flag': jnp.asarray([True, False]),
    'half': scale * jnp.ones(5, jnp.bfloat16),
  }


def _shapes(state):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
  )


def _save(workdir, steps, **options):
  saved = checkpointer.Checkpoints(str(workdir), **options)
  for step in steps:
    assert saved.save(step, _state(step), {'step': step})
  assert saved.wait()
  saved.close()


def _restore(workdir, **options):
  saved = checkpointer.Checkpoints(str(workdir))
  try:
    return saved.restore(_shapes(_state()), **options)
  finally:
    saved.close()


def _assert_step(restored, step):
  found, state, position = restored
  assert found == step and position == {'step': step}
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(_state(step))):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def _steps(workdir):
  return sorted(int(n) for n in os.listdir(workdir / 'checkpoints'))


def _data_files(workdir, step):
  """Returns the files that hold the values of arrays."""
  root = pathlib.Path(workdir) / 'checkpoints' / str(step) / 'state'
  files = list(root.rglob('d/*'))
  assert files
  return files


def _truncate(workdir, step):
  for file in _data_files(workdir, step):
    os.truncate(file, file.stat().st_size // 2)


def _flip(workdir, step):
  for file in _data_files(workdir, step):
    data = bytearray(file.read_bytes())
    for i in range(len(data) // 3, len(data), 97):
      data[i] ^= 0xFF
    file.write_bytes(data)


def _remove_data(workdir, step):
  for file in _data_files(workdir, step):
    file.unlink()


def _remove_meta(workdir, step):
  shutil.rmtree(pathlib.Path(workdir) / 'checkpoints' / str(step) / 'meta')


def _empty(workdir, step):
  folder = pathlib.Path(workdir) / 'checkpoints' / str(step)
  for file in folder.rglob('*'):
    if file.is_file():
      file.write_bytes(b'')


def _change_sum(workdir, step):
  """Damage that only the checksums of the arrays can see."""
  folder = pathlib.Path(workdir) / 'checkpoints' / str(step) / 'meta'
  (file,) = (p for p in folder.rglob('*') if p.name == 'metadata')
  text = file.read_text()
  changed = re.sub(r'("layers.1": )(\d)', r'\g<1>1\2', text)
  assert changed != text
  file.write_text(changed)


_DAMAGES = [_truncate, _flip, _remove_data, _remove_meta, _empty, _change_sum]


def test_what_is_saved_is_restored(tmp_path):
  assert _restore(tmp_path) is None
  _save(tmp_path, [3, 5])
  _assert_step(_restore(tmp_path), 5)
  _assert_step(_restore(tmp_path, step=3), 3)
  assert _steps(tmp_path) == [3, 5]
  with pytest.raises(
    checkpointer.CheckpointError, match='no checkpoint of step 4; it has 3, 5'
  ):
    _restore(tmp_path, step=4)


def test_keep_last_and_keep_every(tmp_path):
  _save(tmp_path, range(1, 10), keep_last=2, keep_every=4)
  assert _steps(tmp_path) == [4, 8, 9]
  _save(tmp_path, [10, 11], keep_last=2, keep_every=4)
  assert _steps(tmp_path) == [4, 8, 10, 11]


@_GARBAGE
@pytest.mark.parametrize('damage', _DAMAGES)
def test_a_damaged_newest_is_reported_and_the_one_before_used(
  tmp_path, caplog, damage
):
  _save(tmp_path, [2, 4, 6])
  damage(tmp_path, 6)
  _assert_step(_restore(tmp_path), 4)
  assert 'The checkpoint of step 6 cannot be used' in caplog.text
  assert 'trying the one before it' in caplog.text
  # It is kept aside, so that its step can be saved again.
  assert (tmp_path / 'damaged_checkpoint_6').is_dir()
  assert _steps(tmp_path) == [2, 4]
  _save(tmp_path, [6])
  _assert_step(_restore(tmp_path), 6)


def test_checksums_see_what_the_files_do_not(tmp_path, caplog):
  _save(tmp_path, [2, 4])
  _change_sum(tmp_path, 4)
  _restore(tmp_path)
  assert 'damaged arrays: layers.1' in caplog.text


@_GARBAGE
def test_the_same_step_can_be_damaged_twice(tmp_path):
  _save(tmp_path, [2, 4])
  for _ in range(2):
    _truncate(tmp_path, 4)
    _assert_step(_restore(tmp_path), 2)
    _save(tmp_path, [4])


@_GARBAGE
def test_all_damaged_lists_all(tmp_path):
  _save(tmp_path, [2, 4, 6])
  for damage, step in zip((_truncate, _remove_meta, _change_sum), (2, 4, 6)):
    damage(tmp_path, step)
  with pytest.raises(checkpointer.CheckpointError) as info:
    _restore(tmp_path)
  message = str(info.value)
  assert message.startswith(f'No checkpoint in {tmp_path}/checkpoints can be u')
  assert 'step 6: damaged arrays: layers.1' in message
  assert 'step 4: ' in message and 'step 2: ' in message
  assert 'Restore the files, or start in another workdir.' in message
  assert _steps(tmp_path) == [2, 4, 6]  # Nothing was moved.


@_GARBAGE
def test_reading_moves_nothing(tmp_path):
  _save(tmp_path, [2, 4])
  _truncate(tmp_path, 4)
  saved = checkpointer.Checkpoints(str(tmp_path))
  wanted = {'layers': _shapes(_state())['layers']}
  step, state, _ = saved.restore(wanted, partial=True)
  saved.close()
  assert step == 2
  np.testing.assert_array_equal(state['layers'][0], _state(2)['layers'][0])
  assert _steps(tmp_path) == [2, 4]


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (
      lambda s: s.pop('half'),
      r"step 2 .* other settings: not needed \['half'\]\. ",
    ),
    (
      lambda s: s.update(new=s['half']),
      r"other settings: missing \['new'\]\. ",
    ),
    (
      lambda s: s.update(half=jax.ShapeDtypeStruct((9,), jnp.bfloat16)),
      r'half is bfloat16\(5,\) there and bfloat16\(9,\) here',
    ),
  ],
)
def test_another_model_is_refused(tmp_path, change, message):
  _save(tmp_path, [2])
  shapes = _shapes(_state())
  change(shapes)
  saved = checkpointer.Checkpoints(str(tmp_path))
  with pytest.raises(checkpointer.CheckpointError, match=message):
    saved.restore(shapes)
  saved.close()
  assert _steps(tmp_path) == [2]


@pytest.mark.parametrize(
  'error',
  [
    PermissionError('no'),
    ConnectionError('reset'),
    ValueError('UNAVAILABLE: CURL error[6] Could not resolve host'),
  ],
)
def test_what_cannot_be_reached_now_is_not_damaged(
  tmp_path, monkeypatch, error
):
  _save(tmp_path, [2, 4])
  saved = checkpointer.Checkpoints(str(tmp_path))

  def fail(*args, **kwargs):
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint_files.json, 'loads', fail)
    with pytest.raises(type(error)):
      saved.restore(_shapes(_state()))
  saved.close()
  assert _steps(tmp_path) == [2, 4]
  _assert_step(_restore(tmp_path), 4)


def test_a_failed_save_is_reported_and_the_next_one_works(
  tmp_path, caplog, monkeypatch
):
  saved = checkpointer.Checkpoints(str(tmp_path))
  assert saved.save(2, _state(2), {'step': 2}) and saved.wait()
  with monkeypatch.context() as patch:

    def fail(*args, **kwargs):
      raise _NO_SPACE

    patch.setattr(saved.manager, 'save', fail)
    assert not saved.save(4, _state(4), {'step': 4})
  assert 'The checkpoint of step 4 could not be saved' in caplog.text
  assert 'No space left on device' in caplog.text
  assert 'the last complete checkpoint is that of step 2' in caplog.text
  assert saved.latest_step() == 2
  assert saved.save(6, _state(6), {'step': 6}) and saved.wait()
  saved.close()
  _assert_step(_restore(tmp_path), 6)


def test_a_save_that_never_ended_is_removed(tmp_path):
  _save(tmp_path, [2])
  torn = tmp_path / 'checkpoints' / '4.orbax-checkpoint-tmp'
  shutil.copytree(tmp_path / 'checkpoints' / '2', torn)
  _assert_step(_restore(tmp_path), 2)
  assert not torn.exists()


@pytest.fixture(autouse=True)
def _collect_garbage():
  yield
  gc.collect()  # In the test that made it, not in a later one.


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 4 MB, where the machine lets us make one."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  command = ['mount', '-t', 'tmpfs', '-o', 'size=4m', 'tmpfs', str(disk)]
  try:
    done = subprocess.run(command, capture_output=True).returncode == 0
  except OSError:
    done = False
  if not done:
    pytest.skip('mounting a small disk needs root')
  try:
    yield disk
  finally:
    subprocess.run(['umount', '-l', str(disk)], check=True)


def _fill(disk):
  with open(disk / 'filler', 'ab', buffering=0) as file:
    try:
      while True:
        file.write(bytes(4096))
    except OSError:
      pass


@_GARBAGE
def test_a_full_disk_for_a_while(small_disk, caplog):
  saved = checkpointer.Checkpoints(str(small_disk))
  assert saved.save(2, _state(2), {'step': 2}) and saved.wait()
  _fill(small_disk)
  ok = saved.save(4, _state(4), {'step': 4})
  assert not (saved.wait() and ok)
  assert 'The checkpoint of step 4 could not be saved' in caplog.text
  assert saved.latest_step() == 2
  (small_disk / 'filler').unlink()
  assert saved.save(6, _state(6), {'step': 6}) and saved.wait()
  saved.close()
  assert _steps(small_disk) == [2, 6]
  _assert_step(_restore(small_disk), 6)


@pytest.fixture
def directory(tmp_path, monkeypatch):
  monkeypatch.setattr(run_report, 'write', lambda workdir: None)
  return tmp_path


def _train(directory, workdir, **settings):
  settings = {'data__eval_splits': '', 'train__keep_last': 9, **settings}
  config = tiny.experiment_of(directory, **settings)
  return train.train(config, str(workdir), show=False)


@_GARBAGE
def test_training_outlives_a_full_disk(directory, small_disk, monkeypatch):
  _train(directory, directory / 'whole', train__num_steps=8)
  write = metrics.MetricsWriter.write

  def filling(self, row):
    if row['step'] == 5:
      _fill(small_disk)
    if row['step'] == 8:
      (small_disk / 'filler').unlink()
    write(self, row)

  monkeypatch.setattr(metrics.MetricsWriter, 'write', filling)
  _train(directory, small_disk, train__num_steps=8)
  assert tiny.losses(small_disk) == tiny.losses(directory / 'whole')
  # Saves under way when the disk fills or empties may fail or not.
  assert {2, 8} <= set(_steps(small_disk)) <= {2, 4, 6, 8}


@_GARBAGE
def test_a_disk_that_stays_full_ends_in_one_message(
  directory, small_disk, monkeypatch
):
  write = metrics.MetricsWriter.write
  stop = threading.Event()

  def keep_full():  # A failed save leaves room behind.
    while not stop.wait(0.001):
      _fill(small_disk)

  thread = threading.Thread(target=keep_full)

  def filling(self, row):
    if row['step'] == 5:
      thread.start()
    write(self, row)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.MetricsWriter, 'write', filling)
    try:
      with pytest.raises(
        checkpointer.CheckpointError,
        match='The state of step 8 could not be saved; the last complete '
        'chec.*step [24]. Free space .* give the same command again',
      ):
        _train(directory, small_disk, train__num_steps=8)
    finally:
      stop.set()
      thread.join()
  (small_disk / 'filler').unlink()
  _train(directory, small_disk, train__num_steps=8)
  assert len(tiny.losses(small_disk)) == 8
  assert 8 in _steps(small_disk)


def test_rows_wait_for_room(directory, monkeypatch, caplog):
  _train(directory, directory / 'whole', train__num_steps=8)
  write = metrics.MetricsWriter.write
  files = []

  def full(self, row):
    rows = self._parts[0]
    if row['step'] == 3:
      files.append(rows._file)
      rows._file = open('/dev/full', 'ab', buffering=0)
    if row['step'] == 7:
      rows._file.close()
      rows._file = files[0]
    write(self, row)

  monkeypatch.setattr(metrics.MetricsWriter, 'write', full)
  run = directory / 'run'
  _train(directory, run, train__num_steps=8)
  assert tiny.losses(run) == tiny.losses(directory / 'whole')
  assert caplog.text.count('Metrics cannot be written (') == 1
  # No checkpoint counts before the rows up to its step are on disk.
  assert _steps(run) == [2, 8]


@pytest.mark.slow
def test_files_that_may_not_grow(directory):
  """As on a full disk, for machines that mount nothing: the command line."""
  _train(directory, directory / 'whole', train__num_steps=4)
  run = directory / 'run'
  _train(directory, run, train__num_steps=2)
  flags = [
    f'--workdir={run}',
    '--set=data.eval_splits=',
    '--set=train.keep_last=9',
    '--set=train.num_steps=4',
  ]
  # Metrics fit into the limit, the arrays do not.
  limit = 20_000
  assert (run / 'metrics.jsonl').stat().st_size < limit // 2
  assert max(f.stat().st_size for f in _data_files(run, 2)) > limit
  script = directory / 'limited.py'
  script.write_text(
    'import resource, runpy\n'
    f'resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n'
    f'runpy.run_path({tiny.__file__!r}, run_name="__main__")\n'
  )
  process = tiny.start(directory, *flags, script=str(script))
  _, error = process.communicate(timeout=120)
  assert process.returncode == 1
  assert 'error: The state of step 4 could not be saved' in error
  # Threads that Orbax left behind may complain; no error of ours does.
  ours = os.path.join(os.path.dirname(train.__file__), '')
  assert f'File "{ours}' not in error
  process = tiny.start(directory, *flags)
  _, error = process.communicate(timeout=120)
  assert process.returncode == 0, error
  assert tiny.losses(run) == tiny.losses(directory / 'whole')


@_GARBAGE
@pytest.mark.parametrize('damage', [_truncate, _flip])
def test_training_goes_on_from_before_the_damage(directory, caplog, damage):
  run = directory / 'run'
  whole = _train(directory, directory / 'whole', train__num_steps=6)
  _train(directory, run, train__num_steps=4)
  damage(run, 4)
  caplog.set_level(logging.INFO)
  state = _train(directory, run, train__num_steps=6)
  assert 'Going on from the checkpoint of step 2' in caplog.text
  assert (run / 'damaged_checkpoint_4').is_dir()
  assert _steps(run) == [2, 4, 6]
  assert tiny.losses(run) == tiny.losses(directory / 'whole')
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(whole)):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_run_that_cannot_go_on_keeps_its_config(directory):
  run = directory / 'run'
  _train(directory, run, train__num_steps=2)
  before = (run / 'config.json').read_text()
  config = tiny.experiment_of(directory, model__embed_dim=32)
  with pytest.raises(
    checkpointer.CheckpointError, match='--allow_config_change or not. Undo the'
  ):
    train.train(config, str(run), show=False, allow_config_change=True)
  assert (run / 'config.json').read_text() == before
  assert len(tiny.losses(run)) == 2


def test_a_step_that_was_asked_for_is_damaged(tmp_path, caplog):
  _save(tmp_path, [2, 4, 6])
  _change_sum(tmp_path, 4)
  with pytest.raises(
    checkpointer.CheckpointError,
    match=r'step 4: damaged arrays.*or take another of the steps \[2, 6\]\.',
  ):
    _restore(tmp_path, step=4)
  assert 'trying the one before' not in caplog.text
  assert _steps(tmp_path) == [2, 4, 6]
