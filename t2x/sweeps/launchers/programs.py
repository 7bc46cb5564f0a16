"""Programs of others that launchers call: sbatch, kubectl, gcloud, sky."""

from collections.abc import Mapping
from collections.abc import Sequence
import pathlib
import shlex
import shutil
import subprocess

from t2x.sweeps.launchers import launcher

_MOST_SHOWN = 500  # Characters of what a program says.
_SECONDS = 120.0


def need(name: str, remedy: str) -> None:
  """Raises ValueError if there is no such program.

  Args:
    name: name of the program.
    remedy: sentence on where it comes from.
  """
  if shutil.which(name) is None:
    raise ValueError(f'there is no program {name!r} on PATH. {remedy}')


def call(
  command: Sequence[str],
  *,
  stdin: str | None = None,
  env: Mapping[str, str] | None = None,
  cwd: pathlib.Path | None = None,
  seconds: float = _SECONDS,
) -> str:
  """Runs a program and returns what it prints.

  Args:
    command: program and arguments.
    stdin: text of its standard input; None for none.
    env: its environment; None for this process's.
    cwd: directory in which it runs; None for this process's.
    seconds: limit of its time.

  Raises:
    LaunchError: it fails, or is not done in time.
  """
  shown = shlex.join(command[:4]) + (' ...' if len(command) > 4 else '')
  try:
    done = subprocess.run(
      command,
      input=stdin or '',
      capture_output=True,
      text=True,
      timeout=seconds,
      env=env,
      cwd=cwd,
    )
  except FileNotFoundError as error:
    raise launcher.LaunchError(f'{shown}: there is no such program') from error
  except subprocess.TimeoutExpired as error:
    raise launcher.LaunchError(
      f'{shown}: no answer within {seconds:.0f} s'
    ) from error
  if done.returncode:
    said = (done.stderr or done.stdout).strip()[-_MOST_SHOWN:]
    raise launcher.LaunchError(
      f'{shown}: exit status {done.returncode}: {said}'
    )
  return done.stdout
