r"""What each kind of attention costs, by the length of the sequence.

python scripts/bench_attention.py [--lengths=512,1024,...] [--kinds=dense,...]
    [--rounds=5] [--plot=FILE.png] [--json]

Queries, keys and values of one row, 8 heads of 64, float32, in the place of
softmax attention: forward, and forward with backward. Kinds for encoders alone
(linformer, nystromformer) see the whole row, all others are causal. Of each
length the compiler's FLOPs of matrix products (loops counted; of a convolution,
which has none, all FLOPs) and temporaries, and the median seconds of rounds in
which all kinds take turns; PyTorch's scaled_dot_product_attention, where it is
installed (the extra `bench`), takes its turn too. Exponents are slopes of a
least-squares line through the logarithms.

`--json` prints one object in the last line: `kinds.NAME` with `flops_exponent`,
`memory_exponent`, and `seconds`, `temporaries_bytes` and `flops` by length,
forward; the same with `train_` before it, forward and backward. `kinds.dense`
also has `torch_ratio`, its seconds over PyTorch's: of each length and pass the
median over rounds, of those the largest; `torch_ratios` has them all. The
largest lengths take most of the ten minutes on two cores.
"""

# Without the extra `bench` there is no torch to check types against.
# pyright: reportMissingImports=false

import argparse
import functools
import importlib.util
import json
import statistics
import time
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from t2x.attention import dense
from t2x.attention import kernels
from t2x.attention import mask as mask_lib
from t2x.hlo import matmul_flops
from t2x.layers import attention_config
from t2x.layers import attention_kinds
from t2x.layers import convolution
from t2x.layers import linear
from t2x.layers import low_rank
from t2x.layers import regional
from t2x.layers import sparse

HEADS: Any = {'num_heads': 8, 'head_dim': 64}
PASSES = ('', 'train_')  # Forward; with the backward pass.


def kinds_of(length: int) -> dict[str, attention_kinds.AttentionConfig]:
  """Returns kinds that look at about 256 keys, where they choose."""
  size, num = 64, -(-length // 64)
  # Blocks: the query's own, the one before, the first, one halfway between.
  near = lambda i, j: j in (i, i - 1, 0, i // 2)
  rows = tuple(
    ''.join('01'[near(i, j)] for j in range(num)) for i in range(num)
  )
  return {
    'dense': attention_config.Dense(**HEADS),
    'local': attention_config.Local(**HEADS, window=256),
    'dilated': sparse.Dilated(**HEADS, window=64, dilation=4),
    'block_sparse': sparse.BlockSparse(**HEADS, sparse_block=size, rows=rows),
    'random': sparse.Random(**HEADS, num_random=3),
    'bigbird': sparse.BigBird(**HEADS, window=96, num_global=64, num_random=2),
    'longformer': sparse.Longformer(**HEADS, window=240, num_global=16),
    'regional': regional.Regional(**HEADS, region=256),
    'linear': linear.Linear(**HEADS),
    'performer': linear.Performer(**HEADS, num_features=128),
    'linformer': low_rank.Linformer(**HEADS, rank=128, length=length),
    'nystromformer': low_rank.Nystromformer(**HEADS, landmarks=64),
    'convolution': convolution.Convolution(**HEADS, width=15),
  }


def function_of(config, length: int):
  """Returns what a kind makes of queries, keys and values."""
  causal = config.not_causal is None
  mask = mask_lib.make(causal=causal)
  if isinstance(config, convolution.Convolution):
    taps = jnp.full((1, length, config.num_heads, config.width), 0.1)
    return lambda q, k, v: convolution.convolve(v, taps, None, causal=causal)
  mixer = attention_kinds.mixer(config, rngs=nnx.Rngs(0))
  if mixer is not None:
    heads = jnp.arange(config.num_heads)
    return lambda q, k, v: mixer(q, k, v, mask, heads)
  assert isinstance(config, attention_config.Softmax)
  mask = mask & config.pattern(length, causal=causal)
  options = dense.AttentionOptions(kernel=config.kernel)
  return functools.partial(_attend, mask, options)


def _attend(mask, options, q, k, v):
  return kernels.attend(q, k, v, mask, options=options)


class Compiled:
  """One kind at one length, forward and with the backward pass."""

  def __init__(self, config, arrays):
    fn = function_of(config, arrays[0].shape[1])
    # A sum of squares, so that no product of the backward pass falls away.
    grad = jax.grad(lambda *a: (fn(*a) ** 2).sum(), (0, 1, 2))
    self.runs, self.flops, self.temporaries = {}, {}, {}
    for name, run in zip(PASSES, (fn, grad)):
      compiled = jax.jit(run).lower(*arrays).compile()
      stats: Any = compiled.memory_analysis()
      cost: Any = compiled.cost_analysis()
      flops = matmul_flops.matrix_flops(compiled.as_text() or '')
      self.flops[name] = flops or int(cost['flops'])
      self.temporaries[name] = stats.temp_size_in_bytes
      self.runs[name] = functools.partial(self._run, compiled, arrays)

  def _run(self, compiled, arrays):
    jax.block_until_ready(compiled(*arrays))


def torch_runs(arrays):
  """Returns PyTorch's passes over the same arrays, by name; {} without it."""
  if importlib.util.find_spec('torch') is None:
    return {}
  import torch

  attend: Any = functools.partial(
    torch.nn.functional.scaled_dot_product_attention, is_causal=True
  )
  tensors = [
    torch.tensor(np.asarray(a)).transpose(1, 2).contiguous() for a in arrays
  ]
  trained = [t.clone().requires_grad_() for t in tensors]

  def train():
    (attend(*trained) ** 2).sum().backward()

  return {'': lambda: attend(*tensors), 'train_': train}


def seconds(run) -> float:
  start = time.perf_counter()
  run()
  return time.perf_counter() - start


def measure(runs: dict[str, Any], rounds: int) -> dict[str, list[float]]:
  """Returns the seconds of each round, in which all take turns."""
  for run in runs.values():
    run()
  times = {name: [] for name in runs}
  for number in range(rounds):
    order = list(runs) if number % 2 else list(reversed(runs))
    for name in order:
      times[name].append(seconds(runs[name]))
  return times


def exponent(values: dict[str, float]) -> float | None:
  """Returns the slope of log(value) over log(length)."""
  if len(values) < 2 or min(values.values()) <= 0:
    return None
  x, y = np.log([float(n) for n in values]), np.log(list(values.values()))
  return round(float(np.polyfit(x, y, 1)[0]), 3)


def main() -> None:
  args = parse()
  result: dict[str, Any] = {}
  ratios: dict[str, dict[str, float]] = {name: {} for name in PASSES}
  for length in args.lengths:
    bench_length(length, args, result, ratios)
  for own in result.values():
    for name in PASSES:
      of = lambda what, own=own, name=name: exponent(own[f'{name}{what}'])
      own[f'{name}flops_exponent'] = of('flops')
      own[f'{name}memory_exponent'] = of('temporaries_bytes')
      own[f'{name}seconds_exponent'] = of('seconds')
  found = [ratio for own in ratios.values() for ratio in own.values()]
  if 'dense' in result:
    result['dense']['torch_ratio'] = max(found, default=None)
    result['dense']['torch_ratios'] = ratios if found else None
  show(result, args.lengths)
  if args.plot:
    plot(result, args.plot)
  if args.json:
    settings = {'lengths': args.lengths, 'rounds': args.rounds}
    device = jax.devices()[0].device_kind
    text = {'settings': settings, 'device': device, 'kinds': result}
    print(json.dumps(text))


def bench_length(length, args, result, ratios) -> None:
  """Measures all kinds at one length; adds what it finds."""
  keys = jax.random.split(jax.random.key(0), 3)
  shape = 1, length, HEADS['num_heads'], HEADS['head_dim']
  arrays = [jax.random.normal(key, shape) for key in keys]
  chosen = {
    name: Compiled(config, arrays)
    for name, config in kinds_of(length).items()
    if name in args.kinds
  }
  others = {} if args.skip_torch else torch_runs(arrays)
  for kind_pass in PASSES:
    runs = {name: own.runs[kind_pass] for name, own in chosen.items()}
    if 'dense' in runs and others:
      runs['torch'] = others[kind_pass]
    times = measure(runs, args.rounds)
    for name, own in chosen.items():
      found = {
        'seconds': statistics.median(times[name]),
        'temporaries_bytes': own.temporaries[kind_pass],
        'flops': own.flops[kind_pass],
      }
      rows = result.setdefault(name, {})
      for what, value in found.items():
        rows.setdefault(f'{kind_pass}{what}', {})[str(length)] = value
    if 'torch' in times:
      pairs = zip(times['dense'], times['torch'], strict=True)
      ratio = statistics.median(a / b for a, b in pairs)
      ratios[kind_pass][str(length)] = round(ratio, 3)


def show(result, lengths) -> None:
  """Prints a table of each pass."""
  for name in PASSES:
    print(f'\n{"forward and backward" if name else "forward"}: milliseconds')
    ends = ''.join(f'{n:>9}' for n in lengths)
    print(f'{"":16}{ends}{"GFLOP":>9}{"MiB":>8}   exponents')
    for kind, own in result.items():
      last = str(lengths[-1])
      of = lambda what, own=own, name=name: own[f'{name}{what}']
      times = ''.join(f'{1e3 * of("seconds")[str(n)]:9.1f}' for n in lengths)
      exponents = ', '.join(
        f'{what} {of(f"{what}_exponent")}'
        for what in ('seconds', 'flops', 'memory')
      )
      flops, size = of('flops')[last], of('temporaries_bytes')[last]
      print(f'{kind:16}{times}{flops / 1e9:9.2f}{size / 2**20:8.1f}   ', end='')
      print(exponents)
  ratios = result.get('dense', {}).get('torch_ratios')
  if ratios:
    print('\ndense over PyTorch, seconds:')
    for name, own in ratios.items():
      print(f'  {"with backward" if name else "forward":14}', own)


def plot(result, path: str) -> None:
  """Draws seconds and temporaries of training over the length."""
  import matplotlib

  matplotlib.use('Agg')
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 2, figsize=(12, 5.2), layout='constrained')
  colors = matplotlib.colormaps['tab20']
  x: list[int] = []
  for number, (kind, own) in enumerate(result.items()):
    color = colors(number)
    for ax, what, unit in zip(
      axes, ('seconds', 'temporaries_bytes'), (1, 2**20)
    ):
      values = own[f'train_{what}']
      x, y = [int(n) for n in values], [v / unit for v in values.values()]
      wide = 3 if kind == 'dense' else 1.5
      ax.plot(x, y, 'o-', label=kind, color=color, linewidth=wide, markersize=4)
  for ax, title in zip(axes, ('seconds', 'temporaries, MiB')):
    ax.set(xscale='log', yscale='log', xlabel='tokens of a row', title=title)
    ax.set_xticks(x, [f'{n:,}' for n in x])
    ax.minorticks_off()
    ax.grid(alpha=0.3)
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside right center', frameon=False)
  figure.suptitle('Attention, forward and backward: 8 heads of 64, float32')
  figure.savefig(path, dpi=110)
  print(f'wrote {path}')


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description='Kinds of attention by length')
  known = ','.join(kinds_of(512))
  parser.add_argument('--lengths', default='512,1024,2048,4096,8192,16384')
  parser.add_argument('--kinds', default=known)
  parser.add_argument('--rounds', type=int, default=5)
  parser.add_argument('--skip_torch', action='store_true')
  parser.add_argument('--plot', help='A picture to write.')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  args.lengths = [int(n) for n in args.lengths.split(',')]
  args.kinds = args.kinds.split(',')
  wrong = set(args.kinds) - {*known.split(',')}
  if wrong:
    parser.error(f'no kind {", ".join(sorted(wrong))}; there are {known}.')
  if min(args.lengths) < 512:
    parser.error('lengths are 512 or more.')
  return args


if __name__ == '__main__':
  main()
