"""Ends all processes of a run when one of them dies.

Every process writes a pulse, a growing number, to the key-value store of JAX's
coordination service, which runs in process 0. Process 0 reads the pulses and
writes the processes that are dead to the store. The others read them there;
process 0 is dead when the store does not answer. All end with one message that
names the dead process. A collective that fails only makes process 0 look
sooner.

JAX's own heartbeats remain as a second check. Their threads cannot be held up
by Python. They count from the start of the run; missing pulses count only while
steps run.
"""

from collections.abc import Callable
from collections.abc import Generator
import contextlib
import os
import sys
import threading
import time
from typing import Any

import jax

from t2x.multihost import abort_handler

# Timeout of JAX's heartbeats. JAX notices a death after half of it at the
# earliest, and after all of it at the latest.
HEARTBEAT_SECONDS = 50
_PULSE_SECONDS = 2.0  # Time between pulses.
_SILENT_SECONDS = 20.0  # Time without a pulse after which a process is dead.
_BROKEN_SECONDS = 6.0  # The same once a collective has failed.
_LAST_SECONDS = 8.0  # Time that process 0 stays for the others to read.
_FINISH_SECONDS = 3600.0  # Time limit for all processes to finish.
_PULSE, _DEAD, _BROKEN, _LEFT = 'pulse', 'dead', 'broken', 'left'

# There is one in each process, as there is one state of JAX's cluster.
_monitor: 'Monitor | None' = None


@contextlib.contextmanager
def monitoring(coordinator: str) -> Generator[None]:
  """Monitors the other processes during the block, and ends together with them.

  Args:
    coordinator: HOST:PORT of process 0.
  """
  global _monitor
  _monitor = Monitor(coordinator)
  try:
    yield
  except BaseException as error:
    _monitor.failed(error)
    raise
  _monitor.finish()
  _monitor = None


def follow(where: Callable[[], str]) -> None:
  """Tells the monitor that steps run, so that missing pulses count.

  Args:
    where: function that returns text with the last step and the checkpoint that
      the run would resume from; it ends the message about a dead process.
  """
  if _monitor is not None:
    _monitor.where = where


class Monitor:
  """Sends the pulses of this process, and ends it when another one is dead.

  Args:
    coordinator: HOST:PORT of process 0.

  Attributes:
    where: see `follow`; None before the first step.
  """

  def __init__(self, coordinator: str):
    self.where: Callable[[], str] | None = None
    self._client: Any = state().client
    self._index, self._num = state().process_id, state().num_processes
    # Time of the last answer of the coordination service.
    self._last_answer = time.monotonic()
    # Value of each process's pulse, and when it changed; in process 0.
    self._pulses: dict[int, tuple[str, float]] = {}
    self._dead: dict[int, str] = {}  # Cause of each death.
    self._broken = self._failing = self._stopped = False
    self._ending = threading.Lock()  # Held by the thread that prints the end.
    self._abort = abort_handler.AbortHandler(coordinator, self._on_abort)
    self._threads = [
      threading.Thread(target=target, daemon=True)
      for target in (self._exchange_pulses, self._watch_for_deaths)
    ]
    for thread in self._threads:
      thread.start()

  def failed(self, error: BaseException) -> None:
    """Tells the other processes that this one ends with an error.

    It does not return if another process is dead and is the cause. JAX's
    barrier at exit would wait for processes that wait for this one, so the
    interpreter ends without it.

    Args:
      error: the error that ends this process.
    """
    if isinstance(error, jax.errors.JaxRuntimeError):
      self._broken = True
      time.sleep(_BROKEN_SECONDS + 4 * _PULSE_SECONDS)
    self._failing = True
    line = f'{type(error).__name__}: {error}'.splitlines()[0][:300]
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._set(_DEAD, self._index, f'ended with an error ({line})')
    abort_handler.exit_without_barrier(self._wait_for_the_others)

  def finish(self) -> None:
    """Waits for all processes, and leaves JAX's cluster with them."""
    self._client.wait_at_barrier('t2x/finish', int(_FINISH_SECONDS * 1000))
    self._stopped = True
    for thread in self._threads:
      thread.join()
    self._abort.restore()
    jax.distributed.shutdown()

  def _exchange_pulses(self) -> None:
    """Writes the pulse to the store and reads from it, in a thread.

    It stands still while process 0 does.
    """
    number = 0
    while not self._stopped:
      number += 1
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self._set(_PULSE, self._index, str(number))
        if self._broken:
          self._set(_BROKEN, self._index, 'yes')
        if self._index == 0:
          self._declare_dead()
        self._dead = self._get(_DEAD)
        self._last_answer = time.monotonic()
      time.sleep(_PULSE_SECONDS)

  def _declare_dead(self) -> None:
    """Writes the processes without a pulse to the store; in process 0."""
    now = time.monotonic()
    for index, value in self._get(_PULSE).items():
      if self._pulses.get(index, ('', now))[0] != value:
        self._pulses[index] = value, now
    self._broken = self._broken or bool(self._get(_BROKEN))
    if self.where is not None or self._broken:
      limit = _BROKEN_SECONDS if self._broken else _SILENT_SECONDS
      for index in self._silent(limit):
        self._set(_DEAD, index, f'died or hangs (silent for {limit:.0f} s)')

  def _watch_for_deaths(self) -> None:
    """Ends this process once another one is dead, in a thread."""
    while not self._stopped:
      dead = dict(self._dead)
      if self._failing:  # This process prints its own error.
        dead.pop(self._index, None)
      silence = time.monotonic() - self._last_answer
      if self.where is not None and silence > _SILENT_SECONDS:
        dead = {0: f'died or hangs (silent for {silence:.0f} s)'}
      if dead:
        self._end(dead)
      time.sleep(_PULSE_SECONDS / 2)

  def _silent(self, limit: float) -> list[int]:
    """Returns the processes without a pulse for longer than `limit` seconds."""
    now = time.monotonic()
    return [i for i, (_, since) in self._pulses.items() if now - since > limit]

  def _end(self, dead: dict[int, str]) -> None:
    """Prints the death of a process, and ends this one."""
    if not self._ending.acquire(blocking=False):
      return
    self._print(dead)
    if 0 not in dead:  # The store still answers.
      self._wait_for_the_others()
    os._exit(1)

  def _on_abort(self, coordinator_lives: bool) -> bool:
    """Prints the death for which JAX aborts this process; False if unknown."""
    if self._stopped or not self._ending.acquire(blocking=False):
      return False
    silence = time.monotonic() - self._last_answer
    if not coordinator_lives or (self._index and silence > _BROKEN_SECONDS):
      self._print({0: 'died'})
      return True
    silent = self._silent(_BROKEN_SECONDS)
    if silent:
      self._print({index: 'died' for index in silent})
    return bool(silent)

  def _print(self, dead: dict[int, str]) -> None:
    """Prints a message that names the first of the dead processes."""
    index, cause = min(dead.items())
    where = ''
    if self.where is not None:
      # A disk that does not answer must not keep the message back.
      with contextlib.suppress(Exception):
        where = self.where()
    sys.stderr.write(
      f'error: process {index} of {self._num} {cause}{where or "."} This '
      f'process ({self._index}) ends too. Give the same command again to go '
      'on, on as many processes or on fewer.\n'
    )
    sys.stderr.flush()

  def _wait_for_the_others(self) -> None:
    """Keeps the store of process 0 up until the others have read it."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._set(_LEFT, self._index, 'yes')
      end = time.monotonic() + (_LAST_SECONDS if self._index == 0 else 0)
      while time.monotonic() < end:
        gone = self._get(_LEFT).keys() | self._get(_DEAD).keys() | {0}
        if len(gone) == self._num:
          break
        time.sleep(0.2)

  def _set(self, folder: str, index: int, value: str) -> None:
    key = f't2x/{folder}/{index}'
    self._client.key_value_set(key, value, allow_overwrite=True)

  def _get(self, folder: str) -> dict[int, str]:
    """Returns the value of each process in the keys t2x/FOLDER/PROCESS."""
    pairs = self._client.key_value_dir_get(f't2x/{folder}/')
    return {int(key.rpartition('/')[2]): value for key, value in pairs}


def state() -> Any:
  """Returns JAX's state of the cluster, with the client of its store."""
  # It is not public, but the only way to the store; Orbax uses it too.
  from jax._src import distributed

  return distributed.global_state
