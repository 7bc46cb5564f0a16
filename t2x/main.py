"""The command line of every experiment: `main.run(get_config)`."""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import logging
import os
import sys
import traceback
from typing import Any

from absl import app
from absl import flags
from absl import logging as absl_logging

from t2x import files
from t2x import reading
from t2x.config import experiment
from t2x.config import overrides
from t2x.hardware import backends
from t2x.hardware import machines as machines_lib
from t2x.parallel import simulated_devices

flags.disclaim_key_flags()  # They are the script's: --helpshort lists them.

GetConfig = Callable[[], experiment.Experiment]
Machines = Mapping[str, machines_lib.Machine]


def run(get_config: GetConfig, machines: Machines | None = None) -> None:
  """Parses the flags and trains the experiment that `get_config` returns.

  Args:
    get_config: function that returns the experiment.
    machines: the machine that --machine=NAME stands for, by name.
  """
  flags.DEFINE_string('workdir', None, 'Where the run is kept; may be gs://.')
  define_set_flag()
  flags.DEFINE_string(
    'machine',
    None,
    'Where the run is: one of ' + ', '.join(machines)
    if machines
    else 'This experiment lists no machines.',
  )
  flags.DEFINE_string('config', None, 'A saved config.json to start from.')
  flags.DEFINE_bool('print_config', False, 'Print the config and exit.')
  flags.DEFINE_bool(
    'allow_config_change',
    False,
    'Go on with a run although its model, data, optimizer or seed differ.',
  )
  flags.DEFINE_string(
    'profile_steps', None, 'FIRST:LAST step to record for the profiler.'
  )
  flags.DEFINE_string(
    'executable',
    None,
    'File of programs compiled ahead of time, by scripts/compile_step.py. Load '
    'only files that you made.',
  )
  flags.DEFINE_integer(
    'stop_after',
    None,
    'Step after which the run saves and ends; the same command without it goes '
    'on.',
    lower_bound=1,
  )
  define_process_flags()
  app_run(lambda: _train(get_config, machines or {}))


def define_process_flags() -> None:
  """Defines the flags that `joined_processes` reads."""
  flags.DEFINE_string(
    'coordinator',
    None,
    'HOST:PORT of process 0, where a run has several processes. TPU pods, GKE '
    'and SLURM need none of these.',
  )
  flags.DEFINE_integer(
    'num_processes', None, 'Processes of the run; 1 alone asks for no others.'
  )
  flags.DEFINE_integer('process_id', None, 'Of this process, from 0.')
  flags.DEFINE_float(
    'start_timeout', 300.0, 'Seconds for which processes wait for each other.'
  )


def joined_processes() -> contextlib.AbstractContextManager[None]:
  """Joins the processes that the flags name; see `initialization`."""
  from t2x.multihost import initialization

  values = flags.FLAGS
  return initialization.joined_processes(
    coordinator=values.coordinator,
    num_processes=values.num_processes,
    process_id=values.process_id,
    start_seconds=values.start_timeout,
  )


def define_set_flag() -> None:
  """Defines --set, which changes single fields of a config."""
  flags.DEFINE_multi_string('set', [], 'dotted.name=value; may repeat.')


def define_trained_flags() -> None:
  """Defines --workdir, --step and --set of programs that use a trained run."""
  flags.DEFINE_integer('step', None, 'Checkpoint; default the newest.')
  flags.DEFINE_string('workdir', None, 'The run.')
  define_set_flag()


def load_arguments() -> dict[str, Any]:
  """Returns the arguments of `loading.load` from `define_trained_flags`."""
  values = flags.FLAGS
  return {'workdir': workdir(), 'step': values.step, 'settings': values.set}


def define_text_flags() -> None:
  """Defines --text and --text_file; see `texts`."""
  flags.DEFINE_multi_string('text', [], 'A text; may repeat.')
  flags.DEFINE_string('text_file', None, 'One text a line.')


def texts() -> list[str]:
  """Returns the texts of --text and --text_file; see `read_lines`."""
  return read_lines(flags.FLAGS.text, flags.FLAGS.text_file, 'text')


def app_run(main: Callable[[], None]) -> None:
  """Runs `main` under absl; what a user can mend is said in one message."""

  def guarded(argv: Sequence[str]) -> None:
    if argv[1:]:
      sys.exit(
        f'error: unexpected argument {argv[1]!r}; settings are written '
        '--set NAME=VALUE.'
      )
    simulated_devices.give_threads()
    backends.skip_missing_tpu()
    logging.getLogger('t2x').setLevel(logging.INFO)
    if not flags.FLAGS['verbosity'].present:
      # Orbax logs every file that it writes, and with a traceback for each
      # what checkpointer.py reports; --verbosity=0 shows it.
      absl_logging.set_verbosity(absl_logging.FATAL)
      # A full disk fails hundreds of its tasks; the checkpoint says it once.
      logging.getLogger('asyncio').setLevel(logging.CRITICAL)
    try:
      main()
    except OSError as error:  # Disks and permissions are the user's.
      sys.exit(f'error: {error}')
    except (ValueError, RuntimeError) as error:
      if not is_own(error):
        raise
      sys.exit(f'error: {error}')

  app.run(guarded, flags_parser=_parse)


def _parse(argv: Sequence[str]) -> list[str]:
  """As absl does, whose own message spans four lines."""
  for argument in argv:
    try:
      argument.encode()
    except UnicodeEncodeError:  # So Python keeps bytes that are not UTF-8.
      sys.exit(f'error: the argument {argument!r} is not UTF-8.')
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    sys.exit(f'error: {error} (--help lists the flags)')


def is_own(error: BaseException) -> bool:
  """Whether t2x itself raised the error, and not a library under it."""
  frames = traceback.extract_tb(error.__traceback__)
  package = os.path.dirname(os.path.abspath(__file__))
  return os.path.abspath(frames[-1].filename).startswith(package)


def workdir() -> str:
  """Returns --workdir.

  Raises:
    ValueError: it is not given.
  """
  if not flags.FLAGS.workdir:
    raise ValueError(
      '--workdir is missing: name a directory for the run, as in '
      '--workdir=runs/first.'
    )
  return flags.FLAGS.workdir


def read_lines(given: Sequence[str], file: str | None, flag: str) -> list[str]:
  """Returns the texts of --FLAG and those of --FLAG_file, one a line.

  Empty lines are left out; see `reading` for what ends a line.

  Raises:
    ValueError: there is none, no such file, or one that is not UTF-8.
  """
  result = list(given)
  if file is not None:
    path = files.path(file)
    if not path.exists():
      raise ValueError(f'--{flag}_file={file}: there is no such file.')
    lines = reading.lines(path.read_bytes(), f'--{flag}_file={file}')
    result += [line for _, line in lines if line]
  if not result:
    raise ValueError(
      f"There is no {flag}: give --{flag}='...' or --{flag}_file."
    )
  return result


def resolve(
  get_config: GetConfig | None, machine: machines_lib.Machine | None = None
) -> experiment.Experiment:
  """Returns the config with --config, --machine and every --set applied."""
  from t2x.trainer import workdir as workdir_lib

  values = flags.FLAGS
  if values.config:
    config = workdir_lib.load_config(values.config)
  else:
    assert get_config is not None
    config = get_config()
  settings = [*(machine.settings if machine else ()), *values.set]
  return overrides.override(config, overrides.parse_settings(settings))


def use_compilation_cache() -> None:
  """Keeps compiled programs between runs, unless JAX was told where to."""
  import jax

  if jax.config.values['jax_compilation_cache_dir'] is None:
    directory = files.cache_directory() / 'compiled'
    jax.config.update('jax_compilation_cache_dir', str(directory))


def _train(get_config: GetConfig, machines: Machines) -> None:
  name = flags.FLAGS.machine
  machine = machines_lib.find(machines, name) if name else None
  config = resolve(get_config, machine)
  if flags.FLAGS.print_config:
    print(overrides.dumps(config), end='')
    return
  directory = workdir()
  # Imported late, so that --help and --print_config answer sooner.
  import jax

  from t2x.multihost import processes
  from t2x.trainer import train

  values = flags.FLAGS
  use_compilation_cache()
  with joined_processes():
    if machine:
      machines_lib.check(name, machine, jax.devices())
    train.train(
      config,
      directory,
      allow_config_change=values.allow_config_change,
      profile_steps=_steps(values.profile_steps),
      executable=values.executable,
      stop_after=values.stop_after,
    )
  if processes.is_primary():
    print(
      f'The run is in {directory}: report.html, metrics.jsonl, checkpoints/'
    )


def _steps(text: str | None) -> tuple[int, int] | None:
  if text is None:
    return None
  parts: list[Any] = text.split(':')
  if len(parts) != 2 or not all(p.isdigit() for p in parts):
    raise ValueError(
      f'--profile_steps={text!r}; it is FIRST:LAST, as in 10:13.'
    )
  first, last = map(int, parts)
  if not 0 < first <= last:
    raise ValueError(
      f'--profile_steps={text!r}: the first step is at least 1 and not '
      'after the last.'
    )
  return first, last
