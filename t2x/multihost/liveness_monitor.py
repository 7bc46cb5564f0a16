"""The processes of a run watch each other: one that dies takes the others down.

Every process writes a pulse to the key-value store of JAX's coordination
service, which lives in process 0. Process 0 reads the pulses and says there
who is gone; the others read that, and process 0 is gone when it does not
answer. All end with one message that names the dead process. A collective that
fails only makes process 0 look sooner.

Behind this stand JAX's own heartbeats, sent by threads that Python cannot hold
up: they count from the start, the silence of a pulse only while steps run.
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

# Of JAX: a death is noticed after half of it at the soonest, and at the latest
# after all of it.
HEARTBEAT_SECONDS = 50
_PULSE_SECONDS = 2.0
_SILENT_SECONDS = 20.0  # Of a hung process, or one whose machine is gone.
_BROKEN_SECONDS = 6.0  # The same once a collective has failed.
_LAST_SECONDS = 8.0  # For which process 0 stays, so that all hear of it.
_FINISH_SECONDS = 3600.0  # For which the fast wait for the report's writer.
_PULSE, _DEAD, _BROKEN, _LEFT = 'pulse', 'dead', 'broken', 'left'

# One a process, as is JAX's own state of the cluster.
_watch: 'Watch | None' = None


@contextlib.contextmanager
def watching(coordinator: str) -> Generator[None]:
  """Watches the others while the block runs, and ends together with them.

  Args:
    coordinator: HOST:PORT of process 0.
  """
  global _watch
  _watch = Watch(coordinator)
  try:
    yield
  except BaseException as error:
    _watch.failed(error)
    raise
  _watch.finish()
  _watch = None


def follow(where: Callable[[], str]) -> None:
  """Says that steps run.

  Args:
    where: returns after which step that is and from where the run goes on; a
      message ends with it.
  """
  if _watch is not None:
    _watch.where = where


class Watch:
  """Pulses, and the judgement on those that have none.

  Attributes:
    where: see `follow`; None before the first step.
  """

  def __init__(self, coordinator: str):
    self.where: Callable[[], str] | None = None
    self._client: Any = state().client
    self._index, self._num = state().process_id, state().num_processes
    self._heard = time.monotonic()  # When the coordination service answered.
    # Of each process the value, and since when; read by process 0.
    self._pulses: dict[int, tuple[str, float]] = {}
    self._dead: dict[int, str] = {}  # And how.
    self._broken = self._failing = self._stopped = False
    self._ending = threading.Lock()  # Held by whoever says the last words.
    self._words = abort_handler.LastWords(coordinator, self._on_abort)
    self._threads = [
      threading.Thread(target=target, daemon=True)
      for target in (self._pulse, self._judge)
    ]
    for thread in self._threads:
      thread.start()

  def failed(self, error: BaseException) -> None:
    """Tells the others that this process ends, unless another is to blame.

    Does not return where another one is. JAX's barrier at exit would wait for
    processes that wait for this one, so the interpreter ends without it.
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
    self._words.forget()
    jax.distributed.shutdown()

  def _pulse(self) -> None:
    """Asks and tells the store. Stands still while process 0 does."""
    number = 0
    while not self._stopped:
      number += 1
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self._set(_PULSE, self._index, str(number))
        if self._broken:
          self._set(_BROKEN, self._index, 'yes')
        if self._index == 0:
          self._listen()
        self._dead = self._get(_DEAD)
        self._heard = time.monotonic()
      time.sleep(_PULSE_SECONDS)

  def _listen(self) -> None:
    now = time.monotonic()
    for index, value in self._get(_PULSE).items():
      if self._pulses.get(index, ('', now))[0] != value:
        self._pulses[index] = value, now
    self._broken = self._broken or bool(self._get(_BROKEN))
    if self.where is not None or self._broken:
      limit = _BROKEN_SECONDS if self._broken else _SILENT_SECONDS
      for index in self._silent(limit):
        self._set(_DEAD, index, f'died or hangs (silent for {limit:.0f} s)')

  def _judge(self) -> None:
    while not self._stopped:
      dead = dict(self._dead)
      if self._failing:  # It speaks for itself.
        dead.pop(self._index, None)
      silence = time.monotonic() - self._heard
      if self.where is not None and silence > _SILENT_SECONDS:
        dead = {0: f'died or hangs (silent for {silence:.0f} s)'}
      if dead:
        self._end(dead)
      time.sleep(_PULSE_SECONDS / 2)

  def _silent(self, limit: float) -> list[int]:
    now = time.monotonic()
    return [i for i, (_, since) in self._pulses.items() if now - since > limit]

  def _end(self, dead: dict[int, str]) -> None:
    """Says who is dead, and ends this process."""
    if not self._ending.acquire(blocking=False):
      return
    self._say(dead)
    if 0 not in dead:  # The store still answers.
      self._wait_for_the_others()
    os._exit(1)

  def _on_abort(self, coordinator_lives: bool) -> bool:
    """Says why JAX aborts this process; False if that is not its reason."""
    if self._stopped or not self._ending.acquire(blocking=False):
      return False
    heard = time.monotonic() - self._heard
    if not coordinator_lives or (self._index and heard > _BROKEN_SECONDS):
      self._say({0: 'died'})
      return True
    silent = self._silent(_BROKEN_SECONDS)
    if silent:
      self._say({index: 'died' for index in silent})
    return bool(silent)

  def _say(self, dead: dict[int, str]) -> None:
    index, how = min(dead.items())
    where = ''
    if self.where is not None:
      # A disk that does not answer must not keep the message back.
      with contextlib.suppress(Exception):
        where = self.where()
    sys.stderr.write(
      f'error: process {index} of {self._num} {how}{where or "."} This process '
      f'({self._index}) ends too. Give the same command again to go on, on as '
      'many processes or on fewer.\n'
    )
    sys.stderr.flush()

  def _wait_for_the_others(self) -> None:
    """Keeps the store of process 0 up until the living have read it."""
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
    """Returns process -> value of the keys t2x/FOLDER/PROCESS."""
    pairs = self._client.key_value_dir_get(f't2x/{folder}/')
    return {int(key.rpartition('/')[2]): value for key, value in pairs}


def state() -> Any:
  """Returns what JAX knows of the cluster, with the client of its store."""
  # Not public, and without another way to the store; Orbax goes it too.
  from jax._src import distributed

  return distributed.global_state
