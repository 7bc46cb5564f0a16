"""Experiments by name: the files of this repository's experiments/."""

import difflib
import importlib.util
import pathlib
import sys

from t2x.config import experiment

DIRECTORY = pathlib.Path(__file__).resolve().parents[2] / 'experiments'


def path(name: str | None) -> pathlib.Path:
  """Returns the file of an experiment.

  Args:
    name: the name of a file in experiments/, such as `llama2_7b`, or the path
      of any file with a `get_config`.

  Raises:
    ValueError: none is named, there is no such file, or it is no experiment.
  """
  paths = sorted(DIRECTORY.glob('*.py'))
  names = [p.stem for p in paths if _has_config(p)]
  if not name:
    raise ValueError(
      '--experiment=NAME is missing: name a file of experiments/ without its '
      f'.py, one of {", ".join(names)}.'
    )
  given = pathlib.Path(name)
  file = given if given.suffix == '.py' else DIRECTORY / f'{name}.py'
  if not file.is_file():
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    raise ValueError(
      f'--experiment={name}: there is no {file}. Name a file of {DIRECTORY} '
      f'without its .py, or give the path of another.{hint}'
    )
  if not _has_config(file):
    raise ValueError(
      f'--experiment={name}: {file} has no get_config(), so it is a tool and '
      'no experiment.'
    )
  return file


def load(name: str | None) -> experiment.Experiment:
  """Returns the config of an experiment; arguments and errors as for `path`."""
  file = path(name)
  # One may derive from another.
  sys.path.insert(0, str(file.parent))
  spec = importlib.util.spec_from_file_location(file.stem, file)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def _has_config(file: pathlib.Path) -> bool:
  return 'def get_config' in file.read_text()
