"""Every missing extra is named, and what it adds can be run alone."""

import pathlib
import re
import subprocess
import sys

_TESTS = pathlib.Path(__file__).parent

_CONFTEST = """
import skipped

def pytest_addoption(parser):
  parser.addoption('--skipped', action='store_true')

def pytest_configure(config):
  config.pluginmanager.register(skipped.Skipped(config, 'needs the extra'))
"""

_FILE = """
import os
import pytest

if 'whole' in os.path.basename(__file__) and 'FOUND' not in os.environ:
  pytest.skip('needs the extra torch', allow_module_level=True)

def test_that_needs_it():
  if 'FOUND' not in os.environ:
    pytest.skip('needs the extra torch')

def test_that_does_not():
  pass

def test_that_never_runs():
  pytest.skip('another reason')
"""


def run(root, *flags, **env):
  command = [sys.executable, '-m', 'pytest', '-q', *flags]
  env = {'PYTHONPATH': str(_TESTS), 'PATH': '/usr/bin:/bin', **env}
  done = subprocess.run(
    command, cwd=root, capture_output=True, text=True, env=env
  )
  return done.stdout.splitlines()[-1]


def test_what_was_skipped_runs_alone(tmp_path):
  (tmp_path / 'conftest.py').write_text(_CONFTEST)
  for name in ('test_whole_a.py', 'test_whole_b.py', 'test_part.py'):
    (tmp_path / name).write_text(_FILE)
  assert run(tmp_path, '-n', '2').startswith('1 passed, 4 skipped')
  last = run(tmp_path, '--skipped', FOUND='1')
  assert last.startswith('5 passed, 2 skipped')
  # Of its own skips it notes nothing: the whole run's are still known.
  assert run(tmp_path, '--skipped').startswith('3 skipped')


def test_no_test_skips_without_the_name_of_an_extra():
  files = [p for p in _TESTS.rglob('*.py') if p.name != 'extras.py']
  bare = [p for p in files if re.search(r'\.importor' 'skip', p.read_text())]
  assert not bare, f'{bare}: use extras.need(MODULE, extra=EXTRA)'
