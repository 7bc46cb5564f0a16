r"""Estimates of a step against what the TPU compiler says.

python scripts/check_estimate.py [--only=REGEX] [--cached] [--json]
    [--cache=DIR]

For each configuration of scripts/estimate_cases.py: bytes of arguments, at the
peak and of temporaries, FLOPs of products (kernels included) and bytes sent, of
t2x/cost_model/estimate.py over those of the compiled program. Every second
configuration is held out: nothing of the estimate was fitted on it. The median
and the largest relative errors follow, of either half.

It needs libtpu and no TPU. One configuration after the other is compiled, for
20 to 60 s each on two idle cores, and its figures are kept in --cache (by the
config, the versions of jax and libtpu), so that it can be stopped at any time;
--cached compiles nothing and leaves out what is not there.
"""

import argparse
from collections.abc import Callable
import hashlib
from importlib import metadata
import json
import os
import pathlib
import re
import statistics
import sys
import time
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'

import estimate_cases

from t2x.compilation import lowering
from t2x.config import experiment
from t2x.config import overrides
from t2x.config import partitioning
from t2x.cost_model import estimate
from t2x.hardware import target_devices
from t2x.hlo import collectives
from t2x.hlo import kernel_flops
from t2x.hlo import matmul_flops
from t2x.hlo import stage_trips
from t2x.parallel import mesh as mesh_lib

FIGURES = ('arguments', 'peak', 'temporaries', 'flops', 'sent')


def main() -> None:
  args = parse()
  rows = []
  for case in estimate_cases.CASES:
    if not re.search(args.only, case.name):
      continue
    config = estimate_cases.config_of(case)
    path = cache_path(args.cache, case, config)
    if not path.exists():
      if args.cached:
        continue
      try:
        found = compiled_figures(case, config)
      except Exception as error:  # One that needs too much must not end all.
        print(f'{case.name}: {str(error)[:300]}', file=sys.stderr)
        continue
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_text(json.dumps(found, indent=2) + '\n')
    rows.append(row_of(case, config, json.loads(path.read_text())))
  print_rows(rows)
  if args.json:
    print(json.dumps({'rows': rows, 'errors': errors(rows)}))


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description='Estimates and the compiler')
  parser.add_argument('--only', default='', help='Of names, such as ^llama.')
  parser.add_argument('--cache', default='runs/estimates')
  parser.add_argument('--cached', action='store_true')
  parser.add_argument('--json', action='store_true')
  return parser.parse_args()


def cache_path(
  cache: str, case: estimate_cases.Case, config: experiment.Experiment
) -> pathlib.Path:
  """Returns the file of a case's figures, of this config and compiler."""
  versions = [metadata.version(name) for name in ('jax', 'libtpu')]
  text = overrides.dumps(config) + case.topology + ' '.join(versions)
  key = hashlib.sha256(text.encode()).hexdigest()[:12]
  name = re.sub(r'\W+', '_', case.name)
  return pathlib.Path(cache) / f'{name}-{key}.json'


def compiled_figures(
  case: estimate_cases.Case, config: experiment.Experiment
) -> dict[str, Any]:
  """Returns what the compiler says of a step."""
  start = time.perf_counter()
  mesh = mesh_lib.make(config.mesh, target_devices.devices(case.topology))
  compiled = target_devices.compile(lowering.lower_step(config, mesh))
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert text is not None and memory is not None
  seconds = time.perf_counter() - start
  print(f'{case.name}: {seconds:.0f} s', file=sys.stderr)
  return {
    'name': case.name,
    'seconds': round(seconds, 1),
    'arguments': memory.argument_size_in_bytes,
    'peak': memory.peak_memory_in_bytes,
    'temporaries': memory.temp_size_in_bytes,
    **of_text(text, config, mesh),
  }


def of_text(text: str, config: experiment.Experiment, mesh) -> dict[str, int]:
  """Returns products and bytes, of the stage that has the most."""
  plan = partitioning.of(config, mesh.shape).pipeline
  trips: list[Any] = [None]
  if plan is not None:
    trips = [stage_trips.trips(plan, s) for s in range(plan.table.num_stages)]
  flops = lambda t: (
    matmul_flops.matrix_flops(text, t) + kernel_flops.kernel_flops(text, t)
  )
  sent = lambda t: collectives.total(collectives.collectives(text, mesh, t))
  return {'flops': max(map(flops, trips)), 'sent': max(map(sent, trips))}


def row_of(
  case: estimate_cases.Case, config: experiment.Experiment, compiled: Any
) -> dict[str, Any]:
  """Returns figures of both, and their ratios."""
  found = estimate.step(config)
  estimated = {
    'arguments': found.argument_bytes,
    'peak': found.peak_bytes,
    'temporaries': found.temporary_bytes,
    'flops': found.executed_flops,
    'sent': found.sent_bytes(),
  }
  ratios = {name: estimated[name] / compiled[name] for name in FIGURES}
  return {
    'name': case.name,
    'held_out': case.held_out,
    'staged': config.mesh.pipe > 1,
    'compiled': {name: compiled[name] for name in FIGURES},
    'estimated': estimated,
    'ratios': ratios,
  }


def errors(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """Returns (median, largest) relative errors of each half and figure."""
  halves: dict[str, Callable[[Any], bool]] = {
    'fitted': lambda row: not row['held_out'],
    'held out': lambda row: row['held_out'],
  }
  found = {}
  for half, is_in in halves.items():
    own = [row for row in rows if is_in(row)]
    if own:
      found[half] = {'number': len(own)} | {
        name: _spread([abs(row['ratios'][name] - 1) for row in own])
        for name in FIGURES
      }
  return found


def _spread(values: list[float]) -> list[float]:
  return [round(statistics.median(values), 4), round(max(values), 4)]


def print_rows(rows: list[dict[str, Any]]) -> None:
  print(f'{"estimated / compiled":<86}' + ''.join(f'{n:>13}' for n in FIGURES))
  for row in rows:
    ratios = ''.join(f'{row["ratios"][name]:>13.3f}' for name in FIGURES)
    mark = 'held out' if row['held_out'] else ''
    print(f'{row["name"]:<77} {mark:<8}{ratios}')
  for half, found in errors(rows).items():
    spreads = [found[name] for name in FIGURES]
    texts = [f'{100 * m:.1f}% {100 * w:.0f}%' for m, w in spreads]
    name = f'{half} ({found["number"]}): median and largest error'
    print(f'{name:<86}' + ''.join(f'{text:>13}' for text in texts))


if __name__ == '__main__':
  main()
