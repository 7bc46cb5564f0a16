r"""What layouts cost each of eight devices: memory, products, bytes sent.

python scripts/bench_layouts.py [--target=cpu|tpu|v5e:2x4] [--json]
    [--only=layouts|ring] [--match=REGEX] [--width=512 ...]

The train step of one model on one batch, compiled for every layout and never
run: bytes of arguments and of temporaries by the compiler's figures, FLOPs of
matrix products times devices over those of one device, bytes sent by the
compiled program against the theory (t2x/cost_model/communication_bounds.py).
Then attention alone, forward and backward, as a ring of eight: memory against
length, and the largest buffer against the score matrix that never exists (in
one program the backward pass takes the keys that the forward pass was sent).

The default target is simulated devices of this CPU, in float32; `tpu` is a
slice of eight v5e chips, in bfloat16, and needs libtpu but no TPU. Two cores
take about four minutes, for the TPU seven. `--json` prints one object in the
last line.

What to expect beside the theory: the CPU's compiler sums the gradients of
queries, keys and values apart (6 sums of activations a layer where tensor
parallelism needs 4); a TPU's gathers their weights twice in the backward pass;
a ring makes its scores again there, one product of six more. Small temporaries
of a TPU lie in its vector memory, and no figure has them.
"""

import argparse
import json
import os
import re
import sys
import time
from typing import Any

os.environ['JAX_PLATFORMS'] = 'cpu'

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from t2x.attention import context
from t2x.attention import mask as mask_lib
from t2x.compilation import lowering
from t2x.config import experiment
from t2x.config import layout_flag
from t2x.cost_model import communication_bounds
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.hardware import target_devices
from t2x.hlo import collectives
from t2x.hlo import kernel_flops
from t2x.hlo import matmul_flops
from t2x.hlo import module
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import norm
from t2x.layers import position
from t2x.models import decoder
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.parallel import simulated_devices
from t2x.planning import sharding_table
from t2x.tracking import text_table

simulated_devices.ask_for(8)

NUM = 8
LAYOUTS = (
  'data=1',
  'data=8',
  'fsdp=8',
  'tensor=8',
  'tensor=8,rules.norm_length=context,tensor',
  'fsdp=4,tensor=2',
  'data=2,fsdp=2,tensor=2',
  'context=8',
  'context=8,rules.context_attention=all_to_all',
)


def main() -> None:
  args = parse()
  tpu = args.target != 'cpu'
  topology = 'v5e:2x4' if args.target == 'tpu' else args.target
  try:
    devices = [*(target_devices.devices(topology) if tpu else jax.devices())]
  except ValueError as error:
    sys.exit(f'error: {error}')
  if len(devices) != NUM:
    sys.exit(f'error: {args.target} has {len(devices)} devices; {NUM} needed.')
  result = {'target': topology, 'settings': vars(args)}
  if args.only in (None, 'layouts'):
    result['layouts'] = bench_layouts(args, devices, tpu)
  if args.only in (None, 'ring'):
    result['ring'] = bench_ring(args, devices, tpu)
  if args.json:
    print(json.dumps(result))


def parse() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description='Layouts by the compiler')
  parser.add_argument('--target', default='cpu')
  parser.add_argument('--only', choices=['layouts', 'ring'])
  parser.add_argument(
    '--match', default='', help='Of layouts beside the first.'
  )
  sizes = {'layers': 4, 'width': 512, 'hidden': 2048, 'heads': 8}
  sizes |= {'vocab': 8192, 'rows': 16}
  for name, size in sizes.items():
    parser.add_argument(f'--{name}', type=int, default=size)
  parser.add_argument('--length', type=int, help='Default 1024, for a TPU 512.')
  parser.add_argument('--ring_lengths', default='2048,8192,32768')
  parser.add_argument('--json', action='store_true')
  args = parser.parse_args()
  args.length = args.length or (1024 if args.target == 'cpu' else 512)
  return args


# --- Layouts. ---


def config_of(
  args, tpu: bool, layout: layout_flag.Layout
) -> experiment.Experiment:
  # On a CPU the blocks are a ring's pieces, so that all layouts leave out the
  # same scores; a TPU's compiler takes minutes over so many.
  block = args.length // (2 if tpu else 2 * NUM)
  config = experiment.Experiment(
    model=decoder.DecoderConfig(
      vocab_size=args.vocab,
      num_layers=args.layers,
      embed_dim=args.width,
      attention=attention_config.Dense(
        num_heads=args.heads, head_dim=args.width // args.heads, block=block
      ),
      mlp=mlp.MlpConfig(hidden=args.hidden, bias=False),
      norm=norm.RMSNorm(),
      position=position.Rotary(),
      tied_head='untied',
      dtype='bfloat16' if tpu else 'float32',
    ),
    data=data.DataConfig(
      length=args.length, batch_size=args.rows, tokenizer=tokenizers.Bytes()
    ),
  )
  config = layout.applied(config)
  layout.check(config)
  return config


def bench_layouts(args, devices, tpu: bool) -> list[dict]:
  rows = []
  first, *others = map(layout_flag.parse, LAYOUTS)
  chosen = [
    layout
    for layout in others
    if re.search(args.match, layout.text.replace('rules.', ''))
  ]
  # All are checked before the first is compiled.
  configs = [(each, config_of(args, tpu, each)) for each in (first, *chosen)]
  for layout, config in configs:
    name = layout.text.replace('rules.', '')
    num = layout.num_devices
    mesh = mesh_lib.make(config.mesh, devices[:num])
    compiled, seconds = compile_timed(
      lambda config=config, mesh=mesh: lowering.lower_step(config, mesh), tpu
    )
    text, memory = figures(compiled)
    found = collectives.collectives(text, mesh)
    flops = matmul_flops.matrix_flops(text) + kernel_flops.kernel_flops(text)
    first = rows[0]['flops'] if rows else flops
    rows.append(
      {
        'layout': name,
        'arguments': memory.argument_size_in_bytes,
        'temporaries': memory.temp_size_in_bytes,
        'flops': flops,
        'flops_share': flops * num / first,
        'sent': collectives.total(found),
        'theory': communication_bounds.bytes_sent(config, mesh.shape),
        'seconds': round(seconds, 1),
        'collectives': [
          {'kind': kind, 'axes': axes, 'times': times, 'bytes': size}
          for (kind, axes), (times, size) in collectives.summary(found).items()
        ],
      }
    )
    print(f'{name}: {seconds:.0f} s', file=sys.stderr)
  print_layouts(rows)
  return rows


def print_layouts(rows) -> None:
  text = sharding_table.bytes_text
  header = ['on each device', 'arguments', 'temporaries', 'FLOPs x devices']
  lines = [[*header, 'sent', 'theory', 'ratio', 'compiled in']]
  for row in rows:
    ratio = f'{row["sent"] / row["theory"]:.3f}' if row['theory'] else '-'
    lines.append(
      [row['layout'], text(row['arguments']), text(row['temporaries'])]
      + [f'{row["flops_share"]:.4f}', text(row['sent']), text(row['theory'])]
      + [ratio, f'{row["seconds"]:.0f} s']
    )
  print('\n'.join(text_table.aligned(lines, '<>>>>>>>')))


def figures(compiled: jax.stages.Compiled):
  """Returns a program's text, and the compiler's figures of its memory."""
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert text is not None and memory is not None, 'no such figures here'
  return text, memory


def compile_timed(lower, tpu: bool):
  """Returns what `lower` returns compiled, and the seconds it took."""
  start = time.perf_counter()
  # LLVM's optimisations cost half the time and change none of the figures.
  options = {} if tpu else {'xla_backend_optimization_level': 0}
  compiled = target_devices.compile(lower(), options)
  return compiled, time.perf_counter() - start


# --- A ring at several lengths. ---


def lower_ring(args, mesh, length: int, dtype) -> jax.stages.Lowered:
  """Lowers attention and its gradients, of one packed causal row."""
  split = NamedSharding(mesh, P(None, 'context'))
  shape = (1, length, args.heads, args.width // args.heads)
  x = jax.ShapeDtypeStruct(shape, dtype, sharding=split)
  segments = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=split)

  def both(q, k, v, segments, d_out):
    mask = mask_lib.self_attention(segments, causal=True, zigzag=NUM)
    fn = lambda q, k, v: context.attend(q, k, v, mask)
    out, back = jax.vjp(fn, q, k, v)
    gradients: Any = back(d_out)
    return out, gradients

  fn = jax.jit(both, out_shardings=(split, (split,) * 3))
  with sharding.use(mesh, sharding.Rules()):
    return fn.lower(x, x, x, segments, x)


def largest_buffer(text: str) -> tuple[int, str]:
  """Returns the bytes and the shape of the largest array in a program."""
  arrays = (
    (module.num_bytes(dtype, dims), f'{dtype}{list(dims)}')
    for computation in module.parse(text).computations.values()
    for instruction in computation.instructions.values()
    for dtype, dims in module.shapes(instruction.type)
  )
  return max(arrays)


def bench_ring(args, devices, tpu: bool) -> list[dict]:
  dtype = jnp.bfloat16 if tpu else jnp.float32
  mesh = mesh_lib.make(mesh_lib.MeshConfig(data=1, context=NUM), devices)
  rows = []
  for length in map(int, re.findall(r'\d+', args.ring_lengths)):
    compiled, seconds = compile_timed(
      lambda length=length: lower_ring(args, mesh, length, dtype), tpu
    )
    text, memory = figures(compiled)
    size, shape = largest_buffer(text)
    rows.append(
      {
        'length': length,
        'arguments': memory.argument_size_in_bytes,
        'temporaries': memory.temp_size_in_bytes,
        'largest': size,
        'shape': shape,
        'scores': 4 * args.heads * length**2,
        'sent': collectives.total(collectives.collectives(text, mesh)),
        'seconds': round(seconds, 1),
      }
    )
  print_ring(rows)
  return rows


def print_ring(rows) -> None:
  text = sharding_table.bytes_text
  header = ['ring of 8, on each device', 'arguments', 'temporaries', 'a token']
  header += ['largest buffer', 'its shape', 'T x T scores', 'sent']
  lines = [[*header, 'compiled in']]
  for row in rows:
    lines.append(
      [f'length {row["length"]}', text(row['arguments'])]
      + [text(row['temporaries']), text(row['temporaries'] / row['length'])]
      + [text(row['largest']), row['shape'], text(row['scores'])]
      + [text(row['sent']), f'{row["seconds"]:.0f} s']
    )
  print('\n'.join(text_table.aligned(lines, '<>>>>>>>>')))


if __name__ == '__main__':
  main()
