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
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0.3'
# Numbers do not depend on LLVM's optimisations; see `_compiled_as_by_users`.
os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'

import gc
import pathlib
import sys

from absl import flags
import extras
import jax
import pytest
import skipped

from t2x.parallel import simulated_devices as t2x_simulated

t2x_simulated.give_threads()

# Tracing makes millions of objects that stay: an eighth of a test's time went
# into looking at them again.
gc.set_threshold(200_000, 20, 50)

_HERE = pathlib.Path(__file__).parent
# Seconds of each file, with setup, where --record-times has measured them.
_SECONDS = _HERE / 'seconds.json'

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
    '--record-times',
    action='store_true',
    help=f'write the seconds of each file that runs to {_SECONDS.name}',
  )


def pytest_configure(config):
  plugin = skipped.Skipped(config, extras.REASON)
  config.pluginmanager.register(plugin, 'skipped')
  if config.getoption('record_times') and not hasattr(config, 'workerinput'):
    config.pluginmanager.register(_Recorder(), 'recorder')


class _Recorder:
  """Adds up the seconds of each file, of whichever worker has run it."""

  def __init__(self):
    self._seconds = collections.Counter()

  def pytest_runtest_logreport(self, report):
    name = report.nodeid.partition('::')[0].removeprefix('tests/')
    self._seconds[name] += report.duration

  def pytest_sessionfinish(self):
    recorded = {n: round(s, 1) for n, s in self._seconds.items()}
    seconds = json.loads(_SECONDS.read_text()) | recorded
    there = {n: s for n, s in seconds.items() if (_HERE / n).exists()}
    ordered = sorted(there.items(), key=lambda item: (-item[1], item[0]))
    _SECONDS.write_text(json.dumps(dict(ordered), indent=2) + '\n')


def pytest_collection_modifyitems(config, items):
  """The longest files first: else one worker ends with one of them alone."""
  if not config.getoption('all'):
    left_out = [i for i in items if i.get_closest_marker('exhaustive')]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [i for i in items if not i.get_closest_marker('exhaustive')]
  seconds = json.loads(_SECONDS.read_text())
  of_file = lambda item: seconds.get(str(item.path.relative_to(_HERE)), 0.0)
  items.sort(key=lambda item: -of_file(item))
