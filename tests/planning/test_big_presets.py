"""Programs of the large presets, on small slices: what they hold and send.

Widths are those of the presets, layers and rows fewer: layers run in a scan, so
that the program of two is that of ninety. A change that costs memory or bytes
fails here. Figures are those of jax 0.10.2 and libtpu 0.0.42.1; `python
tests/planning/test_big_presets.py` prints those of a changed program.

All are compiled in a hurry, which leaves out what runs exchanges beside
products: seconds instead of minutes.
"""

import dataclasses
import functools
import math
import pathlib
import re
import sys

import extras
import jax
import pytest

sys.path.append(str(pathlib.Path(__file__).parents[1]))  # As a script.

import tpu

from t2x.config import catalog
from t2x.config import overrides
from t2x.planning import plan as plan_lib
from t2x.planning import sharding_table

_LIBTPU = '0.0.42.1'


@dataclasses.dataclass(frozen=True)
class Case:
  """A preset on a slice, and what was recorded: in MB, of products in GFLOP.

  `copied` are the parameters that some devices have alike.
  """

  topology: str
  settings: str
  arguments: int
  peak: int
  flops: int
  sent: dict[str, int]
  copied: str = '^$'


CASES = {
  'llama2_7b': Case(
    'v5e:2x2',
    'model.num_layers=2 data.batch_size=4',
    arguments=2001,
    peak=3368,
    flops=8345,
    sent={
      'all-gather fsdp': 2143,
      'collective-permute fsdp': 1012,
      'reduce-scatter fsdp': 262,
      'all-to-all fsdp': 34,
    },
  ),
  't5_11b': Case(
    'v5e:2x2',
    'model.num_layers=1 data.batch_size=8 mesh.fsdp=2 mesh.tensor=2',
    arguments=505,
    peak=1659,
    flops=2462,
    sent={
      'all-gather fsdp': 1005,
      'reduce-scatter fsdp': 470,
      'all-reduce fsdp': 104,
      'all-reduce tensor': 40,
      'all-to-all fsdp': 10,
    },
  ),
  'gpt3_175b': Case(
    'v5p:2x2x1',
    'model.num_layers=4 data.batch_size=8 mesh.pipe=2 mesh.tensor=2 '
    'mesh.fsdp=1 pipeline.microbatches=4',
    arguments=23752,
    peak=44804,
    flops=272696,
    sent={
      'all-reduce tensor': 5637,
      'all-reduce pipe': 1337,
      'all-gather pipe': 1337,
      'collective-permute pipe': 805,
    },
    copied='positions',  # Over `tensor`.
  ),
  'mixtral_8x7b': Case(
    'v5e:2x2',
    'model.num_layers=1 data.batch_size=4 data.length=2048 mesh.expert=2 '
    'mesh.fsdp=2',
    arguments=6053,
    peak=8448,
    flops=9750,
    sent={
      'all-gather fsdp': 3511,
      'reduce-scatter fsdp': 1755,
      'all-reduce expert': 435,
      'all-to-all expert': 252,
      'all-to-all fsdp': 34,
    },
    copied='embeddings|output|attention',  # Over `expert`.
  ),
}


def config_of(name):
  settings = overrides.parse_settings(CASES[name].settings.split())
  return overrides.override(catalog.load(name), settings)


@functools.cache
def plan_of(name):
  case, config = CASES[name], config_of(name)
  tpu.devices(case.topology)  # Skips where there is no compiler.
  option = 'jax_exec_time_optimization_effort'
  before = getattr(jax.config, option)
  jax.config.update(option, -1.0)
  try:
    return plan_lib.make(config, case.topology)
  finally:
    jax.config.update(option, before)


def figures(plan):
  """As a case has them; exchanges of less than a MB are left out."""
  sent = {
    f'{row.kind} {",".join(row.axes)}': round(row.bytes / 1e6)
    for row in plan.collectives
    if row.bytes > 1e6
  }
  return {
    'arguments': round(plan.memory.arguments / 1e6),
    'peak': round(plan.memory.peak / 1e6),
    'flops': round(plan.flops.executed / 1e9),
    'sent': sent,
  }


# t5_11b compiles for more than a minute.
_QUICK = ('llama2_7b', 'gpt3_175b', 'mixtral_8x7b')


@pytest.mark.slow
@pytest.mark.parametrize(
  'name',
  [
    *_QUICK,
    *(
      pytest.param(name, marks=pytest.mark.exhaustive)
      for name in CASES
      if name not in _QUICK
    ),
  ],
)
def test_figures_are_those_recorded(name):
  libtpu = extras.need('libtpu', extra='plan')
  if libtpu.__version__ != _LIBTPU:
    pytest.skip('figures of another compiler')
  found, case = figures(plan_of(name)), CASES[name]
  assert found['arguments'] == case.arguments
  assert found['peak'] == pytest.approx(case.peak, rel=0.03)
  assert found['flops'] == pytest.approx(case.flops, rel=0.01)
  assert found['sent'].keys() == case.sent.keys()
  for kind, size in case.sent.items():
    assert found['sent'][kind] == pytest.approx(size, rel=0.03, abs=2), kind


@pytest.mark.parametrize('name', CASES)
def test_large_parameters_lie_once(name):
  config = config_of(name)
  sides = CASES[name].topology.partition(':')[2].split('x')
  table = sharding_table.make(config, math.prod(map(int, sides)))
  rows = table.groups[sharding_table.PARAMETERS]
  large = [row for row in rows if row.num_bytes > 2**20]
  copied = {row.path for row in large if row.copies > 1}
  named = re.compile(CASES[name].copied)
  assert copied == {row.path for row in large if named.search(row.path)}
  assert len(copied) < len(large)


if __name__ == '__main__':
  for name in CASES:
    plan = plan_of(name)
    print(plan.compile_seconds, {name: figures(plan)}, flush=True)
