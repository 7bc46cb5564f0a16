r"""What pipeline schedules cost: time, products, memory, bytes sent, bubbles.

python scripts/bench_pipeline.py [--schedules=gpipe,zb_v] [--rounds=5]
    [--remat=none,full] [--microbatches=8,16] [--json]
    [--target=cpu|tpu|v5e:4x4] [--case=1.1b]

The train step of one decoder on eight simulated devices, by each schedule and
without stages (`--baseline`), in alternating rounds: the median of the ratios
of the times in a round. FLOPs of matrix products that a device executes, most
and mean over stages; the mean over that of a device without stages, at the same
remat and, as `of model`, where nothing runs twice; the compiler's
temporaries for each number of microbatches, the rows of one held; the idle
share by the table, as soon as can be and in lock-step ticks, beside the
published one. Simulated devices share the machine's cores, so their time tells
what all do together, and waiting costs nothing.

With `--target=tpu` the steps are compiled for a slice of TPUs (v5e:4x4) and not
run; this needs libtpu but no TPU. `--case=1.1b` is a decoder of 1.1 billion
parameters there, beside MaxText's circular pipeline of the same model.
"""

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t2x.compilation import lowering
from t2x.compilation import program
from t2x.config import experiment
from t2x.config import layout_flag
from t2x.config import partitioning
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.hardware import target_devices
from t2x.hlo import collectives
from t2x.hlo import divergence
from t2x.hlo import matmul_flops
from t2x.hlo import module
from t2x.hlo import stage_trips
from t2x.layers import attention_config
from t2x.models import presets
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.parallel import simulated_devices
from t2x.pipeline import schedule as schedule_lib
from t2x.pipeline import schedules
from t2x.planning import sharding_table
from t2x.tracking import text_table

simulated_devices.ask_for(8)

# `rows` are those of a microbatch on a device.
_SMALL = {'layers': 16, 'width': 256, 'hidden': 1024, 'heads': 4, 'rows': 1}
_SMALL |= {'vocab': 2048, 'length': 128, 'target': 'cpu', 'rounds': 5}
_SMALL |= {
  'layout': 'pipe=4,data=2',
  'baseline': 'fsdp=8',
  'remat': 'none,full',
}
_SMALL |= {'microbatches': '8,16', 'schedules': ','.join(schedules.NAMES)}
_LARGE = {'layers': 16, 'width': 2048, 'hidden': 7168, 'heads': 16, 'rows': 2}
_LARGE |= {'vocab': 32000, 'length': 2048, 'target': 'tpu', 'rounds': 0}
_LARGE |= {'layout': 'pipe=4,fsdp=4', 'baseline': 'fsdp=16', 'remat': 'full'}
_LARGE |= {'microbatches': '8', 'schedules': 'interleaved,one_f_one_b'}
CASES = {'small': _SMALL, '1.1b': _LARGE}
# What is not run needs none of LLVM's optimisations.
QUICK = {'xla_backend_optimization_level': 0}
# Of its program for the 1.1b case and v5e:4x4 (2 repeats, 8 microbatches).
MAXTEXT = {'name': 'MaxText, circular', 'flops': [74.4e12], 'sent': 13.3e9}
MAXTEXT |= {'arguments': 1.05 * 2**30, 'temporaries': [2.04 * 2**30]}
MAXTEXT |= {'peak': 2.98 * 2**30, 'seconds': 113.0, 'instructions': None}


def main() -> None:
  args = parse()
  tpu = args.target != 'cpu'
  topology = 'v5e:4x4' if args.target == 'tpu' else args.target
  try:
    devices = [*(target_devices.devices(topology) if tpu else jax.devices())]
    layouts = layouts_of(args, len(devices))
  except ValueError as error:
    sys.exit(f'error: {error}')
  result = {'target': topology, 'settings': vars(args)}
  for remat in args.remat.split(','):
    rows = bench(args, devices, layouts, remat, tpu)
    if tpu and args.case == '1.1b':
      rows.append(MAXTEXT)
    print_rows(args, rows, remat, tpu)
    result[remat] = rows
  if args.json:
    print(json.dumps(result))


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description='Pipeline schedules')
  parser.add_argument('--case', default='small', choices=CASES)
  parser.add_argument('--json', action='store_true')
  for name, value in _SMALL.items():
    parser.add_argument(f'--{name}', type=type(value))
  args = parser.parse_args()
  for name, value in CASES[args.case].items():
    if getattr(args, name) is None:
      setattr(args, name, value)
  args.microbatches = [int(n) for n in args.microbatches.split(',')]
  return args


def layouts_of(args, num_devices: int) -> dict[str, str]:
  """Returns the baseline's layout and each schedule's, by name."""
  result = {'no stages': args.baseline}
  for name in args.schedules.split(','):
    result[name] = f'{args.layout},pipeline.schedule={name}'
  for text in result.values():
    num = layout_flag.parse(text).num_devices
    if num != num_devices:
      raise ValueError(
        f'{text} takes {num} devices; {args.target} has {num_devices}.'
      )
  return result


def config_of(
  args, text: str, microbatches: int, remat: str, tpu: bool
) -> experiment.Experiment:
  stages = layout_flag.parse(args.layout).mesh
  llama, heads = presets.llama2_7b(), args.heads
  model = dataclasses.replace(
    llama,
    vocab_size=args.vocab,
    num_layers=args.layers,
    embed_dim=args.width,
    attention=attention_config.Dense(
      num_heads=heads, head_dim=args.width // heads
    ),
    mlp=dataclasses.replace(llama.mlp, hidden=args.hidden),
    dtype='bfloat16' if tpu else 'float32',
  )
  config = experiment.Experiment(
    model=model,
    data=data.DataConfig(
      length=args.length,
      batch_size=args.rows * stages.data * stages.fsdp * microbatches,
      tokenizer=tokenizers.Bytes(),
    ),
  )
  number = f',pipeline.microbatches={microbatches}' if 'pipe=' in text else ''
  layout = layout_flag.parse(f'{text}{number},train.remat={remat}')
  config = layout.applied(config)
  layout.check(config)
  return config


def bench(args, devices, layouts, remat: str, tpu: bool) -> list[dict]:
  first, *others = args.microbatches
  rows, steps = [], []
  for name, text in layouts.items():
    config = config_of(args, text, first, remat, tpu)
    mesh = mesh_lib.make(config.mesh, devices)
    compiled, seconds = compile_timed(config, mesh)
    row = {'name': name, 'seconds': round(seconds, 1)}
    row |= figures(config, mesh, compiled)
    for number in others:
      more = config_of(args, text, number, remat, tpu)
      again, _ = compile_timed(more, mesh, **({} if tpu else QUICK))
      row['temporaries'] += figures(more, mesh, again)['temporaries']
    if not (rows or tpu):
      row['model'] = row['flops'][0]
      if remat != 'none':
        row['model'] = model_flops(args, text, devices)
    rows.append(row)
    print(f'{remat}, {name}: {seconds:.0f} s', file=sys.stderr)
    if not tpu and args.rounds:
      steps.append(Step(config, mesh, compiled))
  for row, times in zip(rows, timed(steps, args.rounds)):
    row['times'] = times
  return rows


def model_flops(args, text: str, devices) -> int:
  """Returns the products of a device where no forward runs twice."""
  config = config_of(args, text, args.microbatches[0], 'none', False)
  mesh = mesh_lib.make(config.mesh, devices)
  compiled, _ = compile_timed(config, mesh, **QUICK)
  return figures(config, mesh, compiled)['flops'][0]


def compile_timed(config, mesh, **options):
  """Returns a compiled train step, and the seconds that it took."""
  start = time.perf_counter()
  compiled = target_devices.compile(lowering.lower_step(config, mesh), options)
  return compiled, time.perf_counter() - start


def figures(config, mesh, compiled: jax.stages.Compiled) -> dict[str, Any]:
  """Returns what is known of a program without running it."""
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert text is not None and memory is not None, 'no such figures here'
  plan = partitioning.of(config, mesh.shape).pipeline
  trips: list[Any] = [None]
  row: dict[str, Any] = {}
  if plan is not None:
    divergence.check(text)
    stages = range(plan.table.num_stages)
    trips = [stage_trips.trips(plan, stage) for stage in stages]
    found = plan.table.simulate()
    row['bubble'] = found.bubble
    row['bubble_executed'] = found.bubble_executed
    row['published'] = published(plan.table)
  sent = [
    collectives.total(collectives.collectives(text, mesh, t)) for t in trips
  ]
  computations = module.parse(text).computations.values()
  return row | {
    'flops': [matmul_flops.matrix_flops(text, t) for t in trips],
    'sent': max(sent),
    'arguments': memory.argument_size_in_bytes,
    'temporaries': [memory.temp_size_in_bytes],
    'peak': memory.peak_memory_in_bytes,
    'instructions': sum(len(c.instructions) for c in computations),
  }


def published(table: schedule_lib.Schedule) -> float | None:
  """Returns the idle share by the papers' formulas, F = B = W."""
  S, M, v = table.num_stages, table.num_microbatches, table.num_chunks
  if table.name.startswith('zb'):  # They have none where forwards run twice.
    return None if table.recompute else (S - 1) / (3 * v * M + S - 1)
  return (S - 1) / (v * M + S - 1)


# --- Times. ---


class Step:
  """A compiled step with a state and a batch of its own."""

  def __init__(self, config, mesh, compiled: jax.stages.Compiled):
    self._compiled = compiled
    made = program.Program(config, mesh, num_steps=1)
    shapes = made.batch_shapes()
    batch = {name: np.ones(s.shape, s.dtype) for name, s in shapes.items()}
    positions = np.cumsum(batch['inputs'], 1, dtype=np.int32) - 1
    self._batch = made.place({**batch, 'positions': positions})
    self._key = jax.device_put(jax.random.key(0), NamedSharding(mesh, P()))
    with sharding.use(mesh, config.rules):
      self._state = made.init_state()

  def seconds(self) -> float:
    start = time.perf_counter()
    self._state, metrics = self._compiled(self._state, self._batch, self._key)
    jax.block_until_ready((self._state, metrics))
    return time.perf_counter() - start


def timed(steps: list[Step], rounds: int) -> list[list[float]]:
  """Returns the seconds of each step in each round."""
  for step in steps:
    step.seconds()
  times: list[list[float]] = [[] for _ in steps]
  order = [*zip(steps, times)]
  for _ in range(rounds):
    for step, found in order:
      found.append(step.seconds())
    order.reverse()
  return times


def print_rows(args, rows: list[dict], remat: str, tpu: bool) -> None:
  table = [cells(args, row, rows[0], tpu) for row in rows]
  lines = [[f'remat {remat}', *table[0]]]
  lines += [[row['name'], *texts.values()] for row, texts in zip(rows, table)]
  print('\n'.join(text_table.aligned(lines, '<' + '>' * len(table[0]))))


def cells(args, row: dict, one: dict, tpu: bool) -> dict[str, str]:
  """Returns what is printed of a row, by column."""
  size = sharding_table.bytes_text
  share = lambda key: '-' if row.get(key) is None else f'{row[key]:.1%}'
  mean = statistics.mean(row['flops'])
  result = {}
  if not tpu and args.rounds:
    ratios = [a / b for a, b in zip(row['times'], one['times'])]
    result['step'] = f'{statistics.median(row["times"]):.2f} s'
    result['ratio'] = f'{statistics.median(ratios):.3f}'
  result['GFLOP most'] = f'{max(row["flops"]) / 1e9:.2f}'
  result['mean'] = f'{mean / 1e9:.2f}'
  result['of one'] = f'{mean / one["flops"][0]:.3f}'
  if not tpu:
    result['of model'] = f'{mean / one["model"]:.3f}'
  result['arguments'] = size(row['arguments'])
  for i, number in enumerate(args.microbatches):
    known = row['temporaries'][i : i + 1]
    result[f'temporaries {number}'] = size(known[0]) if known else '-'
  if tpu:  # A CPU's compiler does not tell.
    result['peak'] = size(row['peak'])
  result['sent'] = size(row['sent'])
  result['bubble'] = share('bubble')
  result['in ticks'] = share('bubble_executed')
  result['published'] = share('published')
  result['compiled in'] = f'{row["seconds"]:.0f} s'
  result['instructions'] = str(row['instructions'] or '-')
  return result


if __name__ == '__main__':
  main()
