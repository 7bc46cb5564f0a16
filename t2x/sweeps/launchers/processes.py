"""Processes of runs: their environment, their end, and what they print.

Nothing here imports JAX: it runs where only commands may.
"""

from collections.abc import Sequence
import ctypes
import os
import signal
import sys

COUNT = '--xla_force_host_platform_device_count'
_PARENT_DEATH = 1  # PR_SET_PDEATHSIG of prctl(2).


def environment(directory: str, devices: int | None) -> dict[str, str]:
  """Returns the environment of a run's process.

  Args:
    directory: directory of t2x.
    devices: devices that it simulates on the CPU; None for those that it has.
  """
  path = os.environ.get('PYTHONPATH')
  return {
    **os.environ,
    **simulating(devices),
    'PYTHONPATH': f'{directory}:{path}' if path else directory,
    'PYTHONUNBUFFERED': '1',
  }


def simulating(devices: int | None) -> dict[str, str]:
  """Returns the variables by which JAX simulates so many devices."""
  if devices is None:
    return {}
  others = os.environ.get('XLA_FLAGS', '').split()
  kept = [flag for flag in others if not flag.startswith(COUNT)]
  flags = ' '.join([*kept, f'{COUNT}={devices}'])
  return {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}


def tail(file: str, num_lines: int) -> str:
  """Returns the last lines of a local file; '' if there is no such file."""
  try:
    with open(file, 'rb') as f:
      f.seek(max(f.seek(0, os.SEEK_END) - (1 << 16), 0))
      text = f.read().decode('utf-8', 'replace')
  except FileNotFoundError:
    return ''
  return '\n'.join(text.splitlines()[-num_lines:])


def ending_with(parent: int, command: Sequence[str]) -> list[str]:
  """Returns a command whose process gets SIGTERM once another has ended.

  The run saves then. Without it, a sweep that goes on elsewhere could start a
  second process in the same workdir. The kernel is asked by the process itself,
  before it becomes the command: a fork of a process with threads may hang.

  Args:
    parent: number of this process, which starts the command.
    command: the command line.
  """
  return [sys.executable, '-ISc', _ASK, str(parent), *command]


def end_with_parent() -> None:
  """Lets the kernel send this process SIGTERM once its parent has ended."""
  try:
    prctl = ctypes.CDLL(None).prctl
  except (OSError, AttributeError):  # No Linux.
    return
  prctl(_PARENT_DEATH, signal.SIGTERM)


_ASK = f"""
import ctypes, os, sys
try:
  ctypes.CDLL(None).prctl({_PARENT_DEATH}, {int(signal.SIGTERM)})
except (OSError, AttributeError):
  pass
if os.getppid() != int(sys.argv[1]):
  sys.exit('the process that started this one has ended')
os.execvp(sys.argv[2], sys.argv[2:])
"""


def describe_exit(code: int) -> str:
  """Returns the end of a process in words; negative numbers are signals."""
  if code > 0:
    return f'exit status {code}'
  try:
    return f'signal {-code} ({signal.Signals(-code).name})'
  except ValueError:
    return f'signal {-code}'
