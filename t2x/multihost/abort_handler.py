"""Handles JAX's abort of a process, which then ends with a clear message."""

import atexit
from collections.abc import Callable
import contextlib
import ctypes
import os
import signal
import socket
import sys


class AbortHandler:
  """Reports why JAX aborts the process, which Python itself cannot catch.

  The threads of JAX's coordination service end a process by abort() as soon as
  process 0 is gone, or another process is declared dead. The signal of abort()
  is caught in C, in a thread that is free to run Python.

  Args:
    coordinator: HOST:PORT of process 0.
    say: function that prints the reason. Its argument is whether the
      coordinator still answers; its result is whether it knew the reason.
  """

  def __init__(self, coordinator: str, say: Callable[[bool], bool]):
    self._coordinator = coordinator
    self._say = say
    self._libc = ctypes.CDLL(None)
    self._libc.signal.restype = ctypes.c_void_p
    self._libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    # Kept here, since C holds no reference to it.
    self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._on_abort)
    address = ctypes.cast(self._handler, ctypes.c_void_p)
    self._previous = self._libc.signal(signal.SIGABRT, address)

  def restore(self) -> None:
    """Restores the previous handler of abort()."""
    self._libc.signal(signal.SIGABRT, self._previous)

  def _on_abort(self, number: int) -> None:
    if self._say(self._coordinator_lives()):
      sys.stderr.flush()
      os._exit(1)
    self.restore()
    signal.raise_signal(number)  # Blocked until this handler returns.

  def _coordinator_lives(self) -> bool:
    host, _, port = self._coordinator.rpartition(':')
    with contextlib.suppress(OSError):
      socket.create_connection((host.strip('[]'), int(port)), 3).close()
      return True
    return False


def exit_without_barrier(before: Callable[[], None]) -> None:
  """Lets the interpreter end, when it does, without JAX's barrier.

  Args:
    before: function that is called at the very end, after the error has been
      printed.
  """

  def end() -> None:
    before()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)

  # The function that is registered last runs first, before that of JAX.
  atexit.register(end)
