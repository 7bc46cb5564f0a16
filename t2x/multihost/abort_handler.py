"""What a process still says and does when it ends against its will."""

import atexit
from collections.abc import Callable
import contextlib
import ctypes
import os
import signal
import socket
import sys


class LastWords:
  """Speaks when JAX aborts the process, which Python cannot catch.

  The threads of JAX's coordination service end a process by abort() as soon
  as process 0 is gone, or another one was named dead. The signal of abort() is
  caught in C, and comes from a thread that may well run Python.

  Args:
    coordinator: HOST:PORT of process 0.
    say: told whether the coordinator still answers; returns whether it knew
      the reason and said it.
  """

  def __init__(self, coordinator: str, say: Callable[[bool], bool]):
    self._coordinator = coordinator
    self._say = say
    self._libc = ctypes.CDLL(None)
    self._libc.signal.restype = ctypes.c_void_p
    self._libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    # Kept: C holds no reference.
    self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._on_abort)
    address = ctypes.cast(self._handler, ctypes.c_void_p)
    self._before = self._libc.signal(signal.SIGABRT, address)

  def forget(self) -> None:
    """Leaves abort() to whoever had it before."""
    self._libc.signal(signal.SIGABRT, self._before)

  def _on_abort(self, number: int) -> None:
    if self._say(self._coordinator_lives()):
      sys.stderr.flush()
      os._exit(1)
    self.forget()
    signal.raise_signal(number)  # Blocked until this handler returns.

  def _coordinator_lives(self) -> bool:
    host, _, port = self._coordinator.rpartition(':')
    with contextlib.suppress(OSError):
      socket.create_connection((host.strip('[]'), int(port)), 3).close()
      return True
    return False


def exit_without_barrier(before: Callable[[], None]) -> None:
  """Ends the interpreter, once it comes to that, without JAX's barrier.

  Args:
    before: called at the very end, when the error has been printed.
  """

  def end():
    before()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)

  # The last to be registered runs first, before that of JAX.
  atexit.register(end)
