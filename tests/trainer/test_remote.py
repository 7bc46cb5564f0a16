"""A whole run on gs://, against an emulator of Google Cloud Storage."""

import logging

import buckets
from etils import epath
import pytest
import tiny

from t2x.inference import generation
from t2x.inference import loading
from t2x.tracking import metrics
from t2x.tracking import run_report
from t2x.trainer import checkpointer
from t2x.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.reference]
buckets.need()


@pytest.fixture(scope='module')
def bucket(tmp_path_factory):
  """A bucket in memory, which this process and its children talk to."""
  with buckets.emulated(tmp_path_factory.mktemp('emulator') / 'log') as url:
    yield url


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('tiny')


def _train(directory, workdir, num_steps):
  config = tiny.experiment_of(
    directory, train__num_steps=num_steps, data__eval_splits=''
  )
  return train.train(config, str(workdir), show=False)


@pytest.mark.filterwarnings('default')  # The client leaves its sockets open.
def test_a_run_on_an_object_store(bucket, directory, caplog):
  workdir = f'{bucket}/runs/first'
  root = epath.Path(workdir)
  _train(directory, directory / 'whole', 6)
  _train(directory, workdir, 4)
  names = {path.name for path in root.iterdir()}
  assert names >= {
    'checkpoints',
    'config.json',
    'metrics.jsonl',
    run_report.FILE,
  }
  assert [*(root / 'tensorboard').iterdir()]
  # A save that never ended has its final name and no last file.
  torn = root / 'checkpoints' / '4'
  (torn / 'commit_success.txt').unlink()
  assert checkpointer.Checkpoints(workdir).latest_step() == 2
  caplog.set_level(logging.INFO)
  _train(directory, workdir, 4)
  assert 'Going on from the checkpoint of step 2' in caplog.text
  # One that ended, and was damaged since.
  for file in (torn / 'state' / 'd').iterdir():
    file.write_bytes(b'?')
  _train(directory, workdir, 6)
  assert 'The checkpoint of step 4 cannot be used' in caplog.text
  assert (root / 'damaged_checkpoint_4').is_dir()
  assert tiny.losses(workdir) == tiny.losses(directory / 'whole')
  assert [row['step'] for row in metrics.read_rows(workdir)] == [*range(1, 7)]
  trained = loading.load(workdir)
  assert trained.step == 6
  (text,) = generation.generate_text(trained, ['the run'], num_tokens=4)
  assert isinstance(text, str)
