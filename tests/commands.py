"""Python commands, each in a process of its own that begins with JAX imported.

Imports take a command three seconds. Here one process imports what commands
need, starts no device, and forks for each command. A command's flags, devices
and modules stay in its own process.
"""

import functools
import gc
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

from t2x.sweeps.launchers import fork_server

_ROOT = pathlib.Path(__file__).parents[1]
_IMPORTED = (
  't2x.main',
  't2x.cost_model.estimate',
  't2x.inference.loading',
  't2x.trainer.train',
)


def run(
  script: str | os.PathLike[str],
  *arguments: str,
  cwd: str | os.PathLike[str] | None = None,
  env: dict[str, str] | None = None,
  seconds: int = 300,
) -> subprocess.CompletedProcess[str]:
  """Runs a script as `python script arguments` would, and waits for its end.

  Args:
    script: path of a Python file, relative to the current directory or whole.
    *arguments: the command's arguments.
    cwd: directory to run in; None for the current one.
    env: the whole environment; None for that of this process.
    seconds: time after which the command is ended by SIGALRM.
  """
  env = dict(os.environ if env is None else env)
  script = os.path.abspath(script)
  settings = {name: v for name, v in env.items() if name.startswith('JAX_')}
  server = _server(tuple(sorted(settings.items())))
  with tempfile.TemporaryDirectory() as directory:
    paths = [os.path.join(directory, name) for name in ('out', 'err')]
    request = {
      'argv': [script, *arguments],
      'cwd': os.path.abspath(cwd or os.getcwd()),
      'env': env,
      'paths': paths,
      'seconds': seconds,
    }
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(json.dumps(request) + '\n')
    server.stdin.flush()
    code = server.stdout.readline()
    assert code, 'the process that forks for commands has ended'
    output = [pathlib.Path(path).read_text(encoding='utf-8') for path in paths]
  return subprocess.CompletedProcess(request['argv'], int(code), *output)


@functools.cache
def _server(settings: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
  """Starts a process whose JAX has these settings from its environment."""
  env = {n: v for n, v in os.environ.items() if not n.startswith('JAX_')}
  env['PYTHONPATH'] = f'{_ROOT}:{_ROOT / "tests"}'
  return subprocess.Popen(
    [sys.executable, __file__],
    env=env | dict(settings),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )


def _next_request() -> dict | None:
  """Forks for each request; returns it in the child, and None at the end."""
  for line in sys.stdin:
    child = os.fork()
    if not child:
      return json.loads(line)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
  return None


def _become(request: dict) -> None:
  """Makes this process look like one that was started for the request."""
  signal.alarm(request['seconds'])
  os.chdir(request['cwd'])
  os.environ.clear()
  os.environ.update(request['env'])
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  for number, path in enumerate(request['paths'], 1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
  sys.argv[:] = request['argv']
  sys.path[0] = os.path.dirname(sys.argv[0])


if __name__ == '__main__':
  for _name in _IMPORTED:
    importlib.import_module(_name)
  importlib.import_module('lowering').share_contexts()
  gc.freeze()  # A child that looks at these objects would copy their pages.
  _request = _next_request()
  if _request is not None:
    _become(_request)
    fork_server.end(fork_server.run_script())
