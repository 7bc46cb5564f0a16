r"""Compiled train steps of t2x beside those of MaxText, by the same compiler.

python scripts/bench_plan.py --peer_python=PATH [--rounds=2] [--only=REGEX]
    [--json]

PATH is the Python of an environment with MaxText 0.2.5 (`pip install
'maxtext[tpu]==0.2.5'`, Python 3.12) and with the jax and libtpu of this one;
other versions are refused. Each model is compiled for 16 chips of TPU v5e (no
TPU is needed) by both in turns, each time in a new process; which goes first
alternates. Both train in bfloat16 on float32 weights with AdamW, recompute
whole layers, and run the splash attention kernel.

Of each device: memory in GiB as the compiler reports it, FLOPs of matrix
products without those in kernels, and bytes sent, both read from the two
programs by t2x/plan with loops counted by their trips. Seconds are those of
tracing and compiling: medians over rounds, and `ratio` is the median over
rounds of t2x / MaxText.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

_PACKAGES = ('jax', 'libtpu')
_HERE = pathlib.Path(__file__)
FIGURES = {
  'arguments': ('GiB of arguments', 2**30),
  'temporaries': ('GiB of temporaries', 2**30),
  'peak': ('GiB at the peak', 2**30),
  'products': ('TFLOP of products', 1e12),
  'sent': ('GB sent', 1e9),
  'seconds': ('s to compile', 1),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """One model, for both.

  Attributes:
    experiment: of t2x.
    settings: of MaxText, beside `_COMMON`.
  """

  experiment: str
  settings: tuple[str, ...]


CASES = (
  Case(
    experiment='llama2_7b',
    settings=('model_name=llama2-7b', 'per_device_batch_size=1'),
  ),
  Case(
    experiment='llama_1b',
    settings=(
      'decoder_block=llama2',
      'base_emb_dim=2048',
      'base_num_query_heads=16',
      'base_num_kv_heads=16',
      'head_dim=128',
      'base_mlp_dim=7168',
      'mlp_activations=[silu,linear]',
      'base_num_decoder_layers=16',
      'vocab_size=32000',
      'logits_via_embedding=false',
      'enable_dropout=false',
      'per_device_batch_size=4',
    ),
  ),
)
_COMMON = (
  'run_name=bench',
  'max_target_length=2048',
  'remat_policy=full',
  'attention=flash',
  'opt_type=adamw',
  'compile_topology=v5e-16',
  'compile_topology_num_slices=1',
  'ici_fsdp_parallelism=16',
  'dataset_type=synthetic',
  'enable_checkpointing=false',
)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--peer_python', help='the Python that has MaxText')
  parser.add_argument('--rounds', type=int, default=2)
  parser.add_argument('--only', default='', help='experiments, as a REGEX')
  parser.add_argument('--json', action='store_true')
  parser.add_argument('--worker', nargs='+', help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.worker:
    work(*args.worker)
    return
  if args.peer_python is None:
    parser.error('--peer_python is missing: the Python that has MaxText')
  check_versions(args.peer_python)
  rows = []
  for case in CASES:
    if re.search(args.only, case.experiment):
      rows.append(compare(case, args.peer_python, args.rounds))
      print(text(rows[-1]), flush=True)
  if args.json:
    print(json.dumps(rows))


def check_versions(peer: str) -> None:
  """Exits unless both have the same compiler."""
  program = (
    'from importlib import metadata; import json; '
    f'print(json.dumps([metadata.version(n) for n in {_PACKAGES}]))'
  )
  found = [
    run([python, '-c', program])[-1] for python in (sys.executable, peer)
  ]
  if found[0] != found[1]:
    sys.exit(
      f'error: versions of {" and ".join(_PACKAGES)} are {found[0]} here and '
      f'{found[1]} of --peer_python={peer}. Install the same in both.'
    )


def compare(case: Case, peer: str, rounds: int) -> dict[str, Any]:
  """Returns the figures of both; they are the same in all rounds but time."""
  found: dict[str, list[dict[str, float]]] = {'t2x': [], 'maxtext': []}
  for number in range(rounds):
    for name in ('t2x', 'maxtext') if number % 2 else ('maxtext', 't2x'):
      one = of_t2x(case) if name == 't2x' else of_maxtext(case, peer)
      print(f'{case.experiment} {name}: {one["seconds"]:.0f} s', flush=True)
      found[name].append(one)
  both = {
    name: {
      figure: statistics.median(one[figure] for one in ones)
      for figure in FIGURES
    }
    for name, ones in found.items()
  }
  ratios = [
    ours['seconds'] / theirs['seconds']
    for ours, theirs in zip(found['t2x'], found['maxtext'])
  ]
  ratio = {f: both['t2x'][f] / both['maxtext'][f] for f in FIGURES}
  ratio['seconds'] = statistics.median(ratios)
  return {'experiment': case.experiment, **both, 'ratio': ratio}


def of_t2x(case: Case) -> dict[str, float]:
  """Returns what scripts/plan.py says."""
  command = [sys.executable, str(_HERE.with_name('plan.py')), '--json']
  command += [f'--experiment={case.experiment}', '--topology=v5e:4x4']
  entry = json.loads(run(command)[-1])
  memory = entry['memory']
  return {
    'arguments': memory['arguments_bytes'],
    'temporaries': memory['temporaries_bytes'],
    'peak': memory['peak_bytes'],
    'products': entry['flops']['executed_matmul'],
    'sent': entry['collectives']['total_bytes'],
    'seconds': entry['compile_seconds'],
  }


def of_maxtext(case: Case, peer: str) -> dict[str, float]:
  """Returns the same of MaxText's program."""
  import jax

  from t2x.hlo import collectives
  from t2x.hlo import matmul_flops

  with tempfile.TemporaryDirectory() as directory:
    path = pathlib.Path(directory, 'step.hlo')
    settings = [*_COMMON, *case.settings]
    settings.append(f'base_output_directory={directory}')
    lines = run([peer, str(_HERE), '--worker', str(path), *settings])
    program = path.read_text()
  mesh = jax.sharding.AbstractMesh((16,), ('fsdp',))
  return {
    **json.loads(lines[-1]),
    'products': matmul_flops.matrix_flops(program),
    'sent': collectives.total(collectives.collectives(program, mesh)),
  }


def work(path: str, *settings: str) -> None:
  """Compiles MaxText's step in this process, writes it and says its figures."""
  from importlib import resources

  from maxtext.trainers.pre_train import train_compile  # type: ignore

  real, found = train_compile.jit_and_compile, {}

  def timed(*args, **kwargs):
    start = time.perf_counter()
    compiled = real(*args, **kwargs)
    found['seconds'] = time.perf_counter() - start
    memory = compiled.memory_analysis()
    found['arguments'] = memory.argument_size_in_bytes
    found['temporaries'] = memory.temp_size_in_bytes
    found['peak'] = memory.peak_memory_in_bytes
    pathlib.Path(path).write_text(compiled.as_text())
    return compiled

  train_compile.jit_and_compile = timed
  base = resources.files('maxtext').joinpath('configs', 'base.yml')
  train_compile.main(['', str(base), *settings])
  print(json.dumps(found))


def run(command: list[str]) -> list[str]:
  """Returns the lines that a command prints; exits with its error."""
  env = {
    **os.environ,
    'JAX_PLATFORMS': 'cpu',
    'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  }
  root = str(_HERE.resolve().parents[1])
  if command[0] == sys.executable:
    env['PYTHONPATH'] = root
  done = subprocess.run(command, env=env, capture_output=True, text=True)
  if done.returncode:
    sys.exit(f'error: {" ".join(command)}\n{done.stderr[-2000:]}')
  return done.stdout.splitlines()


def text(row: dict[str, Any]) -> str:
  lines = [f'{row["experiment"]:<24}{"t2x":>9}{"MaxText":>9}{"ratio":>7}']
  for figure, (name, unit) in FIGURES.items():
    ours, theirs = row['t2x'][figure] / unit, row['maxtext'][figure] / unit
    lines.append(
      f'  {name:<22}{ours:9.2f}{theirs:9.2f}{row["ratio"][figure]:7.2f}'
    )
  return '\n'.join(lines)


if __name__ == '__main__':
  main()
