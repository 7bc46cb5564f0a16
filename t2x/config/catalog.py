"""Experiments by name: the files of this repository's experiments/."""

import difflib
import importlib.util
import pathlib
import sys

from t2x.config import experiment

DIRECTORY = pathlib.Path(__file__).resolve().parents[2] / 'experiments'


def load(name: str | None) -> experiment.Experiment:
  """Returns the config of an experiment.

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
  path = given if given.suffix == '.py' else DIRECTORY / f'{name}.py'
  if not path.is_file():
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f' Did you mean {close[0]!r}?' if close else ''
    raise ValueError(
      f'--experiment={name}: there is no {path}. Name a file of {DIRECTORY} '
      f'without its .py, or give the path of another.{hint}'
    )
  if not _has_config(path):
    raise ValueError(
      f'--experiment={name}: {path} has no get_config(), so it is a tool and '
      'no experiment.'
    )
  # One may derive from another.
  sys.path.insert(0, str(path.parent))
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec and spec.loader
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config()


def _has_config(path: pathlib.Path) -> bool:
  return 'def get_config' in path.read_text()
