"""A tiny model that is served, for tests."""

import contextlib
import threading
import time

import httpx
import pytest
import shared_runs
import tiny
import uvicorn

from t2x.decode import engine as engine_lib
from t2x.inference import loading
from t2x.serving import server as server_lib
from t2x.tracking import run_report
from t2x.trainer import train

SIZES = engine_lib.EngineConfig(
  num_slots=4, page_size=8, chunks=(8, 32), max_waiting=8
)


def trained_of(directory, **settings):
  """Returns a tiny run that was trained in a directory."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_report, 'write', lambda workdir: None)
    config = tiny.experiment_of(directory, **settings)
    train.train(config, str(directory / 'run'), show=False)
  return loading.load(str(directory / 'run'))


def shared(tmp_path_factory):
  """Returns a tiny run of texts of 64 tokens, trained once for all files."""
  directory = shared_runs.trained(
    tmp_path_factory, train__num_steps=30, data__length=64
  )
  return loading.load(str(directory / 'run'))


@contextlib.contextmanager
def served(trained, **options):
  """Yields the address of a server; options as for `make`."""
  with running(make(trained, **options)) as url:
    yield url


def make(trained, engine=SIZES, **options):
  return server_lib.make(trained, engine=engine, **options)


@contextlib.contextmanager
def running(made):
  """Yields the address of a server that runs an application."""
  socket = server_lib.bind('127.0.0.1', 0)
  config = uvicorn.Config(made, log_level='error', access_log=False)
  server = uvicorn.Server(config)
  thread = threading.Thread(target=server.run, args=([socket],), daemon=True)
  thread.start()
  url = f'http://127.0.0.1:{socket.getsockname()[1]}'
  try:
    for _ in range(200):
      with contextlib.suppress(httpx.TransportError):
        httpx.get(f'{url}/health')
        break
      time.sleep(0.05)
    yield url
  finally:
    server.should_exit = True
    thread.join(timeout=30)
    socket.close()


def figures(url: str) -> dict[str, float]:
  """Returns /metrics by name; those with labels by name and labels."""
  lines = httpx.get(f'{url}/metrics').text.splitlines()
  pairs = (line.rsplit(' ', 1) for line in lines if not line.startswith('#'))
  return {name: float(value) for name, value in pairs}


def wait_until(is_so, seconds=20):
  """Waits for what happens on another thread."""
  end = time.monotonic() + seconds
  while not is_so():
    assert time.monotonic() < end, 'it never came to be'
    time.sleep(0.02)
