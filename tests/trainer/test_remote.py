"""A whole run on gs://, against an emulator of Google Cloud Storage."""

import logging
import socket
import subprocess
import sys
import time

from etils import epath
import extras
import pytest
import tiny

from t2x.inference import generation
from t2x.inference import loading
from t2x.tracking import metrics
from t2x.tracking import run_report
from t2x.trainer import checkpointer
from t2x.trainer import train

pytestmark = [pytest.mark.slow, pytest.mark.reference]
for _name in ('gcsfs', 'gcp_storage_emulator'):
  extras.need(_name, extra='reference')

# The emulator, with what today's clients need and it lacks: moves, the
# generation of what is read, and writes that depend on the generation.
_SERVER = r"""
from http import HTTPStatus
import sys
from gcp_storage_emulator import server
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

def generation(storage, bucket, name):
  try:
    return storage.get_file_obj(bucket, name)['generation']
  except NotFound:
    return '0'

def move(request, response, storage, *args, **kwargs):
  names = request.params['bucket_name'], request.params['object_id']
  if generation(storage, *names) == '0':
    response.status = HTTPStatus.NOT_FOUND
    return
  request.params['dest_bucket_name'] = names[0]
  objects.copy(request, response, storage)
  storage.delete_file(*names)

def download(request, response, storage, *args, **kwargs):
  names = request.params['bucket_name'], request.params['object_id']
  response['x-goog-generation'] = generation(storage, *names)
  objects.download(request, response, storage)

def get(request, response, storage, *args, **kwargs):
  media = request.query.get('alt') == ['media']
  (download if media else objects.get)(request, response, storage)

def insert(request, response, storage, *args, **kwargs):
  wanted = request.query.get('ifGenerationMatch')
  names = request.params['bucket_name'], request.query.get('name', [''])[0]
  if wanted and wanted[0] != generation(storage, *names):
    response.status = HTTPStatus.PRECONDITION_FAILED
  else:
    objects.insert(request, response, storage)

api = r'^(?:/download)?/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/'
move_path = api + r'(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$'
upload_path = r'^/upload/storage/v1/b/(?P<bucket_name>[-.\w]+)/o$'
upload = {server.POST: insert, server.PUT: objects.upload_partial}
known = [(p, dict(m)) for p, m in server.HANDLERS]
for path, methods in known:
  for method, handler in methods.items():
    if handler is objects.download:
      methods[method] = download
    if handler is objects.get:
      methods[method] = get
server.HANDLERS = (
  (move_path, {server.POST: move}), (upload_path, upload), *known
)
server.create_server('127.0.0.1', int(sys.argv[1]), True, 'bucket').run()
"""


@pytest.fixture(scope='module')
def bucket(tmp_path_factory):
  """A bucket in memory, which this process and its children talk to."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  log = open(tmp_path_factory.mktemp('emulator') / 'log', 'w')
  process = subprocess.Popen(
    [sys.executable, '-c', _SERVER, str(port)], stdout=log, stderr=log
  )
  with pytest.MonkeyPatch.context() as patch:
    url = f'http://127.0.0.1:{port}'
    patch.setenv('STORAGE_EMULATOR_HOST', url)
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', url)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
      with socket.socket() as s:
        if s.connect_ex(('127.0.0.1', port)) == 0:
          break
      time.sleep(0.1)
    yield 'gs://bucket'
  process.kill()
  process.wait()
  log.close()


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
