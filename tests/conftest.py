"""Eight simulated devices, strict shapes, and a shared compilation cache."""

import collections
import contextlib
import json
import os
import tempfile

import simulated

# Before JAX is imported, by whichever test comes first.
os.environ['XLA_FLAGS'] = simulated.flags(8)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
# Commands that tests start share it, too.
os.environ['JAX_COMPILATION_CACHE_DIR'] = os.path.join(
  tempfile.gettempdir(), 't2x-test-compilation-cache'
)
# Of single operations too: compiling one takes 17 ms, reading it 3.
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
# What one process reads another may be writing; it is compiled then. For the
# commands that tests start; here, pyproject.toml says it.
os.environ['PYTHONWARNINGS'] = ','.join(
  [
    *filter(None, [os.environ.get('PYTHONWARNINGS')]),
    'ignore:Error reading persistent compilation cache entry',
    'ignore:Error writing persistent compilation cache entry',
  ]
)
# Numbers do not depend on LLVM's optimisations; see `_compiled_as_by_users`.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
# XLA carries the lines of Python of each operation along, for an eighth of the
# time that a pipeline takes to compile.
os.environ['JAX_TRACEBACK_IN_LOCATIONS_LIMIT'] = '0'

import gc
import pathlib
import sys

from absl import flags
import extras
import jax
import lowering
import pytest
import skipped
import turns

from t2x.parallel import simulated_devices as t2x_simulated

t2x_simulated.give_threads()

lowering.share_contexts()
lowering.leave_out_open_shardings()

# Tracing makes millions of objects that stay: an eighth of a test's time went
# into looking at them again.
gc.set_threshold(200_000, 20, 50)

_HERE = pathlib.Path(__file__).parent
# Of each file the seconds of its tests, and of those that are not slow; and of
# each test that takes long: as --record-times has measured them, without a
# compilation cache.
_SECONDS = _HERE / 'seconds.json'
_UNKNOWN = [1.0, 1.0]  # Of a file that is not there yet.
# Of --fast, over all workers: two of them, and types, take under 3 minutes.
_FAST_SECONDS = 110

_MAPS = pathlib.Path('/proc/self/maps')  # One a line; of Linux alone.
_MANY_MAPS = 20_000


@pytest.fixture(scope='session', autouse=True)
def _parsed_flags():
  # Grain reads absl flags.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])


# Directories and files whose tests read programs, measure what these copy, keep
# or cost, or compile for accelerators.
_AS_BY_USERS = (
  'attention/test_triton.py',
  'compilation',
  'cost_model',
  'hardware',
  'hlo',
  'layers/test_grouped.py',
  'parallel',
  'planning',
  'training/test_offload.py',
)


@contextlib.contextmanager
def _all_optimizations():
  """Compiles as users do: here, and in commands that are started."""
  name = 'jax_disable_most_optimizations'
  before = jax.config.read(name)
  jax.config.update(name, False)
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv(name.upper(), '0')
    yield
  jax.config.update(name, before)


@pytest.fixture
def compiled_as_by_users():
  with _all_optimizations():
    yield


@pytest.fixture(scope='module', autouse=True)
def _compiled_as_by_users(request):
  """For whole directories; others compile in half the time, see above."""
  path = request.path.relative_to(_HERE)
  if str(path) in _AS_BY_USERS or path.parts[0] in _AS_BY_USERS:
    with _all_optimizations():
      yield
  else:
    yield


@pytest.fixture(scope='module', autouse=True)
def _programs_are_freed():
  """Forgets compiled programs after a file, once there are many.

  Each maps memory some ten times, and Linux lets a process do so 65,530 times
  (vm.max_map_count): the next program ends it with a segmentation fault.
  """
  yield
  if _MAPS.exists() and _MAPS.read_bytes().count(b'\n') > _MANY_MAPS:
    jax.clear_caches()
    gc.collect()  # What is not closed shows here, after its file's last test.


def pytest_addoption(parser):
  parser.addoption(
    '--skipped',
    action='store_true',
    help='only the tests that the last run skipped, as an extra was missing',
  )
  parser.addoption(
    '--all', action='store_true', help='with the tests marked exhaustive'
  )
  parser.addoption(
    '--fast',
    action='store_true',
    help='no slow tests, and the files that take least: '
    f'{_FAST_SECONDS} seconds of them',
  )
  parser.addoption(
    '--turn',
    metavar='COMMIT',
    help='of the tests that take long those alone whose turn is at this commit',
  )
  parser.addoption(
    '--record-times',
    action='store_true',
    help=f'write the seconds of each file to {_SECONDS.name}; with whole files '
    'and a cold compilation cache',
  )


def pytest_configure(config):
  plugin = skipped.Skipped(config, extras.REASON)
  config.pluginmanager.register(plugin, 'skipped')
  if config.getoption('record_times') and not hasattr(config, 'workerinput'):
    config.pluginmanager.register(_Recorder(), 'recorder')


class _Recorder:
  """Notes the seconds of files and long tests, of whichever worker ran them."""

  def __init__(self):
    self._files = collections.defaultdict(lambda: [0.0, 0.0])
    self._tests = {}

  def pytest_runtest_logreport(self, report):
    if 'exhaustive' in report.keywords:
      return
    test = report.nodeid.removeprefix('tests/')
    file = test.partition('::')[0]
    self._files[file][0] += report.duration
    self._files[file][1] += report.duration * ('slow' not in report.keywords)
    if report.when == 'call' and report.duration >= turns.LONG:
      self._tests[test] = report.duration

  def pytest_sessionfinish(self):
    before = json.loads(_SECONDS.read_text())
    files = {
      name: [round(each, 1) for each in pair]
      for name, pair in sorted(
        (before['files'] | self._files).items(), key=lambda i: (-i[1][0], i[0])
      )
      if (_HERE / name).exists()
    }
    # Of files that ran, what this run has measured; of others, what is known.
    tests = self._tests | {
      name: each
      for name, each in before['tests'].items()
      if (file := name.partition('::')[0]) in files and file not in self._files
    }
    tests = {
      name: round(each, 1)
      for name, each in sorted(tests.items(), key=lambda i: (-i[1], i[0]))
    }
    sections = []
    for section, values in (('files', files), ('tests', tests)):
      lines = [
        f'    {json.dumps(n)}: {json.dumps(v)}' for n, v in values.items()
      ]
      sections.append(f'  "{section}": {{\n' + ',\n'.join(lines) + '\n  }')
    _SECONDS.write_text('{\n' + ',\n'.join(sections) + '\n}\n')


def _cheapest(names, seconds):
  """Those of the files that take least, as many as --fast has time for."""
  left, found = _FAST_SECONDS, set()
  for name in sorted(names, key=lambda n: (seconds.get(n, _UNKNOWN)[1], n)):
    left -= seconds.get(name, _UNKNOWN)[1]
    if left < 0:
      break
    found.add(name)
  return found


def pytest_collection_modifyitems(config, items):
  """The longest files first: else one worker ends with one of them alone."""
  recorded = json.loads(_SECONDS.read_text())
  seconds = recorded['files']
  file_of = lambda item: str(item.path.relative_to(_HERE))
  marked = lambda item, name: item.get_closest_marker(name) is not None
  chosen, waiting = items, set()
  if not config.getoption('all'):
    chosen = [i for i in chosen if not marked(i, 'exhaustive')]
  if config.getoption('fast'):
    cheapest = _cheapest({file_of(item) for item in items}, seconds)
    chosen = [
      i for i in chosen if file_of(i) in cheapest and not marked(i, 'slow')
    ]
  if commit := config.getoption('turn'):
    try:
      waiting = turns.waiting(recorded['tests'], commit)
    except ValueError as error:
      raise pytest.UsageError(str(error)) from None
    own = lambda item: item.nodeid.removeprefix('tests/')
    chosen = [i for i in chosen if own(i) not in waiting]
  kept = set(chosen)
  config.hook.pytest_deselected(items=[i for i in items if i not in kept])
  whole = {name: each for name, (each, _) in seconds.items()}
  left = turns.left(whole, recorded['tests'], waiting)
  longest = lambda item: (
    -left.get(file_of(item), _UNKNOWN[0]),
    file_of(item),
  )
  items[:] = sorted(chosen, key=longest)
