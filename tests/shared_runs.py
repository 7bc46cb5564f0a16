"""Runs that several test files look at: each is trained once, by one worker."""

import fcntl
import hashlib
import json
import os
import pathlib
from typing import Any

import pytest
import tiny

from t2x.tracking import run_report
from t2x.trainer import train


def trained(
  tmp_path_factory: pytest.TempPathFactory, **settings: Any
) -> pathlib.Path:
  """Returns a directory of data and of a run that no test may change.

  The run, in `run`, was trained to its end with the settings of
  `tiny.experiment_of(directory, **settings)`. Files that ask for the same
  settings share it, in whichever worker they are.
  """
  base = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    base = base.parent
  text = json.dumps(settings, sort_keys=True)
  directory = base / f'shared-{hashlib.sha256(text.encode()).hexdigest()[:12]}'
  directory.mkdir(exist_ok=True)
  with open(directory / 'lock', 'w') as lock, pytest.MonkeyPatch.context() as p:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (directory / 'is_trained').exists():
      p.setattr(run_report, 'write', lambda workdir: None)
      config = tiny.experiment_of(directory, **settings)
      train.train(config, str(directory / 'run'), show=False)
      (directory / 'is_trained').touch()
  return directory
