"""Programs of the large presets, on small slices: what they hold and send.

Widths are those of the presets, layers and rows fewer: layers run in a scan, so
that the program of two is that of ninety. A change that costs memory or bytes
fails here. The figures were recorded with jax 0.10.2 and libtpu 0.0.42.1; run
`python tests/plan/test_big_presets.py` for those of a changed program.
"""

import functools
import json

import jax
import pytest
import tpu

from t2x import catalog
from t2x import config as config_lib
from t2x import planning
from t2x import sharding_table

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    jax.__version_info__ >= (0, 11), reason='figures of another compiler'
  ),
]

# Experiment -> topology, settings.
CASES = {
  'llama2_7b': ('v5e:2x2', ('model.num_layers=4', 'data.batch_size=4')),
  't5_11b': (
    'v5e:2x2',
    (
      'model.num_layers=1',
      'data.batch_size=8',
      'mesh.fsdp=2',
      'mesh.tensor=2',
    ),
  ),
  'gpt3_175b': (
    'v5p:2x2x1',
    (
      'model.num_layers=2',
      'data.batch_size=4',
      'mesh.pipe=2',
      'mesh.fsdp=1',
      'mesh.tensor=2',
      'pipeline.microbatches=4',
    ),
  ),
  'mixtral_8x7b': (
    'v6e:2x2',
    (
      'model.num_layers=2',
      'data.batch_size=4',
      'data.length=2048',
      'mesh.expert=4',
      'mesh.fsdp=1',
    ),
  ),
}
RECORDED = json.loads('{}')


@functools.cache
def plan_of(name):
  topology, settings = CASES[name]
  tpu.devices(topology)  # Skips where there is no compiler.
  config = catalog.load(name)
  config = config_lib.override(config, config_lib.parse_settings([*settings]))
  return config, planning.make(config, topology)


def figures(plan):
  """In MB and GFLOP; exchanges of less than a MB are left out."""
  sent = {
    f'{row.kind} {",".join(row.axes)}': round(row.bytes / 1e6)
    for row in plan.sent
    if row.bytes > 1e6
  }
  return {
    'arguments': round(plan.memory.arguments / 1e6),
    'peak': round(plan.memory.peak / 1e6),
    'flops': round(plan.flops.executed / 1e9),
    'sent': sent,
  }


@pytest.mark.parametrize('name', CASES)
def test_figures_are_those_recorded(name):
  _, plan = plan_of(name)
  found, recorded = figures(plan), RECORDED[name]
  assert found['arguments'] == recorded['arguments']
  assert found['peak'] == pytest.approx(recorded['peak'], rel=0.03)
  assert found['flops'] == pytest.approx(recorded['flops'], rel=0.01)
  assert found['sent'].keys() == recorded['sent'].keys()
  for kind, size in recorded['sent'].items():
    assert found['sent'][kind] == pytest.approx(size, rel=0.03, abs=2), kind


@pytest.mark.parametrize('name', CASES)
def test_nothing_large_is_copied(name):
  config, plan = plan_of(name)
  table = sharding_table.make(config, 4)
  large = [r for r in table.groups['parameters'] if r.num_bytes > 2**20]
  assert large and all(row.copies == 1 for row in large)


if __name__ == '__main__':
  for name in CASES:
    _, plan = plan_of(name)
    print(plan.compile_seconds, {name: figures(plan)}, flush=True)
