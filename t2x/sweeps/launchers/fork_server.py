"""A process that has imported what runs need, and forks for each of them.

Imports take a run some seconds, and a core. Here they are done once: a child
that is forked for a run becomes the process that `python SCRIPT ARGUMENTS`
would be. No device is touched before the fork.

It reads a JSON line for each run from its standard input (argv, cwd, env, log,
locks), and writes one when a child has started and one when it has ended.
"""

import atexit
from collections.abc import Sequence
import dataclasses
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import traceback
from typing import Any

from t2x.sweeps.launchers import accelerators
from t2x.sweeps.launchers import processes

_IMPORTED = (
  't2x.main',
  't2x.trainer.train',
  'tensorboardX.event_file_writer',
)
_LOOK_SECONDS = 0.02  # Between two looks for children that have ended.
_START_SECONDS = 120.0


@dataclasses.dataclass
class _Child:
  """A child, as its server tells of it.

  Attributes:
    code: exit status, negative for a signal; None while it runs.
  """

  code: int | None = None


class ForkServer:
  """The server as its client sees it."""

  def __init__(self, environment: dict[str, str]):
    """Starts it; it ends with this process, and its children with it.

    Args:
      environment: the environment in which modules are imported.
    """
    command = [sys.executable, '-m', 't2x.sweeps.launchers.fork_server']
    self._process = subprocess.Popen(
      processes.ending_with(os.getpid(), command),
      env=environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.DEVNULL,
      start_new_session=True,
      text=True,
    )
    self._children: dict[int, _Child] = {}
    self._started: list[int] = []
    self._changed = threading.Condition()
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self) -> None:
    assert self._process.stdout is not None
    for line in self._process.stdout:
      said = json.loads(line)
      with self._changed:
        if 'started' in said:
          self._children[said['started']] = _Child()
          self._started.append(said['started'])
        else:
          self._children[said['ended']].code = said['code']
        self._changed.notify_all()
    with self._changed:
      self._changed.notify_all()

  def start(
    self,
    argv: list[str],
    *,
    cwd: str,
    env: dict[str, str],
    log: str,
    locks: Sequence[str] = (),
  ) -> int:
    """Starts a run and returns its process.

    Args:
      argv: path of the script, and its arguments.
      cwd: directory in which it runs.
      env: its environment.
      log: file that its output is added to.
      locks: files of locks that this process holds, in which it takes a part.

    Raises:
      OSError: the server has ended.
    """
    assert self._process.stdin is not None
    request = {
      'argv': argv,
      'cwd': cwd,
      'env': env,
      'log': log,
      'locks': list(locks),
    }
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    with self._changed:
      is_there = lambda: self._started or not self.is_alive
      if not self._changed.wait_for(is_there, timeout=_START_SECONDS):
        self._process.kill()  # What it starts now would have no owner.
      if not self._started:
        raise OSError('the process that forks for runs has ended')
      return self._started.pop()

  @property
  def is_alive(self) -> bool:
    """Whether it can start runs."""
    return self._reader.is_alive()

  def has(self, process: int) -> bool:
    """Whether a process was started here."""
    return process in self._children

  def code_of(self, process: int) -> int | None:
    """Returns a child's exit status, negative for a signal; None while it runs.

    A child whose server has ended is told to end by the kernel.
    """
    code = self._children[process].code
    if code is None and not self.is_alive:
      return -signal.SIGTERM
    return code

  def close(self) -> None:
    """Ends the server; children that run are told to end."""
    assert self._process.stdin is not None
    try:
      self._process.stdin.close()
    except BrokenPipeError:
      pass
    self._process.wait()
    self._reader.join()
    assert self._process.stdout is not None
    self._process.stdout.close()


def _serve() -> dict[str, Any] | None:
  """Forks for each request; returns it in the child, and None at the end."""
  own = os.getpid()
  buffer = b''
  while True:
    ready, _, _ = select.select([0], [], [], _LOOK_SECONDS)
    _reap()
    if not ready:
      continue
    data = os.read(0, 1 << 16)
    if not data:
      return None
    *lines, buffer = (buffer + data).split(b'\n')
    for line in lines:
      child = os.fork()
      if not child:
        processes.end_with_parent()
        if os.getppid() != own:  # It ended before the kernel was asked.
          os._exit(1)
        return json.loads(line)
      print(json.dumps({'started': child}), flush=True)


def _reap() -> None:
  while True:
    try:
      child, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
      return
    if not child:
      return
    code = os.waitstatus_to_exitcode(status)
    print(json.dumps({'ended': child, 'code': code}), flush=True)


def become(request: dict[str, Any]) -> None:
  """Makes this process look like one that was started for a request."""
  os.setsid()
  accelerators.share(request['locks'])
  os.chdir(request['cwd'])
  os.environ.clear()
  os.environ.update(request['env'])
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
  log = os.open(request['log'], flags, 0o644)
  os.dup2(log, 1)
  os.dup2(log, 2)
  sys.argv[:] = request['argv']
  sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))


def run_script() -> int:
  """Runs the script of `sys.argv`; returns the exit status of Python's."""
  try:
    runpy.run_path(sys.argv[0], run_name='__main__')
  except SystemExit as end:
    if isinstance(end.code, str):
      print(end.code, file=sys.stderr)
      return 1
    return end.code or 0
  except BaseException:
    traceback.print_exc()
    return 1
  return 0


def end(code: int) -> None:
  """Ends this process as Python would, without taking modules apart."""
  # Pools of threads end by hooks that it calls.
  threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
  atexit._run_exitfuncs()
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code)


def _main() -> None:
  for name in _IMPORTED:
    importlib.import_module(name)
  gc.freeze()  # A child that looks at these objects would copy their pages.
  request = _serve()
  if request is not None:
    become(request)
    end(run_script())


if __name__ == '__main__':
  _main()
