"""Flags and the way of working that scripts of sweeps share."""

from collections.abc import Callable
import pathlib
import signal

from absl import flags
import jax

from t2x import files
from t2x import main as main_lib
from t2x.config import catalog
from t2x.config import experiment
from t2x.config import overrides
from t2x.hardware import backends
from t2x.sweeps import checks
from t2x.sweeps import definition
from t2x.sweeps import ownership
from t2x.sweeps import points
from t2x.sweeps import scheduler as scheduler_lib
from t2x.sweeps import study as study_lib
from t2x.sweeps import text
from t2x.sweeps.launchers import choice
from t2x.sweeps.launchers import launcher as launcher_lib

flags.disclaim_key_flags()  # They are the script's: --helpshort lists them.

_POLL_SECONDS = 0.1
_MANY = 2000  # Points, whose check takes a while.
_REMOTE_POLL_SECONDS = 10.0  # Of runs whose files are in an object store.


def define() -> None:
  """Defines the flags of the experiment, the study and the launcher.

  This process only plans: accelerators are left to the runs, whose environment
  says nothing of it.
  """
  jax.config.update('jax_platforms', 'cpu')
  flags.DEFINE_string('experiment', None, 'Its name, or a path.')
  flags.DEFINE_string('config', None, 'A saved config.json to start from.')
  flags.DEFINE_string('study', None, 'Directory of the study; may be gs://.')
  flags.DEFINE_string(
    'storage', None, 'Database of the results; default a journal in --study.'
  )
  flags.DEFINE_string('launcher', 'local', 'One of ' + ', '.join(choice.KINDS))
  flags.DEFINE_multi_string('launcher_set', [], 'Its field, NAME=VALUE.')
  flags.DEFINE_integer('parallel', 1, 'Most runs at a time.', lower_bound=1)
  flags.DEFINE_bool('dry_run', False, 'Print what would be run.')
  flags.DEFINE_bool(
    'skip_impossible', False, 'Leave out points that cannot run.'
  )
  main_lib.define_set_flag()


def study_directory() -> str:
  """Returns --study.

  Raises:
    ValueError: it is not given.
  """
  if not flags.FLAGS.study:
    raise ValueError(
      '--study is missing: name a directory for the study, as in '
      '--study=studies/first.'
    )
  given = flags.FLAGS.study
  scheme, there, rest = given.partition('://')
  if there and (scheme != 'gs' or not rest.strip('/')):
    raise ValueError(
      f'--study={given}: a study is in a local directory, or in a bucket of '
      'Google Cloud Storage, as in --study=gs://BUCKET/studies/first.'
    )
  if there and not backends.has_module('gcsfs') and not flags.FLAGS.dry_run:
    raise ValueError(
      f'--study={given} needs gcsfs, which is not installed: bash '
      'scripts/setup.sh sweep gcs.'
    )
  path = files.path(given)
  # Runs are started elsewhere than here, from the project's root.
  return str(path if files.is_remote(path) else path.absolute())


def sweep() -> definition.Sweep:
  """Returns the sweep of --sweep, with --sweep_set applied.

  Raises:
    ValueError: --sweep is missing, or cannot be.
  """
  values = flags.FLAGS
  if not values.sweep:
    raise ValueError(
      '--sweep is missing: name a Python file with get_sweep(), such as '
      'experiments/sweeps/learning_rate.py.'
    )
  return definition.load(values.sweep, values.sweep_set)


def numbers(flag: str) -> list[float]:
  """Returns the numbers of a flag, each above 0.

  Args:
    flag: name of the flag, whose value is a list of texts.

  Raises:
    ValueError: one is no such number.
  """
  return [number(each, flag) for each in flags.FLAGS[flag].value or ()]


def number(given: str, flag: str) -> float:
  """Returns a number above 0 that a flag has, or ValueError."""
  try:
    value = float(given)
  except ValueError:
    value = 0.0
  if not 0 < value < float('inf'):
    raise ValueError(f'--{flag}={given}: it is a number above 0, as 1e14.')
  return value


def launcher() -> launcher_lib.Launcher:
  """Returns the launcher of --launcher and --launcher_set."""
  return choice.make(flags.FLAGS.launcher, flags.FLAGS.launcher_set)


def experiment_of() -> tuple[str, experiment.Experiment, scheduler_lib.Command]:
  """Returns the experiment's name, its config, and how its runs are started."""
  values = flags.FLAGS
  script = catalog.path(values.experiment)
  config = main_lib.resolve(lambda: catalog.load(values.experiment))
  start = ['python', _shown(script)]
  given = []
  if values.config:
    saved = files.path(values.config)
    local = not files.is_remote(saved)
    name = _shown(pathlib.Path(saved).absolute()) if local else values.config
    given.append(f'--config={name}')
  given += [part for setting in values.set for part in ('--set', setting)]

  def command(run: points.RunConfig, workdir: str) -> list[str]:
    own = [
      part
      for name, value in run.settings.items()
      for part in ('--set', f'{name}={value}')
    ]
    more = [f'--stop_after={run.stop_after}'] if run.stop_after else []
    more += ['--allow_config_change'] if run.parent else []
    return [*start, f'--workdir={workdir}', *given, *own, *more]

  return script.stem, config, command


def _shown(script: pathlib.Path) -> str:
  root, script = catalog.DIRECTORY.parent, script.absolute()
  inside = script.is_relative_to(root)
  return str(script.relative_to(root) if inside else script)


def check(
  facts: study_lib.Facts,
  made: launcher_lib.Launcher,
  command: scheduler_lib.Command,
  directory: str,
) -> points.CheckedPoints:
  """Checks a sweep before anything of it runs, or is written.

  Args:
    facts: the experiment and the sweep.
    made: the launcher of its runs.
    command: function from a run and its workdir to its command line.
    directory: directory of the study.

  Returns:
    The points that are known before the first trial.

  Raises:
    ValueError: no run can have the metric, a name or a value is wrong, points
      cannot run and are not to be left out, the launcher cannot run such a
      study, or the directory holds another one.
  """
  sweep = facts.sweep
  _check_given(sweep)
  # A dry run needs no network.
  if not (flags.FLAGS.dry_run and files.is_remote(files.path(directory))):
    study_lib.check(directory, facts)
  checks.check_metric(sweep, facts.config)
  checks.check_pruning(sweep, facts.config)
  checks.check_population(sweep, facts.config)
  if _MANY < sweep.num_points <= points.MOST_POINTS:
    print(f'Checks {sweep.num_points:,} points ...', flush=True)
  checked = points.check(facts.config, sweep, made.devices)
  num = len(checked.possible) + len(checked.wrong)
  if checked.wrong and not (flags.FLAGS.skip_impossible and checked.possible):
    raise ValueError(points.refusal(checked.wrong, num))
  if checked.wrong:
    print(f'{len(checked.wrong)} of {num} points cannot run and are left out.')
  if checked.num_repeated:
    print(
      f'{checked.num_repeated} points repeat others, which run once: '
      f'{num} are different.'
    )
  found = points.candidate(facts.config, sweep, checked.possible[0])
  job = scheduler_lib.job_of(found.runs[0], command, files.path(directory))
  made.render([job])
  return checked


def _check_given(sweep: definition.Sweep) -> None:
  """Raises ValueError if --set sets what the sweep varies."""
  for name in overrides.parse_settings(flags.FLAGS.set):
    for field in sweep.fields:
      if f'{name}.'.startswith(f'{field}.'):
        raise ValueError(
          f'--set {name}=...: the sweep varies {field}. Leave it to the sweep; '
          f'parameters[{field + ", " + name!r}] varies both.'
          if name != field
          else f'--set {name}=...: the sweep varies it. Leave it to the sweep.'
        )


def run(
  facts: study_lib.Facts,
  made: launcher_lib.Launcher,
  command: scheduler_lib.Command,
  directory: str,
) -> tuple[study_lib.Study, int | None]:
  """Works on a study until it is done, or a signal stops it.

  Args:
    facts: the experiment and the sweep.
    made: the launcher of its runs.
    command: function from a run and its workdir to its command line.
    directory: directory of the study.

  Returns:
    The study, and the signal that stopped the work, if one did.
  """
  values = flags.FLAGS
  study = study_lib.create(directory, facts)
  workers = ownership.Workers(study.directory)
  others = workers.others()
  print(f'{text.summary(facts)}; study in {study.directory}')
  if others:
    print(f'Others at work on it: {", ".join(others)}')
  remote = files.is_remote(study.directory)
  scheduler = scheduler_lib.Scheduler(
    study,
    made,
    workers,
    command=command,
    parallel=values.parallel,
    skip_impossible=values.skip_impossible,
    say=lambda line: print(line, flush=True),
    poll_seconds=_REMOTE_POLL_SECONDS if remote else _POLL_SECONDS,
  )
  stopped = _stop_on_signals(scheduler.stop)
  scheduler.run()
  return study, stopped[0] if stopped else None


def _stop_on_signals(stop: Callable[[], None]) -> list[int]:
  """Lets the first signal stop the work, and a second end the process."""
  received: list[int] = []

  def handle(number: int, frame: object) -> None:
    del frame
    received.append(number)
    for each in handled:
      signal.signal(each, signal.SIG_DFL)
    print(
      'Stops: runs save and end. A second signal ends this process at once.',
      flush=True,
    )
    stop()

  handled = (signal.SIGINT, signal.SIGTERM)
  for number in handled:
    signal.signal(number, handle)
  return received
