"""Eight simulated devices, strict shapes, and a shared compilation cache."""

import collections
import os

import simulated

# Before JAX is imported, by whichever test comes first.
os.environ['XLA_FLAGS'] = simulated.flags(8)
os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'

import gc
import pathlib
import sys
import tempfile

from absl import flags
import extras
import jax
import pytest
import skipped

from t2x.parallel import simulated_devices as t2x_simulated

t2x_simulated.give_threads()

jax.config.update('jax_numpy_rank_promotion', 'raise')
jax.config.update(
  'jax_compilation_cache_dir',
  os.path.join(tempfile.gettempdir(), 't2x-test-compilation-cache'),
)
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
# Tracing makes millions of objects that stay: an eighth of a test's time went
# into looking at them again.
gc.set_threshold(200_000, 20, 50)

_MAPS = pathlib.Path('/proc/self/maps')  # One a line; of Linux alone.
_MANY_MAPS = 20_000


@pytest.fixture(scope='session', autouse=True)
def _parsed_flags():
  # Grain reads absl flags.
  if not flags.FLAGS.is_parsed():
    flags.FLAGS(sys.argv[:1])


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


def pytest_configure(config):
  plugin = skipped.Skipped(config, extras.REASON)
  config.pluginmanager.register(plugin, 'skipped')


def pytest_collection_modifyitems(config, items):
  """Files with slow tests first: else one worker ends with them alone."""
  if not config.getoption('all'):
    left_out = [i for i in items if i.get_closest_marker('exhaustive')]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [i for i in items if not i.get_closest_marker('exhaustive')]
  slow = collections.Counter(
    item.path for item in items if item.get_closest_marker('slow')
  )
  items.sort(key=lambda item: -slow[item.path])
