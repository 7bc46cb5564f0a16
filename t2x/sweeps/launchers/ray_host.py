"""An actor of Ray that looks after a run's process on one host.

JAX is imported by the process alone: in the actor it would hold the TPU.
"""

# The extra `ray` may be absent where types are checked.
# pyright: reportMissingImports=false

import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time

from t2x.sweeps.launchers import processes


class Host:
  """An actor: a run's process on one host."""

  def __init__(self, directory: str):
    self._directory = directory
    self._child: subprocess.Popen[bytes] | None = None
    self._log = pathlib.Path(tempfile.gettempdir(), f't2x-{os.getpid()}.log')

  def address(self) -> str:
    """Returns HOST:PORT, a free port of this host."""
    import ray

    with socket.socket() as s:
      s.bind(('', 0))
      return f'{ray.util.get_node_ip_address()}:{s.getsockname()[1]}'

  def start(
    self, command: list[str], devices: int | None, more: dict[str, str]
  ) -> None:
    """Starts the process.

    Args:
      command: its command line.
      devices: devices that it simulates; None for those of the host.
      more: further variables of its environment.
    """
    environment = processes.environment(self._directory, devices) | more
    if command[0] == 'python':
      command = [sys.executable, *command[1:]]
    with open(self._log, 'wb') as log:
      self._child = subprocess.Popen(
        processes.ending_with(os.getpid(), command),
        cwd=self._directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
      )

  def status(self) -> int | None:
    """Returns the exit status, or None while the process runs."""
    assert self._child is not None
    return self._child.poll()

  def tail(self, num_lines: int) -> str:
    """Returns the last lines that the process has printed."""
    return processes.tail(str(self._log), num_lines)

  def ask_to_end(self) -> None:
    """Sends SIGTERM, upon which the run saves."""
    if self._child is not None and self._child.poll() is None:
      self._child.terminate()

  def stop(self, grace_seconds: float) -> None:
    """Ends the process, which has so long to save."""
    if self._child is None:
      return
    self.ask_to_end()
    deadline = time.monotonic() + grace_seconds
    while self._child.poll() is None and time.monotonic() < deadline:
      time.sleep(0.05)
    if self._child.poll() is None:
      self._child.kill()
    self._log.unlink(missing_ok=True)
