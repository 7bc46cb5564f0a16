"""How processes find each other: by flags, by the environment, or not at all.

No cluster is here, so what the environment leads to is seen at the one call of
JAX; the start by flags and by SLURM's variables is the real thing.
"""

import os
import pathlib
import socket
import subprocess
import sys

import faulty
import jax
from jax._src.clusters import cloud_tpu_cluster
import pytest
import simulated
import tiny

from t2x.multihost import initialization

_SLURM = {
  'SLURM_JOB_ID': '7',
  'SLURM_STEP_NODELIST': 'localhost',
  'SLURM_NTASKS': '2',
  'SLURM_PROCID': '1',
  'SLURM_LOCALID': '1',
}
_GKE = {'TPU_WORKER_HOSTNAMES': 'host-0,host-1', 'TPU_WORKER_ID': '1'}


class _Called(Exception):
  pass


@pytest.fixture
def initialize(monkeypatch):
  """Raises _Called with the arguments of jax.distributed.initialize."""

  def record(**arguments):
    raise _Called(arguments)

  monkeypatch.setattr(jax.distributed, 'initialize', record)
  for name in (*_SLURM, *_GKE, 'TPU_PROCESS_ADDRESSES', 'MEGASCALE_NUM_SLICES'):
    monkeypatch.delenv(name, raising=False)


def _set(monkeypatch, variables):
  for name, value in variables.items():
    monkeypatch.setenv(name, value)


def _call(**arguments):
  """Returns what JAX was called with, or None."""
  try:
    with initialization.joined_processes(**arguments):
      return None
  except _Called as call:
    return call.args[0]


def _is_detected(call) -> bool:
  """Whether JAX is left to find out who is who."""
  return call is not None and not any(
    name in call for name in ('coordinator_address', 'process_id')
  )


def test_a_plain_machine_starts_nothing(initialize):
  assert _call() is None
  assert _call(num_processes=1) is None
  assert _call(num_processes=1, process_id=0) is None
  one = dict(coordinator='a:1', num_processes=1, process_id=0)
  assert _call(**one) is None


def test_slurm(initialize, monkeypatch):
  _set(monkeypatch, _SLURM)
  assert _is_detected(_call())
  assert _call(num_processes=1) is None  # Detection is off.
  monkeypatch.setenv('SLURM_NTASKS', '1')
  assert _call() is None
  monkeypatch.setenv('SLURM_NTASKS', '2')
  monkeypatch.delenv('SLURM_STEP_NODELIST')  # A batch script without srun.
  assert _call() is None


def test_gke(initialize, monkeypatch):
  _set(monkeypatch, _GKE)
  assert _call() is None  # Without a TPU these mean nothing.
  monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
  monkeypatch.setenv('MEGASCALE_NUM_SLICES', '1')
  assert _is_detected(_call())
  monkeypatch.setenv('TPU_WORKER_HOSTNAMES', 'host-0')
  assert _call() is None
  monkeypatch.setenv('MEGASCALE_NUM_SLICES', '2')  # Of one host each.
  assert _is_detected(_call())


@pytest.mark.parametrize(
  'endpoints, several', [('10.0.0.1,10.0.0.2', True), ('10.0.0.1', False)]
)
def test_tpu_pod(initialize, monkeypatch, endpoints, several):
  metadata = {
    'agent-worker-number': '1',
    'worker-network-endpoints': endpoints,
    'tpu-env': '',
  }
  monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
  monkeypatch.setattr(
    cloud_tpu_cluster, 'get_metadata', lambda key: (metadata[key], 200)
  )
  monkeypatch.delenv('TPU_SKIP_MDS_QUERY', raising=False)
  assert _is_detected(_call()) == several


def test_a_pod_that_is_no_indexed_job_is_alone(initialize, monkeypatch):
  # Where `kubernetes` is not installed JAX warns of it, an error in tests.
  monkeypatch.setenv('KUBERNETES_SERVICE_HOST', '10.0.0.1')
  monkeypatch.delenv('JOB_COMPLETION_INDEX', raising=False)
  assert _call() is None


def test_flags_reach_jax_and_turn_detection_off(initialize, monkeypatch):
  _set(monkeypatch, _SLURM)
  call = _call(coordinator='10.0.0.1:8476', num_processes=4, process_id=3)
  assert call is not None
  assert call['coordinator_address'] == '10.0.0.1:8476'
  assert (call['num_processes'], call['process_id']) == (4, 3)
  assert call['cluster_detection_method'] == 'deactivate'
  assert call['heartbeat_timeout_seconds'] < 60
  assert jax.config.jax_cpu_collectives_implementation == 'gloo'


@pytest.mark.parametrize(
  'arguments, message',
  [
    ((None, 2, 0), '--coordinator missing'),
    (('a:1', None, None), '--num_processes and --process_id missing'),
    (('a:1', 2, None), '--process_id missing: .* go together'),
    ((None, 0, None), '--num_processes=0; .* at least 1'),
    (('a:1', 2, 2), '--process_id=2 is not one of .* from 0 to 1'),
    (('a:1', 2, -1), '--process_id=-1 is not one of'),
    ((None, 1, 3), '--coordinator missing'),
    (('a', 2, 0), "--coordinator='a'; it is HOST:PORT"),
    ((':80', 2, 0), "--coordinator=':80'; it is HOST:PORT"),
    (('a:b', 2, 0), "--coordinator='a:b'; it is HOST:PORT"),
    (('a:70000', 2, 0), "--coordinator='a:70000'; it is HOST:PORT"),
  ],
)
def test_flags_that_cannot_be(initialize, arguments, message):
  with pytest.raises(ValueError, match=message):
    initialization.check(*arguments)
  names = ('coordinator', 'num_processes', 'process_id')
  with pytest.raises(ValueError, match=message):
    _call(**dict(zip(names, arguments)))


def _start(tmp_path, port, index, timeout=3):
  return tiny.start(
    tmp_path,
    f'--workdir={tmp_path / "run"}',
    f'--coordinator=127.0.0.1:{port}',
    '--num_processes=2',
    f'--process_id={index}',
    f'--start_timeout={timeout}',
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  'index, message',
  [
    (1, 'process 1 cannot join the run at 127.0.0.1:{} within 3 s'),
    (0, 'not all of the 2 processes have come to 127.0.0.1:{} within 3 s'),
  ],
)
def test_a_process_whose_others_never_come(tmp_path, index, message):
  port = faulty.free_port()
  process = _start(tmp_path, port, index)
  _, error = process.communicate(timeout=60)
  assert process.returncode == 1
  assert message.format(port) in error
  assert '--start_timeout' in error and 'Check failure' not in error, error


@pytest.mark.slow
def test_a_port_that_is_taken(tmp_path):
  with socket.socket(socket.AF_INET6) as s:
    s.bind(('::', 0))
    s.listen()
    process = _start(tmp_path, s.getsockname()[1], 0)
    _, error = process.communicate(timeout=60)
  assert process.returncode == 1
  assert 'error: Process 0 cannot listen at the port of' in error
  assert 'Traceback' not in error, error


_JOIN = """
import jax
from t2x.multihost import initialization
with initialization.joined_processes():
  import numpy as np
  from jax.experimental import multihost_utils
  mine = np.asarray(10 + jax.process_index())
  print(multihost_utils.process_allgather(mine).tolist())
"""


@pytest.mark.slow
def test_slurm_variables_start_two_processes():
  root = pathlib.Path(__file__).parents[2]
  job = str(_free_job())
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', _JOIN],
      env={
        **os.environ,
        **_SLURM,
        'SLURM_JOB_ID': job,
        'SLURM_PROCID': str(index),
        'SLURM_LOCALID': str(index),
        'PYTHONPATH': str(root),
        'XLA_FLAGS': simulated.flags(2),
      },
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
    )
    for index in range(2)
  ]
  outputs = [p.communicate(timeout=90)[0] for p in processes]
  assert [p.returncode for p in processes] == [0, 0], outputs
  assert '[10, 11]' in outputs[0] and '[1] [10, 11]' in outputs[1], outputs


def _free_job() -> int:
  """Returns a job whose port, which JAX takes from its number, is free."""
  for job in range(os.getpid() % 4096, 8192):
    with socket.socket() as s:
      try:
        s.bind(('127.0.0.1', job % 4096 + 61440))
      except OSError:
        continue
      return job
  raise AssertionError('no free port')
