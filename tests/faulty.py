"""tests/tiny.py as a script in which something goes wrong.

PAUSE: seconds after each step, room for a signal.
UNREADABLE=STEP: process 1 alone cannot read the checkpoint of that step.
SLOW_INPUT=SECONDS: process 1 reads its batches that slowly.
INTERLEAVED: the devices of the processes take turns, as hosts of a torus may.
"""

import os
import pathlib
import socket
import time

import jax
import simulated
import tiny

from t2x import main
from t2x.data import input_pipeline
from t2x.parallel import mesh
from t2x.trainer import checkpoint_files
from t2x.trainer import run


def free_port() -> str:
  """Returns a port that nobody uses."""
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return str(s.getsockname()[1])


def start_two(directory, workdir, monkeypatch, pause=0.0, **settings):
  """Starts this script as two processes of four devices."""
  settings = {
    'train__num_steps': 10,
    'train__keep_last': 9,
    'data__eval_splits': '',
    **settings,
  }
  flags = [f'--set={n.replace("__", ".")}={v}' for n, v in settings.items()]
  flags += [f'--coordinator=127.0.0.1:{free_port()}', '--num_processes=2']
  monkeypatch.setenv('PAUSE', str(pause))
  monkeypatch.setenv('XLA_FLAGS', simulated.flags(4))
  return [
    tiny.start(
      directory,
      f'--workdir={workdir}',
      f'--process_id={index}',
      *flags,
      script=__file__,
    )
    for index in range(2)
  ]


def _pause(seconds: float) -> None:
  advance = run.Run.advance

  def slow(self, step):
    advance(self, step)
    time.sleep(seconds)

  run.Run.advance = slow


def _fail_to_read(step: str) -> None:
  handler = checkpoint_files.ocp.PyTreeCheckpointHandler
  restore = handler.restore

  def fail(self, folder, args):
    if folder.parent.name == step and jax.process_index() == 1:
      raise ValueError('no such shard')
    return restore(self, folder, args=args)

  handler.restore = fail


def _slow_input(seconds: float) -> None:
  train_batches = input_pipeline.train_batches

  def slow(*args, **kwargs):
    for batch in train_batches(*args, **kwargs):
      time.sleep(seconds * (jax.process_index() == 1))
      yield batch

  input_pipeline.train_batches = slow


def _interleave() -> None:
  make = mesh.make
  mesh.make = lambda c: make(c, jax.devices()[::2] + jax.devices()[1::2])


if __name__ == '__main__':
  _pause(float(os.environ.get('PAUSE', '0')))
  if 'UNREADABLE' in os.environ:
    _fail_to_read(os.environ['UNREADABLE'])
  if 'SLOW_INPUT' in os.environ:
    _slow_input(float(os.environ['SLOW_INPUT']))
  if 'INTERLEAVED' in os.environ:
    _interleave()
  directory = pathlib.Path(os.environ['TINY_DIRECTORY'])
  main.run(lambda: tiny.experiment_of(directory))
