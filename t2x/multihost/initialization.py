"""Joins the processes of a run, before the first use of devices.

with initialization.joined_processes(
  coordinator='10.0.0.1:8476', num_processes=2, process_id=0
):
  ...

Without arguments the processes are found from the environment (TPU pods, GKE,
SLURM, Open MPI, as JAX detects them); elsewhere the process stays alone.
"""

from collections.abc import Generator
import contextlib
import logging
import os
import socket
import sys
import threading
from typing import Any
from typing import TextIO

from absl import logging as absl_logging
import jax

from t2x.multihost import liveness_monitor

START_SECONDS = 300.0  # Pods of a job start minutes apart.
_EXTRA = 120  # Seconds that JAX waits longer; it ends with a C++ trace.


@contextlib.contextmanager
def joined_processes(
  *,
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  start_seconds: float = START_SECONDS,
) -> Generator[None]:
  """Joins this process to the others of the run, and leaves them at the end.

  A process that raises inside the block tells the others, which then end too.

  Args:
    coordinator: HOST:PORT of process 0, which all processes can reach; None to
      detect the processes from the environment.
    num_processes: number of processes of the run; 1 turns detection off.
    process_id: number of this process, from 0.
    start_seconds: time limit for all processes to join, in seconds.

  Raises:
    ValueError: the arguments are impossible, or only some are given.
  """
  check(coordinator, num_processes, process_id)
  if num_processes == 1 or (coordinator is None and not detects_cluster()):
    yield
    return
  arguments: dict[str, Any] = {}
  if coordinator is not None:
    arguments = {
      'coordinator_address': coordinator,
      'num_processes': num_processes,
      'process_id': process_id,
      # Nothing is left to detect, and nothing can be detected wrongly.
      'cluster_detection_method': 'deactivate',
    }
    if process_id == 0:
      _check_port(coordinator)
  initialize(arguments, start_seconds)
  _set_up_output(liveness_monitor.state().process_id)
  with liveness_monitor.monitoring(
    liveness_monitor.state().coordinator_address
  ):
    yield


def check(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> None:
  """Checks the flags that name a process of a run.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: number of processes of the run.
    process_id: number of this process, from 0.

  Raises:
    ValueError: a flag is impossible, or only some are given.
  """
  if num_processes is not None and num_processes < 1:
    raise ValueError(
      f'--num_processes={num_processes}; it is the number of processes of the '
      'run, at least 1.'
    )
  if num_processes == 1 and coordinator is None and process_id in (None, 0):
    return
  values = {
    'coordinator': coordinator,
    'num_processes': num_processes,
    'process_id': process_id,
  }
  missing = [f'--{name}' for name, value in values.items() if value is None]
  if len(missing) == len(values):
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


def detects_cluster() -> bool:
  """Whether the environment names this process as one of several."""
  # JAX has no public function for it. jax.distributed.initialize uses the same
  # classes.
  from jax._src.clusters import ClusterEnv

  for env in ClusterEnv._cluster_types:
    if env.opt_in_only_method:
      continue
    # A single pod (a notebook) is no job, and asking its cluster can fail.
    if (
      env.__name__ == 'K8sCluster' and 'JOB_COMPLETION_INDEX' not in os.environ
    ):
      continue
    if env.is_env_present():
      return env.get_process_count() > 1
  return False


def initialize(arguments: dict[str, Any], start_seconds: float) -> None:
  """Calls jax.distributed.initialize; ends the process if others do not join.

  Args:
    arguments: keyword arguments for it; empty to detect the processes.
    start_seconds: time limit for all processes to join, in seconds.
  """
  jax.config.update('jax_cpu_collectives_implementation', 'gloo')
  timer = threading.Timer(start_seconds, _give_up, (arguments, start_seconds))
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **arguments,
      initialization_timeout=int(start_seconds) + _EXTRA,
      heartbeat_timeout_seconds=liveness_monitor.HEARTBEAT_SECONDS,
    )
  finally:
    timer.cancel()


def _check_port(coordinator: str) -> None:
  """Checks that process 0 can listen at its port; JAX would crash.

  Raises:
    ValueError: it cannot.
  """
  port = int(coordinator.rpartition(':')[2])
  family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
  try:
    socket.create_server(('', port), family=family).close()
  except OSError as error:
    raise ValueError(
      f'Process 0 cannot listen at the port of --coordinator={coordinator} '
      f'({error.strerror}). Choose a free one, the same for every process.'
    ) from error


def _give_up(arguments: dict[str, Any], seconds: float) -> None:
  """Reports missing processes and ends this one.

  It runs in a thread: the main thread waits in C++, and for longer.

  Args:
    arguments: the arguments of `jax.distributed.initialize`.
    seconds: time limit that has passed.
  """
  address = arguments.get(
    'coordinator_address', liveness_monitor.state().coordinator_address
  )
  index = arguments.get('process_id', liveness_monitor.state().process_id)
  num = arguments.get('num_processes', 'all')
  if index == 0:
    problem = (
      f'not all of the {num} processes have come to {address} within '
      f'{seconds:.0f} s. Start every other one (each with its own '
      '--process_id) within that time'
    )
  else:
    problem = (
      f'process {index} cannot join the run at {address} within '
      f'{seconds:.0f} s. See that process 0 has started, and that '
      '--coordinator is an address of its machine that this one can reach'
    )
  sys.stderr.write(f'error: {problem}; --start_timeout sets the seconds.\n')
  sys.stderr.flush()
  os._exit(1)


class _PrefixedStream:
  """A stream that begins each line with a prefix."""

  def __init__(self, stream: TextIO, prefix: str):
    self._stream, self._prefix, self._pending = stream, prefix, ''

  def write(self, text: str) -> int:
    *lines, self._pending = (self._pending + text).split('\n')
    # One write for each line, so that lines of several processes do not mix.
    for line in lines:
      self._stream.write(f'{self._prefix}{line}\n')
    return len(text)

  def flush(self) -> None:
    if self._pending:
      self._stream.write(f'{self._prefix}{self._pending}')
      self._pending = ''
    self._stream.flush()

  def __getattr__(self, name: str) -> Any:
    return getattr(self._stream, name)


def _set_up_output(index: int) -> None:
  """Keeps the logs of all processes but the first to warnings and errors.

  Their lines begin with the number of the process.

  Args:
    index: number of this process.
  """
  if jax.config.values['jax_platforms'] == 'cpu' and sys.stdout.fileno() == 1:
    # Gloo prints every connection from C++, to the descriptor of stdout; Python
    # gets another one.
    sys.stdout = os.fdopen(os.dup(1), 'w', buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
  if index == 0:
    return
  sys.stderr = _PrefixedStream(sys.stderr, f'[{index}] ')
  sys.stdout = _PrefixedStream(sys.stdout, f'[{index}] ')
  absl_logging.get_absl_handler().python_handler.stream = sys.stderr
  logging.getLogger('t2x').setLevel(logging.WARNING)
