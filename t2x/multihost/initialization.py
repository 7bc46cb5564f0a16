"""Joining the processes of a run, before anything asks for devices.

With cluster.joined(coordinator='10.0.0.1:8476', num_processes=2, process_id=0):
they are named by hand; without arguments the environment is asked (TPU pods,
GKE, SLURM, Open MPI, as JAX detects them), and a plain machine stays alone.
"""

from collections.abc import Generator
import contextlib
import logging
import os
import socket
import sys
import threading
from typing import Any

from absl import logging as absl_logging
import jax

from t2x.multihost import liveness_monitor

START_SECONDS = 300.0  # Pods of a job start minutes apart.
_EXTRA = 120  # JAX gives up later than we do, since it ends with a C++ trace.


@contextlib.contextmanager
def joined(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  start_seconds: float = START_SECONDS,
) -> Generator[None]:
  """Joins this process to the others of the run, and leaves with them.

  A process that raises inside tells the others, which then end too.

  Args:
    coordinator: HOST:PORT where process 0 is reached by all.
    num_processes: of the run; 1 turns detection off.
    process_id: of this one, from 0.
    start_seconds: after which missing processes are an error.

  Raises:
    ValueError: arguments that cannot be, or some without the others.
  """
  check(coordinator, num_processes, process_id)
  if num_processes == 1 or (coordinator is None and not detected()):
    yield
    return
  given: dict[str, Any] = {}
  if coordinator is not None:
    given = {
      'coordinator_address': coordinator,
      'num_processes': num_processes,
      'process_id': process_id,
      # Nothing is left to find out, and nothing to be found wrong.
      'cluster_detection_method': 'deactivate',
    }
    if process_id == 0:
      _check_port(coordinator)
  initialize(given, start_seconds)
  _speak_as(liveness_monitor.state().process_id)
  with liveness_monitor.watching(liveness_monitor.state().coordinator_address):
    yield


def check(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Raises ValueError for flags that name no process of a run."""
  if num_processes is not None and num_processes < 1:
    raise ValueError(
      f'--num_processes={num_processes}; it is the number of processes of the '
      'run, at least 1.'
    )
  if num_processes == 1 and coordinator is None and process_id in (None, 0):
    return
  given = {
    'coordinator': coordinator,
    'num_processes': num_processes,
    'process_id': process_id,
  }
  missing = [f'--{name}' for name, value in given.items() if value is None]
  if len(missing) == len(given):
    return
  if missing:
    raise ValueError(
      f'{" and ".join(missing)} missing: --coordinator=HOST:PORT, '
      '--num_processes=N and --process_id=I go together. Give all three, or '
      'none, or --num_processes=1 alone for a single process.'
    )
  assert coordinator is not None
  assert num_processes is not None and process_id is not None
  if not 0 <= process_id < num_processes:
    raise ValueError(
      f'--process_id={process_id} is not one of --num_processes='
      f'{num_processes}; they are numbered from 0 to {num_processes - 1}.'
    )
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdigit() or not 0 < int(port) < 65536:
    raise ValueError(
      f'--coordinator={coordinator!r}; it is HOST:PORT of process 0, as in '
      '10.0.0.1:8476, the same for every process.'
    )


def detected() -> bool:
  """Whether the environment says that this is one of several processes."""
  # JAX has no public way to ask. The same classes as initialize() goes by.
  from jax._src.clusters import ClusterEnv

  for env in ClusterEnv._cluster_types:
    if env.opt_in_only_method:
      continue
    # A pod of its own (a notebook) is no job, and asking its cluster may fail.
    if (
      env.__name__ == 'K8sCluster' and 'JOB_COMPLETION_INDEX' not in os.environ
    ):
      continue
    if env.is_env_present():
      return env.get_process_count() > 1
  return False


def initialize(given: dict[str, Any], start_seconds: float) -> None:
  """Calls jax.distributed.initialize, and ends in time where others lack."""
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  timer = threading.Timer(start_seconds, _give_up, (given, start_seconds))
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **given,
      initialization_timeout=int(start_seconds) + _EXTRA,
      heartbeat_timeout_seconds=liveness_monitor.HEARTBEAT_SECONDS,
    )
  finally:
    timer.cancel()


def _check_port(coordinator: str) -> None:
  """Raises ValueError if process 0 cannot listen, where JAX would crash."""
  port = int(coordinator.rpartition(':')[2])
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  try:
    socket.create_server(('', port), family=family).close()
  except OSError as error:
    raise ValueError(
      f'Process 0 cannot listen at the port of --coordinator={coordinator} '
      f'({error.strerror}). Choose a free one, the same for every process.'
    ) from error


def _give_up(given: dict[str, Any], seconds: float) -> None:
  """Says who did not come. The main thread waits in C++, and for longer."""
  address = given.get(
    'coordinator_address', liveness_monitor.state().coordinator_address
  )
  index = given.get('process_id', liveness_monitor.state().process_id)
  num = given.get('num_processes', 'all')
  if index == 0:
    what = (
      f'not all of the {num} processes have come to {address} within '
      f'{seconds:.0f} s. Start every other one (each with its own '
      '--process_id) within that time'
    )
  else:
    what = (
      f'process {index} cannot join the run at {address} within '
      f'{seconds:.0f} s. See that process 0 has started, and that '
      '--coordinator is an address of its machine that this one can reach'
    )
  sys.stderr.write(f'error: {what}; --start_timeout sets the seconds.\n')
  sys.stderr.flush()
  os._exit(1)


class _Prefixed:
  """A stream that marks each line with the number of the process."""

  def __init__(self, stream, prefix: str):
    self._stream, self._prefix, self._rest = stream, prefix, ''

  def write(self, text: str) -> int:
    *lines, self._rest = (self._rest + text).split('\n')
    # One write a line, so that those of several processes do not mix.
    for line in lines:
      self._stream.write(f'{self._prefix}{line}\n')
    return len(text)

  def flush(self) -> None:
    if self._rest:
      self._stream.write(f'{self._prefix}{self._rest}')
      self._rest = ''
    self._stream.flush()

  def __getattr__(self, name: str):
    return getattr(self._stream, name)


def _speak_as(index: int) -> None:
  """Leaves the terminal to process 0, but for warnings and errors of others."""
  if jax.config.values['jax_platforms'] == 'cpu' and sys.stdout.fileno() == 1:
    # Gloo prints every connection, from C++; Python's own goes another way.
    sys.stdout = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  if index == 0:
    return
  sys.stderr = _Prefixed(sys.stderr, f'[{index}] ')
  sys.stdout = _Prefixed(sys.stdout, f'[{index}] ')
  absl_logging.get_absl_handler().python_handler.stream = sys.stderr
  logging.getLogger('t2x').setLevel(logging.WARNING)
