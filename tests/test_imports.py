"""What importing costs, and which file may import which."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest
import tiny

_ROOT = pathlib.Path(__file__).parents[1]

# The packages (and the files beside them) by floor: each imports from those of
# earlier lines and from its own package, and never from its neighbours.
_FLOORS = (
  'field_checks files multihost parallel',
  'attention hardware objectives reading',
  'data layers tracking',
  'models',
  'decode losses',
  'pipeline',
  'hlo training',
  'config',
  'compilation cost_model interop',
  'trainer',
  'inference main verification',
  'planning serving sweeps',
)
# The packages that say what is computed know nothing of where it is, nor of
# each other's business.
_FORBIDDEN = {
  'decode': {'data', 'objectives'},
  'layers': {'objectives'},
  'losses': {'data'},
}
# Of a package that may otherwise import `parallel`: not the device mesh.
_MESHLESS = {'attention', 'layers', 'models', 'losses', 'training'}


def _part(path):
  parts = path.relative_to(_ROOT / 't2x').with_suffix('').parts
  return parts[0]


def _modules(path):
  """Yields what of t2x a file imports, dotted, late imports included."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      modules = [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Import):
      modules = [alias.name for alias in node.names]
    else:
      continue
    for module in modules:
      if module.startswith('t2x.'):
        yield module


def _files():
  return sorted((_ROOT / 't2x').rglob('*.py'))


def test_every_package_imports_from_lower_floors():
  floors = {n: i for i, line in enumerate(_FLOORS) for n in line.split()}
  wrong = []
  for path in _files():
    part = _part(path)
    imported = list(_modules(path))
    if path.stem == '__init__':
      assert not imported, f'{path}: a package imports nothing by itself'
      continue
    assert part in floors, f'{path} has no place on a floor'
    for module in imported:
      other = module.split('.')[1]
      upwards = other != part and floors[other] >= floors[part]
      mesh = module == 't2x.parallel.mesh' and part in _MESHLESS
      if upwards or mesh or other in _FORBIDDEN.get(part, ()):
        wrong.append(f'{path.relative_to(_ROOT)} imports {module}')
  assert not wrong, wrong
  assert len(_files()) > 50


def test_no_circle_of_imports():
  name = lambda path: '.'.join(path.relative_to(_ROOT).with_suffix('').parts)
  imported = {name(path): set(_modules(path)) for path in _files()}
  # CycleError names the circle.
  assert list(graphlib.TopologicalSorter(imported).static_order())


def test_few_files_lie_at_the_top():
  top = {path.stem for path in (_ROOT / 't2x').glob('*.py')}
  assert top == {'__init__', 'field_checks', 'files', 'main', 'reading'}


def test_packages_say_what_they_are_for():
  for folder in (_ROOT / 't2x').iterdir():
    if any(folder.glob('*.py')):
      text = (folder / '__init__.py').read_text()
      assert ast.get_docstring(ast.parse(text)), folder


def test_heavy_libraries_are_never_imported():
  banned = {'tensorflow', 'torch', 'transformers', 'libtpu', 'torch_xla'}
  for path in [*_files(), *sorted((_ROOT / 'experiments').glob('*.py'))]:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Import):
        names = {alias.name.partition('.')[0] for alias in node.names}
      elif isinstance(node, ast.ImportFrom):
        names = {(node.module or '').partition('.')[0]}
      else:
        continue
      assert not names & banned, f'{path} imports {names & banned}'


_TOUCH = """
import importlib, pkgutil, sys, time
import jax, flax.nnx
start = time.perf_counter()
import t2x
light = time.perf_counter() - start
for module in pkgutil.walk_packages(t2x.__path__, 't2x.'):
  importlib.import_module(module.name)
from jax._src import xla_bridge
assert not xla_bridge._backends, 'a device was touched'
heavy = {'tensorflow', 'torch', 'libtpu', 'matplotlib', 'transformers'}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
assert light < 1.0, light
assert time.perf_counter() - start < 20.0
"""


def test_importing_everything_touches_no_device():
  done = subprocess.run(
    [sys.executable, '-c', _TOUCH], cwd=_ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr


_BLOCKED = """
import importlib.machinery, os, pathlib, sys

blocked = ('tensorflow', 'torch', 'transformers')
finder = importlib.machinery.PathFinder

class Hiding:
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] not in blocked:
      return finder.find_spec(name, path, target)

  def find_distributions(self, context):
    return finder.find_distributions(context)

sys.meta_path[sys.meta_path.index(finder)] = Hiding()
for name in blocked:
  try:
    __import__(name)
  except ImportError:
    continue
  raise AssertionError(name)
import tiny
from absl import flags
from t2x.inference import generation, loading
from t2x.trainer import train
flags.FLAGS(sys.argv[:1])
config = tiny.experiment_of(
  pathlib.Path(os.environ['TINY_DIRECTORY']), train__num_steps=2
)
train.train(config, sys.argv[1], show=False)
trained = loading.load(sys.argv[1])
text = generation.generate_text(trained, ['the run'], num_tokens=3)
assert len(text) == 1
assert not set(blocked) & set(sys.modules)
"""


@pytest.mark.slow
def test_a_run_needs_neither_tensorflow_nor_torch(tmp_path):
  script = tmp_path / 'blocked.py'
  script.write_text(_BLOCKED)
  process = tiny.start(tmp_path, str(tmp_path / 'run'), script=str(script))
  _, error = process.communicate(timeout=180)
  assert process.returncode == 0, error
  assert len(tiny.losses(tmp_path / 'run')) == 2
  assert (tmp_path / 'run' / 'report.html').exists()
