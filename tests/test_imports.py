"""What importing costs, and which file may import which."""

import ast
import pathlib
import subprocess
import sys

import pytest
import tiny

_ROOT = pathlib.Path(__file__).parents[1]

# Each file imports from those of earlier lines, and of its own. It is the
# order of the design, with what came since: `stack` stands below the models;
# an experiment's config names the mesh and the step, `program` compiles it.
_ORDER = (
  (
    'backends',
    'config',
    'checks',
    'sharding',
    'shards',
    'torus',
    'simulated',
    'mesh',
    'paths',
    'reading',
    'zigzag',
  ),
  ('xla_options', 'machines'),
  ('gpu_targets', 'topologies'),
  ('processes', 'last_words', 'watch', 'stragglers', 'cluster'),
  ('attention', 'layers'),
  ('stack',),
  ('models',),
  ('fused_loss',),
  ('loss', 'loss_masking', 'task_weights', 'objectives'),
  ('optim', 'optim_state'),
  ('data', 'decode'),
  ('framing',),
  ('streaming', 'keywords', 'postprocess'),
  ('balance', 'scheduled_sampling'),
  ('flops',),
  ('pipeline',),
  ('train_state',),
  ('train_step', 'evaluate'),
  ('experiment', 'interop', 'plan'),
  ('on_mesh',),
  ('changes', 'objective_checks'),
  ('consistency',),
  ('catalog',),
  ('checkpoint', 'checkpoint_files', 'charts', 'progress', 'report_page'),
  ('checked',),
  ('metrics', 'program', 'run_dir'),
  ('report', 'layouts', 'layout_text', 'absent', 'fingerprint', 'traced'),
  ('estimate',),
  ('executables',),
  ('sharding_table', 'sharding_drawing', 'sharding_page'),
  ('plan_memory', 'planning', 'plan_search', 'plan_remedy'),
  ('plan_advice', 'plan_text', 'plan_page'),
  ('plan_trials',),
  ('estimate_text',),
  ('run', 'trained'),
  ('inference',),
  ('conversion', 'encoding', 'calibration', 'control'),
  ('steering', 'artefact', 'artefact_run'),
  ('uncertainty', 'serving'),
  ('train',),
  ('deviation', 'verify', 'verify_report'),
  ('main',),
  ('target_flags',),
)
# The packages that say what is computed know nothing of where it is.
_FORBIDDEN = {
  'attention': {'layers'},
  'objectives': {'data', 'optim', 'loss', 'decode'},
  'loss': {'data', 'optim', 'objectives', 'decode'},
  'optim': {'data', 'objectives', 'decode', 'loss'},
  'decode': {'data', 'optim', 'objectives', 'loss'},
  'layers': {'mesh'},
  'models': {'mesh'},
  'train_state': {'mesh', 'data'},
  'train_step': {'mesh', 'data'},
}


def _part(path):
  parts = path.relative_to(_ROOT / 't2x').with_suffix('').parts
  return parts[0]


def _imports(path):
  """Yields the parts of t2x that a file imports, late imports included."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      modules = [f'{node.module}.{alias.name}' for alias in node.names]
    elif isinstance(node, ast.Import):
      modules = [alias.name for alias in node.names]
    else:
      continue
    for module in modules:
      names = module.split('.')
      if names[0] == 't2x' and len(names) > 1:
        yield names[1]


def _files():
  return sorted((_ROOT / 't2x').rglob('*.py'))


def test_every_file_imports_from_its_left():
  ranks = {name: i for i, line in enumerate(_ORDER) for name in line}
  wrong = []
  for path in _files():
    part = _part(path)
    if part == '__init__':
      assert not list(_imports(path))
      continue
    assert part in ranks, f'{path} has no place in the order'
    for other in _imports(path):
      if ranks[other] > ranks[part] or other in _FORBIDDEN.get(part, ()):
        wrong.append(f'{path.relative_to(_ROOT)} imports {other}')
  assert not wrong, wrong
  assert len(_files()) > 50


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
from t2x import inference, train
flags.FLAGS(sys.argv[:1])
config = tiny.experiment_of(
  pathlib.Path(os.environ['TINY_DIRECTORY']), train__num_steps=2
)
train.train(config, sys.argv[1], show=False)
trained = inference.load(sys.argv[1])
text = inference.generate_text(trained, ['the run'], num_tokens=3)
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
