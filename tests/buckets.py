"""An emulator of Google Cloud Storage, for tests of gs:// paths."""

from collections.abc import Iterator
import contextlib
import pathlib
import socket
import subprocess
import sys
import time

import extras
import pytest

# The emulator, with what today's clients need and it lacks: moves, the
# generation of what is read, and writes that depend on the generation.
_SERVER = r"""
from http import HTTPStatus
import sys
import threading
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
  name = request.query.get('name', [''])[0]
  if request.query.get('uploadType') == ['multipart']:
    name = request.data['meta']['name']
  names = request.params['bucket_name'], name
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
handlers = (move_path, {server.POST: move}), (upload_path, upload), *known
one_at_a_time = threading.Lock()  # As an object is there whole or not at all.

def locked(handler):
  def call(*args, **kwargs):
    with one_at_a_time:
      return handler(*args, **kwargs)
  return call

server.HANDLERS = tuple(
  (p, {m: locked(h) for m, h in methods.items()}) for p, methods in handlers
)
server.create_server('127.0.0.1', int(sys.argv[1]), True, 'bucket').run()
"""


def need() -> None:
  """Skips the module where the client or the emulator is missing."""
  for name in ('gcsfs', 'gcp_storage_emulator'):
    extras.need(name, extra='reference')


@contextlib.contextmanager
def emulated(log: pathlib.Path) -> Iterator[str]:
  """Yields a bucket in memory, which this process and its children talk to.

  Args:
    log: file for what the emulator prints.
  """
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    port = s.getsockname()[1]
  with open(log, 'w') as output, pytest.MonkeyPatch.context() as patch:
    process = subprocess.Popen(
      [sys.executable, '-c', _SERVER, str(port)], stdout=output, stderr=output
    )
    url = f'http://127.0.0.1:{port}'
    patch.setenv('STORAGE_EMULATOR_HOST', url)
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', url)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
      with socket.socket() as s:
        if s.connect_ex(('127.0.0.1', port)) == 0:
          break
      time.sleep(0.1)
    try:
      yield 'gs://bucket'
    finally:
      process.kill()
      process.wait()
