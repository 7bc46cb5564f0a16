r"""Runs an experiment as several processes of this machine.

python scripts/launch_local.py --num_processes=2 --devices_per_process=4 -- \
    experiments/quickstart.py --workdir=DIR

It is the real thing: each process simulates its own devices on the CPU and
talks to the others through sockets. The output of process 0 comes as it is,
that of the others line by line behind their number. Ctrl-C and SIGTERM go to
all, which save and end; a second one kills them. If one process dies, the
others have 30 seconds to say so and end before they are killed.
"""

import argparse
import math
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

_GRACE_SECONDS = 30.0
_COUNT = '--xla_force_host_platform_device_count'


def main() -> int:
  args, command = _parse()
  coordinator = f'127.0.0.1:{_free_port()}'
  children: list[subprocess.Popen] = []
  # Before the first child: none is left behind.
  seen: list[int] = []
  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda n, _: _pass_on(n, children, seen))
  readers = []
  for index in range(args.num_processes):
    flags = [
      f'--coordinator={coordinator}',
      f'--num_processes={args.num_processes}',
      f'--process_id={index}',
    ]
    child = subprocess.Popen(
      [sys.executable, *command, *flags],
      env=_environment(args.devices_per_process),
      # A session of its own: a terminal's Ctrl-C reaches it once, from here.
      start_new_session=True,
      stdin=None if index == 0 else subprocess.DEVNULL,
      stdout=None if index == 0 else subprocess.PIPE,
      stderr=None if index == 0 else subprocess.STDOUT,
    )
    children.append(child)
    if index:
      reader = threading.Thread(target=_show, args=(child.stdout, index))
      reader.start()
      readers.append(reader)
  try:
    return _wait(children)
  finally:
    for reader in readers:
      reader.join()


def _parse() -> tuple[argparse.Namespace, list[str]]:
  """Returns the options, and the script with its own arguments."""
  ours, command = _split(sys.argv[1:])
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    usage='%(prog)s --num_processes=N --devices_per_process=N -- SCRIPT ...',
  )
  parser.add_argument('--num_processes', type=int, default=2)
  parser.add_argument('--devices_per_process', type=int, default=4)
  args, unknown = parser.parse_known_args(ours)
  if unknown:
    example = shlex.join([*unknown, *command])
    parser.error(
      f'unrecognized arguments: {shlex.join(unknown)}; the script and its own '
      f'arguments come after --, as in -- {example}'
    )
  for name, value in vars(args).items():
    if value < 1:
      parser.error(f'--{name}={value}; it is at least 1.')
  if not command:
    parser.error(
      'no script: name it after --, as in -- experiments/quickstart.py '
      '--workdir=DIR'
    )
  if not pathlib.Path(command[0]).is_file():
    parser.error(f'{command[0]}: there is no such script.')
  return args, command


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
  if '--' not in arguments:
    return arguments, []
  i = arguments.index('--')
  return arguments[:i], arguments[i + 1 :]


def _environment(num_devices: int) -> dict[str, str]:
  flags = re.sub(rf'{_COUNT}=\S+', '', os.environ.get('XLA_FLAGS', ''))
  root = str(pathlib.Path(__file__).resolve().parents[1])
  path = os.environ.get('PYTHONPATH')
  return {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': f'{flags} {_COUNT}={num_devices}'.strip(),
    'PYTHONPATH': f'{root}:{path}' if path else root,
    'PYTHONUNBUFFERED': '1',
  }


def _free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def _show(stream, index: int) -> None:
  """Copies the output of a process, each line behind its number."""
  prefix = f'[{index}] '.encode()
  for line in stream:
    # The process itself marks what Python writes, and not what C++ does.
    text = line if line.startswith(prefix) else prefix + line
    sys.stderr.buffer.write(text)
    sys.stderr.buffer.flush()


def _wait(children: list[subprocess.Popen]) -> int:
  """Returns the exit code of the run, once all processes have ended."""
  failed = 0
  deadline = math.inf
  running = dict(enumerate(children))
  while running:
    for index, child in list(running.items()):
      code = child.poll()
      if code is None:
        continue
      del running[index]
      if code and not failed:
        failed = code if code > 0 else 128 - code
        deadline = time.monotonic() + _GRACE_SECONDS
        _say(f'process {index} {_how(code)}; the others end too.')
      elif code:
        _say(f'process {index} {_how(code)}.')
    if time.monotonic() > deadline:
      for index, child in running.items():
        _say(f'process {index} has not ended by itself.')
        child.kill()
      deadline = math.inf
    time.sleep(0.1)
  if failed > 128:  # An error of its own would only come again.
    _say(
      'the same command goes on from the last checkpoint, on as many '
      'processes or on fewer.'
    )
  return failed


def _how(code: int) -> str:
  if code > 0:
    return f'ended with exit code {code}'
  try:
    name = f' ({signal.Signals(-code).name})'
  except ValueError:  # A real-time signal.
    name = ''
  return f'was killed by signal {-code}{name}'


def _pass_on(
  number: int, children: list[subprocess.Popen], seen: list[int]
) -> None:
  """Hands a signal on; the second ends what has not heeded the first."""
  first = not seen
  seen.append(number)  # Now: the second may come before the first is said.
  for child in children:
    if child.poll() is None:
      child.send_signal(number if first else signal.SIGKILL)
  if first:
    _say('processes save and end; the same signal again kills them.')


def _say(text: str) -> None:
  print(f'launch_local: {text}', file=sys.stderr, flush=True)


if __name__ == '__main__':
  sys.exit(main())
