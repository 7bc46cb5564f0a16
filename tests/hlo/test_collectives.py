"""What crosses the mesh in a step, read from the compiled program.

Bytes are those of each device, with the trips of the loops around counted.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import lowered
import optax
import pytest

from t2x.hlo import collectives
from t2x.layers import attention_config
from t2x.layers import embed
from t2x.layers import mlp
from t2x.losses import cross_entropy
from t2x.models import decoder
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.training import train_state
from t2x.training import train_step

RULES = sharding.Rules()
# LLVM's optimisations cost half the time and change no collective.
FAST = {'xla_backend_optimization_level': 0}


def collectives_of(program, mesh):
  text = program.compile(compiler_options=FAST).as_text()
  return collectives.collectives(text, mesh)


def reduced(found, axis, *, inside):
  """Bytes reduced over an axis, scalars let off, in loops or outside."""
  found = [c for c in found if c.bytes > 64 and bool(c.loops) == inside]
  kinds = ('all-reduce', 'reduce-scatter')
  return sum(collectives.total(found, kind, axis) for kind in kinds)


# --- One reduction over `data` for each step. ---

CONFIG = decoder.DecoderConfig(
  vocab_size=101,
  num_layers=2,
  embed_dim=32,
  vocab_multiple=8,
  attention=attention_config.Dense(num_heads=8, head_dim=4),
  mlp=mlp.MlpConfig(hidden=64),
)
ACCUMULATE = 4


def step_collectives(mesh, config, **options):
  return collectives_of(lowered.lower(mesh, CONFIG, config, **options), mesh)


def plain_step(state, batch, key, *, tx, config):
  """Accumulation as one would write it first: a scan, left to the compiler."""
  once = dataclasses.replace(config, accumulate=1)
  trained, rest = train_state.partition(state.model, config.trainable)
  split = lambda x: x.reshape(-1, ACCUMULATE, x.shape[1]).swapaxes(0, 1)
  parts = jax.tree.map(split, batch)

  def add(sums, part):
    grads, metrics = train_step.gradients(trained, rest, part, key, once)
    return jax.tree.map(jnp.add, sums, grads), metrics

  zeros = jax.tree.map(jnp.zeros_like, trained)
  grads, metrics = jax.lax.scan(add, zeros, parts)
  updates, opt_state = tx.update(grads, state.opt_state, trained)
  model = train_state.combine(optax.apply_updates(trained, updates), rest)
  new = dataclasses.replace(state, model=model, opt_state=opt_state)
  return new, jax.tree.map(jnp.sum, metrics)


def mesh_of(**sizes):
  return mesh_lib.make(mesh_lib.MeshConfig(**sizes))


def gradient_bytes(mesh, config):
  """Bytes on one device of gradients split as their parameters are."""
  model = lowered.shapes(mesh, CONFIG, config)[0].model
  return sum(
    4 * math.prod(x.sharding.shard_shape(x.shape))
    for x in jax.tree.leaves(model)
  )


STEP = train_state.StepConfig(accumulate=ACCUMULATE)
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
  found = step_collectives(mesh, STEP, step=plain_step)
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
  config = cross_entropy.LossConfig(**chunks)

  def mean(x, table, targets):
    head = embed.Head(table_VD=table, vocab_size=VOCAB)
    weights = jnp.ones(targets.shape) / targets.size
    return cross_entropy.mean_loss(x, head, targets, weights, config).objective

  out = where(), (rows, table.sharding)
  fn = jax.jit(jax.value_and_grad(mean, (0, 1)), out_shardings=out)
  with sharding.use(mesh, RULES):
    return collectives_of(fn.lower(x, table, targets), mesh)


def test_the_table_crosses_the_mesh_once():
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  found = loss_collectives(mesh, vocab_chunks=8)
  table = 4 * VOCAB * D // 2  # The part of a device along `tensor`.
  gathers = [c for c in found if c.kind == 'all-gather']
  assert [(c.bytes, c.loops) for c in gathers] == [(table, 0)]
  # Chunk by chunk, each row's gradient once.
  for axis in ('data', 'fsdp'):
    size = collectives.total(found, 'all-reduce', axis)
    assert table <= size < 1.01 * table


def test_chunks_of_tokens_reduce_the_table_once():
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  found = loss_collectives(mesh, token_chunks=4)
  table = 4 * VOCAB * D // 2
  gathers = [c for c in found if c.kind == 'all-gather' and c.bytes == table]
  assert [c.loops for c in gathers] == [0]
  # Scattered over the devices that split it, then summed part by part.
  for axis, size in (('fsdp', table), ('data', table // 2)):
    assert reduced(found, axis, inside=True) == 0
    assert size <= reduced(found, axis, inside=False) < 1.02 * size


# --- Sequence parallelism. ---


def test_sums_become_gathers_and_scatters():
  """Of activations; what is left to sum in a layer are scales of norms."""
  mesh = mesh_of(data=1, tensor=8)
  rules = sharding.Rules(norm_length=('context', 'tensor'))
  step = train_state.StepConfig()
  activation = 4 * 32 * 16 * CONFIG.embed_dim  # float32, rows, tokens, width
  inside = lambda found, kind: [
    c for c in found if c.kind == kind and c.loops and c.bytes > 1024
  ]
  found = step_collectives(mesh, step, rules=rules)
  for kind in ('all-gather', 'reduce-scatter'):
    layer = inside(found, kind)
    assert [c.bytes for c in layer] == [activation] * 4
    assert {c.times for c in layer} == {CONFIG.num_layers}
  assert not inside(found, 'all-reduce') and not inside(found, 'all-to-all')
  # Without it whole activations are summed; the CPU's compiler sums those of
  # queries, keys and values apart.
  summed = inside(step_collectives(mesh, step), 'all-reduce')
  assert sum(c.bytes for c in summed) == 6 * activation
