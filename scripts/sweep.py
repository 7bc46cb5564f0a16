r"""Runs many trials of an experiment, and keeps them as a study.

python scripts/sweep.py --experiment=gpt2_tiny \
    --sweep=experiments/sweeps/learning_rate.py --study=DIR \
    [--launcher=local] [--parallel=2] [--set NAME=VALUE ...] [--dry_run]

A sweep is a Python file whose get_sweep() says what is varied. Each trial is an
ordinary run, with its workdir in DIR/trials. The same command goes on with a
sweep that was stopped or killed; given twice at a time, two processes share the
trials. --dry_run prints the trials and what would be run, and starts nothing.
--show prints the trials of a study as they stand. The exit status is 1 if a
trial has failed.
"""

import sys

from absl import flags

from t2x import main as main_lib
from t2x.sweeps import command_line
from t2x.sweeps import study as study_lib
from t2x.sweeps import text


def main() -> None:
  command_line.define()
  flags.DEFINE_string('sweep', None, 'A Python file with get_sweep().')
  flags.DEFINE_multi_string('sweep_set', [], 'Field of the sweep, NAME=VALUE.')
  flags.DEFINE_bool('show', False, 'Print the trials of --study.')
  main_lib.app_run(_main)


def _main() -> None:
  values = flags.FLAGS
  directory = command_line.study_directory()
  if values.show:
    print(text.table(study_lib.read(directory)))
    return
  sweep = command_line.sweep()
  name, config, command = command_line.experiment_of()
  facts = study_lib.Facts(
    experiment=name,
    config=config,
    sweep=sweep,
    storage=values.storage,
  )
  launcher = command_line.launcher()
  checked = command_line.check(facts, launcher, command, directory)
  if values.dry_run:
    print(text.plan(facts, launcher, command, directory, checked))
    return
  launcher.check()
  try:
    study, stopped = command_line.run(facts, launcher, command, directory)
  finally:
    launcher.close()
  print()
  print(text.table(study))
  if stopped is not None:
    print('Stopped; the same command goes on.')
    sys.exit(128 + stopped)
  if any(trial.state == 'failed' for trial in study.trials()):
    sys.exit(1)


if __name__ == '__main__':
  main()
