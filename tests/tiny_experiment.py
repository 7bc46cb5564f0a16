"""tests/tiny.py as a file with get_config(), for tools that look for one."""

import os
import pathlib

import tiny

from t2x import main
from t2x.config import experiment


def get_config() -> experiment.Experiment:
  return tiny.experiment_of(pathlib.Path(os.environ['TINY_DIRECTORY']))


if __name__ == '__main__':
  main.run(get_config)
