r"""Runs many trials of an experiment, and keeps them as a study.

python scripts/sweep.py --experiment=gpt2_tiny \
    --sweep=experiments/sweeps/learning_rate.py --study=DIR \
    [--launcher=local] [--parallel=2] [--set NAME=VALUE ...] [--dry_run]

A sweep is a Python file whose get_sweep() says what is varied. Each trial is an
ordinary run, with its workdir in DIR/trials. The same command goes on with a
sweep that was stopped or killed; given twice at a time, two processes share the
trials. --dry_run prints the trials and what would be run, and starts nothing.
--show prints the trials of a study as they stand.
"""

import os
import pathlib
import signal
import sys

# This process only plans: accelerators are for the runs.
os.environ['JAX_PLATFORMS'] = 'cpu'

from absl import flags

from t2x import files
from t2x import main as main_lib
from t2x.config import catalog
from t2x.sweeps import definition
from t2x.sweeps import ownership
from t2x.sweeps import points
from t2x.sweeps import scheduler as scheduler_lib
from t2x.sweeps import study as study_lib
from t2x.sweeps import text
from t2x.sweeps.launchers import choice


def main() -> None:
  flags.DEFINE_string('experiment', None, 'Its name, or a path.')
  flags.DEFINE_string('config', None, 'A saved config.json to start from.')
  flags.DEFINE_string('sweep', None, 'A Python file with get_sweep().')
  flags.DEFINE_multi_string('sweep_set', [], 'Field of the sweep, NAME=VALUE.')
  flags.DEFINE_string('study', None, 'Directory of the study; may be gs://.')
  flags.DEFINE_string(
    'storage', None, 'Database of the results; default a journal in --study.'
  )
  flags.DEFINE_string('launcher', 'local', 'One of ' + ', '.join(choice.KINDS))
  flags.DEFINE_multi_string('launcher_set', [], 'Its field, NAME=VALUE.')
  flags.DEFINE_integer('parallel', 1, 'Most runs at a time.', lower_bound=1)
  flags.DEFINE_bool('dry_run', False, 'Print what would be run.')
  flags.DEFINE_bool('show', False, 'Print the trials of --study.')
  flags.DEFINE_bool(
    'skip_impossible', False, 'Leave out points that cannot run.'
  )
  main_lib.define_set_flag()
  main_lib.app_run(_main)


def _main() -> None:
  values = flags.FLAGS
  if values.show:
    print(text.table(study_lib.read(_study_directory())))
    return
  facts, command = _facts()
  sweep = facts.sweep
  launcher = choice.make(values.launcher, values.launcher_set)
  scheduler_lib.check_metric(sweep, facts.config)
  wrong = points.check(facts.config, sweep, launcher.devices)
  if wrong and not values.skip_impossible:
    raise ValueError(points.refusal(wrong, sweep.num_points))
  if values.dry_run:
    print(text.plan(facts, launcher, command, _study_directory()))
    return
  launcher.check()
  study = study_lib.create(_study_directory(), facts)
  workers = ownership.Workers(study.directory)
  others = workers.others()
  print(f'{text.summary(facts)}; study in {study.directory}')
  if others:
    print(f'Others at work on it: {", ".join(others)}')
  scheduler = scheduler_lib.Scheduler(
    study,
    launcher,
    workers,
    command=command,
    parallel=values.parallel,
    skip_impossible=values.skip_impossible,
    say=lambda line: print(line, flush=True),
  )
  stopped = []

  def stop(number, frame) -> None:
    del frame
    if stopped:
      signal.signal(number, signal.SIG_DFL)
    stopped.append(number)
    scheduler.stop()

  for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
  try:
    scheduler.run()
  finally:
    launcher.close()
  print()
  print(text.table(study))
  if stopped:
    print('Stopped; the same command goes on.')
    sys.exit(128 + stopped[0])


def _study_directory() -> str:
  if not flags.FLAGS.study:
    raise ValueError(
      '--study is missing: name a directory for the study, as in '
      '--study=studies/first.'
    )
  return str(files.path(flags.FLAGS.study).expanduser())


def _facts() -> tuple[study_lib.Facts, scheduler_lib.Command]:
  """Returns what the study is of, and how its runs are started."""
  values = flags.FLAGS
  if not values.sweep:
    raise ValueError(
      '--sweep is missing: name a Python file with get_sweep(), such as '
      'experiments/sweeps/learning_rate.py.'
    )
  script = catalog.path(values.experiment)
  config = main_lib.resolve(lambda: catalog.load(values.experiment))
  sweep = definition.load(values.sweep, values.sweep_set)
  facts = study_lib.Facts(
    experiment=script.stem, config=config, sweep=sweep, storage=values.storage
  )
  start = ['python', _shown(script)]
  given = [f'--config={values.config}'] if values.config else []
  given += [part for setting in values.set for part in ('--set', setting)]

  def command(run: points.RunConfig, workdir: str) -> list[str]:
    own = [
      part
      for name, value in run.settings.items()
      for part in ('--set', f'{name}={value}')
    ]
    return [*start, f'--workdir={workdir}', *given, *own]

  return facts, command


def _shown(script: pathlib.Path) -> str:
  root = catalog.DIRECTORY.parent
  inside = script.is_relative_to(root)
  return str(script.relative_to(root) if inside else script)


if __name__ == '__main__':
  main()
