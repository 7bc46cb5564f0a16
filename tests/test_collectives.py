"""What crosses the mesh in a step, read from the compiled program.

Every collective is counted with its bytes, the mesh axes that its groups span,
and how often the loops around it run it.
"""

import dataclasses
import functools
import math
import re

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from t2x import loss as loss_lib
from t2x import mesh as mesh_lib
from t2x import optim
from t2x import sharding
from t2x import train_step
from t2x.layers import attention
from t2x.layers import embed
from t2x.layers import mlp
from t2x.models import decoder

RULES = sharding.Rules()
KINDS = 'all-reduce|reduce-scatter|all-gather|all-to-all|collective-permute'
CALLEES = r'(?:calls|to_apply|(?:true|false)_computation)=%?([\w.\-]+)'
SIZES = {'pred': 1, 's32': 4, 'u32': 4, 'f32': 4, 'bf16': 2}
# LLVM's optimisations cost half the time and change no collective.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """`size` bytes on each device, `times` times, within `loops` loops."""

  kind: str
  size: int
  axes: frozenset[str]
  loops: int
  times: int


def computations(text):
  """Splits a program into its computations: name -> lines, and the entry."""
  result, entry, name = {}, None, None
  for line in text.splitlines():
    start = re.match(r'(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
    if start:
      name = start[2]
      entry = name if start[1] else entry
      result[name] = []
    elif name:
      result[name].append(line)
  return result, entry


def num_bytes(shape):
  parts = re.findall(r'(\w+)\[([\d,]*)\]', shape)
  count = lambda dims: math.prod(int(d) for d in dims.split(',') if d)
  return sum(SIZES[dtype] * count(dims) for dtype, dims in parts)


def groups_of(line):
  """The groups of devices that a collective joins, in any of HLO's forms."""
  name = '(?:replica_groups|source_target_pairs)='
  named = re.search(name + r'mesh\[(.*?)\](.*?) \{(.*?)\}', line)
  if named:
    sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
    sizes = {axis: int(size) for axis, size in sizes.items()}
    order = re.search(r'\[([\d,]+)\]T\(([\d,]+)\)', named[2])
    ids = np.arange(math.prod(sizes.values()))
    if order:
      shape, dims = (
        [int(i) for i in part.split(',')] for part in order.groups()
      )
      ids = ids.reshape(shape).transpose(dims)
    assert order or not named[2], line
    # Each joined axis, or a part of one: 'axis':(size before)size.
    parts = re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", named[3])
    shape, dims = [], []
    for axis, size in sizes.items():
      cuts = [(int(b), int(n)) for a, b, n in parts if a == axis and b]
      whole = [(1, size)] if (axis, '', '') in parts else []
      done = 1
      for start, length in sorted(cuts + whole):
        shape += [start // done, length]
        dims.append(len(shape) - 1)
        done = start * length
      shape.append(size // done)
    ids = np.moveaxis(ids.reshape(shape), dims, range(-len(dims), 0))
    return ids.reshape(-1, math.prod(ids.shape[-len(dims) :])).tolist()
  listed = re.search(name + r'\{(\{.*?\})\}', line)
  if listed:
    found = re.findall(r'\{([\d,]+)\}', listed[1])
    return [[int(i) for i in group.split(',')] for group in found]
  iota = r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?'
  tiled = re.search(name + iota, line)
  assert tiled, line
  shape, source, order = (
    [int(i) for i in (part or '').split(',') if i] for part in tiled.groups()
  )
  ids = np.arange(math.prod(source)).reshape(source)
  return np.transpose(ids, order or None).reshape(shape).tolist()


def axes_of(line, mesh):
  axes = set()
  for group in groups_of(line):
    places = np.array(np.unravel_index(group, mesh.devices.shape))
    moved = (places != places[:, :1]).any(1)
    axes |= {a for a, m in zip(mesh.axis_names, moved) if m}
  return frozenset(axes)


def collectives(compiled, mesh):
  """Lists what a program sends, loops followed into their bodies."""
  parts, entry = computations(compiled.as_text())
  found = []

  def walk(name, loops, times):
    for line in parts[name]:
      op = re.search(rf' = (.*?) ({KINDS})(?:-start)?\(', line)
      if op:
        found.append(
          Collective(op[2], num_bytes(op[1]), axes_of(line, mesh), loops, times)
        )
      for callee in re.findall(CALLEES, line):
        walk(callee, loops, times)
      body = re.search(r' while\(.*body=%?([\w.\-]+)', line)
      if body:
        trips = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
        assert trips, line
        walk(body[1], loops + 1, times * int(trips[1]))

  walk(entry, 0, 1)
  return found


def reduced(found, axis, *, inside):
  """Bytes reduced over an axis, scalars let off, in loops or outside."""
  kinds = ('all-reduce', 'reduce-scatter')
  return sum(
    c.size * c.times
    for c in found
    if c.kind in kinds
    and axis in c.axes
    and c.size > 64
    and bool(c.loops) == inside
  )


# --- One reduction over `data` for each step. ---

CONFIG = decoder.DecoderConfig(
  vocab_size=101,
  num_layers=2,
  embed_dim=32,
  vocab_multiple=8,
  attention=attention.Dense(num_heads=8, head_dim=4),
  mlp=mlp.MlpConfig(hidden=64),
)
TX = optim.make(optim.Sgd(clip_norm=None), 10)
ROWS, LENGTH, ACCUMULATE = 32, 16, 4


def init(key, config):
  model = decoder.Decoder(CONFIG, rngs=nnx.Rngs(key))
  return train_step.init_state(model, TX, config)


def step_shapes(mesh, config):
  """The arguments of a step, as sharded shapes."""
  key = jax.eval_shape(jax.random.key, 0)
  state = jax.eval_shape(functools.partial(init, config=config), key)
  state = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    state,
    train_step.state_shardings(state, mesh, RULES, config),
  )
  spec = sharding.to_spec(('batch', 'length'), RULES, mesh=mesh)
  rows = lambda dtype: jax.ShapeDtypeStruct(
    (ROWS, LENGTH), dtype, sharding=NamedSharding(mesh, spec)
  )
  batch = {name: rows(jnp.int32) for name in ('inputs', 'targets')}
  return state, {**batch, 'weights': rows(jnp.float32)}, key


def step_collectives(mesh, config, step=train_step.train_step):
  args = step_shapes(mesh, config)
  shardings = jax.tree.map(lambda x: x.sharding, args[0])
  fn = jit(
    functools.partial(step, tx=TX, config=config),
    out_shardings=(shardings, NamedSharding(mesh, P())),
  )
  with sharding.use(mesh, RULES):
    return collectives(fn.lower(*args).compile(), mesh)


def plain_step(state, batch, key, *, tx, config):
  """Accumulation as one would write it first: a scan, left to the compiler."""
  once = dataclasses.replace(config, accumulate=1)
  trained, rest = train_step.partition(state.model, config.trainable)
  split = lambda x: x.reshape(-1, ACCUMULATE, LENGTH).swapaxes(0, 1)
  parts = jax.tree.map(split, batch)

  def add(sums, part):
    grads, metrics = train_step.gradients(trained, rest, part, key, once)
    return jax.tree.map(jnp.add, sums, grads), metrics

  zeros = jax.tree.map(jnp.zeros_like, trained)
  grads, metrics = jax.lax.scan(add, zeros, parts)
  updates, opt_state = tx.update(grads, state.opt_state, trained)
  model = train_step.combine(optax.apply_updates(trained, updates), rest)
  new = dataclasses.replace(state, model=model, opt_state=opt_state)
  return new, jax.tree.map(jnp.sum, metrics)


def mesh_of(**sizes):
  return mesh_lib.make(mesh_lib.MeshConfig(**sizes))


def gradient_bytes(mesh, config):
  """Bytes on one device of gradients split as their parameters are."""
  model = step_shapes(mesh, config)[0].model
  return sum(
    4 * math.prod(x.sharding.shard_shape(x.shape))
    for x in jax.tree.leaves(model)
  )


STEP = train_step.StepConfig(accumulate=ACCUMULATE)
WHOLE = dataclasses.replace(STEP, accumulate_whole=True)
MESHES = {
  'data8': {'data': 8},
  'data4_fsdp2': {'data': 4, 'fsdp': 2},
  'data2_fsdp2_tensor2': {'data': 2, 'fsdp': 2, 'tensor': 2},
}


@pytest.mark.parametrize('sizes', MESHES)
def test_one_reduction_over_data(sizes):
  mesh = mesh_of(**MESHES[sizes])
  found = step_collectives(mesh, STEP)
  assert reduced(found, 'data', inside=True) == 0
  size = gradient_bytes(mesh, STEP)
  assert size <= reduced(found, 'data', inside=False) < 1.01 * size


def test_fsdp_reduces_in_the_loop_or_once():
  """Each microbatch's gradients, or whole gradients: memory against bytes."""
  mesh = mesh_of(data=4, fsdp=2)
  found = step_collectives(mesh, STEP)
  whole = gradient_bytes(mesh_of(data=8), STEP)
  assert reduced(found, 'fsdp', inside=True) > whole
  found = step_collectives(mesh, WHOLE)
  assert reduced(found, 'fsdp', inside=True) == 0
  assert reduced(found, 'data', inside=True) == 0
  assert whole <= reduced(found, 'fsdp', inside=False) < 1.01 * whole
  # Parameters are gathered before the loop, once.
  assert not [c for c in found if c.kind == 'all-gather' and c.loops]


def test_a_plain_scan_reduces_in_the_loop():
  """So these tests can tell: a reduction for every microbatch."""
  mesh = mesh_of(data=8)
  found = step_collectives(mesh, STEP, plain_step)
  size = gradient_bytes(mesh, STEP)
  assert reduced(found, 'data', inside=True) > (ACCUMULATE - 0.1) * size


# --- The vocabulary table of a chunked loss. ---

VOCAB, D = 1024, 32


def loss_collectives(mesh, **chunks):
  where = lambda *spec: NamedSharding(mesh, P(*spec))
  rows = where(('data', 'fsdp'))
  x = jax.ShapeDtypeStruct((8, 16, D), jnp.float32, sharding=rows)
  targets = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=rows)
  table = jax.ShapeDtypeStruct(
    (VOCAB, D), jnp.float32, sharding=where('tensor', 'fsdp')
  )
  config = loss_lib.LossConfig(**chunks)

  def mean(x, table, targets):
    head = embed.Head(table_VD=table, vocab_size=VOCAB)
    weights = jnp.ones(targets.shape) / targets.size
    return loss_lib.mean_loss(x, head, targets, weights, config).objective

  out = where(), (rows, table.sharding)
  fn = jit(jax.value_and_grad(mean, (0, 1)), out_shardings=out)
  with sharding.use(mesh, RULES):
    return collectives(fn.lower(x, table, targets).compile(), mesh)


def test_the_table_crosses_the_mesh_once():
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  found = loss_collectives(mesh, vocab_chunks=8)
  table = 4 * VOCAB * D // 2  # The part of a device along `tensor`.
  gathers = [c for c in found if c.kind == 'all-gather']
  assert [(c.size, c.loops) for c in gathers] == [(table, 0)]
  # Chunk by chunk, each row's gradient once.
  for axis in ('data', 'fsdp'):
    over = [c for c in found if axis in c.axes and c.kind == 'all-reduce']
    total = sum(c.size * c.times for c in over)
    assert table <= total < 1.01 * table


def test_chunks_of_tokens_reduce_the_table_once():
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  found = loss_collectives(mesh, token_chunks=4)
  table = 4 * VOCAB * D // 2
  gathers = [c for c in found if c.kind == 'all-gather' and c.size == table]
  assert [c.loops for c in gathers] == [0]
  # Scattered over the devices that split it, then summed part by part.
  for axis, size in (('fsdp', table), ('data', table // 2)):
    assert reduced(found, axis, inside=True) == 0
    assert size <= reduced(found, axis, inside=False) < 1.02 * size
