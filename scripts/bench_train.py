r"""Training speed of t2x against eager PyTorch, on the same CPU.

python scripts/bench_train.py [--rounds=5] [--steps=12] [--json]

Both train one GPT-2 shape (4 layers, 256 wide, 4 heads, feed-forward 1,024,
vocabulary 8,192, length 256, batch 8, float32, AdamW, no dropout) in
subprocesses that take turns, so that both see the same machine. PyTorch runs
eagerly with scaled_dot_product_attention and fused AdamW; both read random
tokens from memory. t2x runs data parallel over one device a core. Both get the
same settings of the C library's memory. Prints medians, and with --json one
object in the last line; `ratio` is the median over rounds of t2x / torch in
tokens/s. `seconds_to_first_step_warm` is with a filled compilation cache.

Needs: bash scripts/setup.sh bench
"""

# Without the extra `bench` there is no torch to check types against.
# pyright: reportMissingImports=false

import argparse
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time

_START = time.perf_counter()
LAYERS, WIDTH, HEADS, HIDDEN, VOCAB = 4, 256, 4, 1024, 8192
LENGTH, BATCH = 256, 8
WARMUP = 3
# Large pages, and freed memory kept: both programs gain (PyTorch about 15%).
TUNABLES = (
  'glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:'
  'glibc.malloc.trim_threshold=17179869184'
)


def main() -> None:
  parser = argparse.ArgumentParser(description='t2x against PyTorch')
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--steps', type=int, default=12)
  parser.add_argument('--json', action='store_true')
  parser.add_argument('--worker', choices=['t2x', 'torch'])
  args = parser.parse_args()
  if args.worker:
    run = run_t2x if args.worker == 't2x' else run_torch
    print(json.dumps(run(args.steps)))
    return
  if importlib.util.find_spec('torch') is None:
    sys.exit('PyTorch is missing: bash scripts/setup.sh bench')
  results = compare(args.rounds, args.steps)
  report(results, warm_start(), args.json)


def compare(rounds: int, steps: int) -> dict[str, list[dict[str, float]]]:
  """Runs both in turns; which goes first alternates."""
  results: dict[str, list[dict[str, float]]] = {'t2x': [], 'torch': []}
  for number in range(rounds):
    order = ('t2x', 'torch') if number % 2 == 0 else ('torch', 't2x')
    for name in order:
      results[name].append(run_worker(name, steps))
      print(f'round {number + 1} {name}: {results[name][-1]}', file=sys.stderr)
  return results


def warm_start() -> float:
  """Returns t2x's seconds to the first step with its programs compiled."""
  with tempfile.TemporaryDirectory() as cache:
    env = {
      'JAX_COMPILATION_CACHE_DIR': cache,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    runs = [run_worker('t2x', 1, env) for _ in range(2)]
  return runs[1]['seconds_to_first_step']


def run_worker(name: str, steps: int, extra=None) -> dict[str, float]:
  command = [sys.executable, __file__, f'--worker={name}', f'--steps={steps}']
  xla = (
    f'--xla_force_host_platform_device_count={os.cpu_count()} '
    '--xla_cpu_use_onednn=true'
  )
  env = {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': xla,
    'GLIBC_TUNABLES': TUNABLES,
    **os.environ,
    **(extra or {}),
  }
  out = subprocess.run(command, env=env, check=True, capture_output=True)
  return json.loads(out.stdout.decode().splitlines()[-1])


def report(results, warm: float, as_json: bool) -> None:
  medians = {
    name: {
      key: round(statistics.median(row[key] for row in rows), 3)
      for key in rows[0]
    }
    for name, rows in results.items()
  }
  medians['t2x']['seconds_to_first_step_warm'] = round(warm, 3)
  pairs = zip(results['t2x'], results['torch'])
  key = 'tokens_per_second'
  ratios = [a[key] / b[key] for a, b in pairs]
  ratio = round(statistics.median(ratios), 3)
  print(f'{"":28}{"t2x":>12}{"torch":>12}')
  for name in medians['t2x']:
    other = medians['torch'].get(name, '')
    print(f'{name:28}{medians["t2x"][name]:12}{other:12}')
  spread = f'{min(ratios):.2f} to {max(ratios):.2f}'
  print(f'ratio in tokens/s: {ratio} ({spread}, {len(ratios)} rounds)')
  if as_json:
    print(json.dumps({**medians, 'ratio': ratio, 'ratios': ratios}))


def measure(step, steps: int) -> dict[str, float]:
  """Times `step(number)`, which returns when its work is done."""
  step(0)
  first = time.perf_counter() - _START
  for number in range(1, WARMUP):
    step(number)
  start, cpu = time.perf_counter(), time.process_time()
  for number in range(WARMUP, WARMUP + steps):
    step(number)
  seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
  return {
    'tokens_per_second': steps * BATCH * LENGTH / seconds,
    'cpu_seconds_per_step': cpu / steps,
    'peak_rss_mb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    'seconds_to_first_step': first,
  }


def run_t2x(steps: int) -> dict[str, float]:
  import jax
  import numpy as np

  from t2x.compilation import program
  from t2x.config import experiment
  from t2x.data import config as data
  from t2x.layers import attention_config
  from t2x.layers import mlp
  from t2x.layers import position
  from t2x.models import decoder
  from t2x.parallel import mesh
  from t2x.parallel import sharding
  from t2x.training import optim

  config = experiment.Experiment(
    model=decoder.DecoderConfig(
      vocab_size=VOCAB,
      num_layers=LAYERS,
      embed_dim=WIDTH,
      attention=attention_config.Dense(
        num_heads=HEADS, head_dim=WIDTH // HEADS, bias=True
      ),
      mlp=mlp.MlpConfig(hidden=HIDDEN),
      position=position.Learned(max_length=LENGTH),
    ),
    data=data.DataConfig(length=LENGTH, batch_size=BATCH),
    optim=optim.AdamW(schedule=optim.Schedule(shape='constant')),
    train=experiment.TrainConfig(scan_layers=False),
  )
  the_mesh = mesh.make(config.mesh)
  compiled = program.Program(config, the_mesh, num_steps=1000)
  random = np.random.default_rng(0)
  tokens = random.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
  ones = np.ones((BATCH, LENGTH), np.int32)
  batch = {
    'inputs': tokens[:, :-1],
    'targets': tokens[:, 1:],
    'weights': ones.astype(np.float32),
    'segments': ones,
    'positions': ones.cumsum(1, dtype=np.int32) - 1,
  }
  with sharding.use(the_mesh, config.rules):
    holder = [compiled.init_state()]
    batch = compiled.place(batch)

    def step(number):
      del number
      holder[0], metrics = compiled.step(holder[0], batch)
      jax.block_until_ready(metrics)

    return measure(step, steps)


def run_torch(steps: int) -> dict[str, float]:
  import torch
  from torch import nn
  from torch.nn import functional as F

  torch.manual_seed(0)

  class Block(nn.Module):
    def __init__(self):
      super().__init__()
      self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
      self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
      self.out = nn.Linear(WIDTH, WIDTH)
      self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x):
      rows, length, _ = x.shape
      qkv = self.qkv(self.norm1(x)).view(rows, length, 3, HEADS, -1)
      q, k, v = qkv.permute(2, 0, 3, 1, 4)
      y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
      x = x + self.out(y.transpose(1, 2).reshape(rows, length, WIDTH))
      hidden = F.gelu(self.up(self.norm2(x)), approximate='tanh')
      return x + self.down(hidden)

  class Model(nn.Module):
    def __init__(self):
      super().__init__()
      self.tokens = nn.Embedding(VOCAB, WIDTH)
      self.positions = nn.Embedding(LENGTH, WIDTH)
      self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
      self.norm = nn.LayerNorm(WIDTH)

    def forward(self, ids):
      x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
      for block in self.blocks:
        x = block(x)
      return F.linear(self.norm(x), self.tokens.weight)

  model = Model()
  decayed = [p for p in model.parameters() if p.ndim > 1]
  plain = [p for p in model.parameters() if p.ndim <= 1]
  groups = [
    {'params': decayed, 'weight_decay': 0.1},
    {'params': plain, 'weight_decay': 0.0},
  ]
  tx = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), fused=True)
  tokens = torch.randint(0, VOCAB, (BATCH, LENGTH + 1))

  def step(number):
    del number
    logits = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))
    tx.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    tx.step()
    loss.item()

  return measure(step, steps)


if __name__ == '__main__':
  main()
