"""Stand-ins for SLURM's programs, which run array tasks as local processes.

`install(directory)` writes sbatch, srun, squeue, scancel and scontrol. A queue
is a directory: a file ID_TASK.state with PENDING or RUNNING for each task.
"""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

_NAMES = ('sbatch', 'srun', 'squeue', 'scancel', 'scontrol')


def install(directory: pathlib.Path) -> None:
  """Writes the programs into a directory, for PATH."""
  directory.mkdir(parents=True, exist_ok=True)
  (directory / 'queue').mkdir()
  for name in _NAMES:
    file = directory / name
    file.write_text(
      f'#!/bin/bash\nexec {sys.executable} -S -E {__file__} {name} "$@"\n'
    )
    file.chmod(0o755)


def _queue() -> pathlib.Path:
  return pathlib.Path(os.environ['SLURM_STAND_IN']) / 'queue'


def sbatch(arguments: list[str]) -> None:
  script = sys.stdin.read()
  array = len([*_queue().glob('*.sh')]) + 1
  file = _queue() / f'{array}.sh'
  file.write_text(script)
  match = re.search(r'--array=0-(\d+)', script)
  assert match and '--parsable' in arguments
  for task in range(int(match[1]) + 1):
    name = f'{array}_{task}'
    (_queue() / f'{name}.state').write_text('PENDING')
    subprocess.Popen(
      [sys.executable, '-S', '-E', __file__, 'node', str(file), name],
      start_new_session=True,
      stdin=subprocess.DEVNULL,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL,
    )
  print(f'{array};cluster')


def node(arguments: list[str]) -> None:
  """Runs a task, again as often as it is queued again."""
  file, name = arguments
  array, _, task = name.partition('_')
  state = _queue() / f'{name}.state'
  again = _queue() / f'{name}.again'
  while True:
    state.write_text('RUNNING')
    environment = {
      **os.environ,
      'SLURM_ARRAY_JOB_ID': array,
      'SLURM_ARRAY_TASK_ID': task,
    }
    subprocess.run(['bash', file], env=environment)
    if not again.exists():
      break
    again.unlink()
    state.write_text('PENDING')
    time.sleep(0.1)
  state.unlink()


def srun(arguments: list[str]) -> None:
  log = None
  while arguments[0].startswith('--'):
    option = arguments.pop(0)
    if option.startswith('--output='):
      log = option.partition('=')[2]
  assert log
  name = '{SLURM_ARRAY_JOB_ID}_{SLURM_ARRAY_TASK_ID}'.format(**os.environ)
  with open(log, 'ab') as f:
    child = subprocess.Popen(arguments, stdout=f, stderr=f)
  (_queue() / f'{name}.process').write_text(str(child.pid))
  sys.exit(child.wait())


def squeue(arguments: list[str]) -> None:
  assert '--noheader' in arguments and '--array' in arguments
  for file in sorted(_queue().glob('*.state')):
    array = file.stem.partition('_')[0]
    script = (_queue() / f'{array}.sh').read_text()
    comment = re.search(r'--comment=(.*)', script)
    shown = {
      '--format=%i|%T': f'{file.stem}|{file.read_text()}',
      '--format=%F|%k': f'{array}|{comment[1] if comment else "(null)"}',
    }
    print(*[shown[argument] for argument in arguments if argument in shown])


def scancel(arguments: list[str]) -> None:
  (name,) = arguments
  file = _queue() / f'{name}.process'
  (_queue() / f'{name}.cancelled').touch()
  if file.exists():
    try:
      os.kill(int(file.read_text()), signal.SIGTERM)
    except ProcessLookupError:
      pass


def scontrol(arguments: list[str]) -> None:
  what, name = arguments
  assert what == 'requeue'
  if (_queue() / f'{name}.cancelled').exists():
    sys.exit('Requested operation is presently disabled')
  (_queue() / f'{name}.again').touch()


if __name__ == '__main__':
  globals()[sys.argv[1]](sys.argv[2:])
