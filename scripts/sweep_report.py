r"""Writes the report of a sweep's study: a page, and its trials as tables.

python scripts/sweep_report.py --study=DIR [--output=FILE.html]

The page (default DIR/report.html) is one file that needs no network. Its trials
are written beside it as CSV and JSON, under its name. It may be written while
the sweep is running, as often as you like.
"""

import os
import sys

# This process only reads: accelerators are for the runs.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import flags

from t2x import main as main_lib
from t2x.sweeps import report


def main() -> None:
  flags.DEFINE_string('study', None, 'Directory of the study; may be gs://.')
  flags.DEFINE_string(
    'output', None, 'The page, *.html; default report.html in --study.'
  )
  main_lib.app_run(_main)


def _main() -> None:
  values = flags.FLAGS
  if not values.study:
    sys.exit(
      'error: --study is missing: name the directory of a study, as in '
      '--study=studies/first.'
    )
  for path in report.write(values.study, values.output):
    print(path)


if __name__ == '__main__':
  main()
