"""What layouts that split sequences send and hold, against their theory."""

import jax
import lowered
import pytest
import tpu

from t2x.compilation import lowering
from t2x.config import experiment
from t2x.config import partitioning
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.hlo import collectives
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import norm
from t2x.layers import position
from t2x.layers import stack
from t2x.models import decoder
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.training import train_state

# LLVM's optimisations cost half the time and change no collective.
FAST = {'xla_backend_optimization_level': 0}

# --- A ring. ---

C, L, D, N, K, F, V = 8, 2, 128, 8, 2, 128, 256
ROWS, LENGTH = 4, 256


def ring_step(tpu_target, **rules):
  """Returns the collectives of a step on packed causal rows in zigzag order."""
  config = experiment.Experiment(
    model=decoder.DecoderConfig(
      vocab_size=V,
      num_layers=L,
      embed_dim=D,
      attention=attention_config.Dense(
        num_heads=N, num_kv_heads=K, head_dim=D // N
      ),
      mlp=mlp.MlpConfig(hidden=F, bias=False),
      norm=norm.RMSNorm(),
      position=position.Rotary(),
      tied_head='untied',
      dtype='bfloat16' if tpu_target else 'float32',
    ),
    data=data.DataConfig(
      length=LENGTH, batch_size=ROWS, tokenizer=tokenizers.Bytes()
    ),
    mesh=mesh_lib.MeshConfig(data=1, context=C),
    rules=sharding.Rules(**rules),
  )
  devices = tpu.devices('v5e:2x4') if tpu_target else jax.devices()
  mesh = mesh_lib.make(config.mesh, devices)
  assert partitioning.of(config, mesh.shape).zigzag == C
  text = tpu.compile_text(
    lowering.lower_step(config, mesh), **({} if tpu_target else FAST)
  )
  return collectives.collectives(text, mesh)


# A ring's own: of keys and values, of each device.
ELEMENTS = 2 * ROWS * (LENGTH // C) * K * (D // N)
PARAMETERS = L * (2 * D * D + 2 * D * D * K // N + 2 * D * F) + 2 * V * D
PARAMETERS += (2 * L + 1) * D


@pytest.mark.parametrize(
  ('tpu_target', 'reduce_dtype'),
  [
    (False, 'compute'),
    pytest.param(True, 'compute', marks=pytest.mark.slow),
    pytest.param(True, 'float32', marks=pytest.mark.slow),
  ],
)
def test_a_ring_sends_blocks_and_gathers_nothing(tpu_target, reduce_dtype):
  found = ring_step(tpu_target, reduce_dtype=reduce_dtype)
  block = (2 if tpu_target else 4) * ELEMENTS
  gradient = 4 * ELEMENTS if reduce_dtype == 'float32' else block
  sent = [c for c in found if c.kind == 'collective-permute']
  of_keys = [c for c in sent if c.dtype != 's32']
  # Forward; and backward, where their gradients go all the way home. On the
  # last hop they are rounded before they go, since they are right after it.
  want = L * ((C - 1) * (block + block + gradient) + block)
  assert collectives.total(of_keys) == want
  assert max(c.bytes for c in of_keys) <= max(block, gradient)
  # The segments of keys go along; the compiler may send them once for all.
  segments = 4 * ROWS * (LENGTH // C)
  times, rest = divmod(collectives.total(sent) - want, (C - 1) * segments)
  assert rest == 0 and 1 <= times <= 2 * L
  # What else crosses the mesh are gradients of weights, and scalars.
  others = {c.kind for c in found} - {'collective-permute'}
  assert others == {'all-reduce'}
  reduced = collectives.total(found, 'all-reduce')
  least = 2 if tpu_target and reduce_dtype == 'compute' else 4
  assert least * PARAMETERS <= reduced <= 4.1 * PARAMETERS


# --- Sequence parallelism. ---

FINE = sharding.Rules(norm_length=('context', 'tensor'))


def model_of(num_layers, width, hidden, vocab, dtype='float32'):
  return decoder.DecoderConfig(
    vocab_size=vocab,
    num_layers=num_layers,
    embed_dim=width,
    attention=attention_config.Dense(num_heads=8, head_dim=width // 8),
    mlp=mlp.MlpConfig(hidden=hidden, bias=False),
    norm=norm.RMSNorm(),
    position=position.Rotary(),
    tied_head='untied',
    dtype=dtype,
  )


def test_what_is_saved_between_layers_is_split():
  """By the compiler's figures: what 8 more layers add to the temporaries."""
  rows, length, width = 64, 64, 64
  mesh = mesh_lib.make(mesh_lib.MeshConfig(data=2, tensor=4))
  step = train_state.StepConfig(execution=stack.Execution(remat='full'))

  def temporaries(rules, num_layers):
    program = lowered.lower(
      mesh,
      model_of(num_layers, width, 64, 128),
      step,
      rules=rules,
      rows=rows,
      length=length,
    )
    compiled = program.compile(compiler_options=FAST)
    memory = compiled.memory_analysis()
    return memory.temp_size_in_bytes

  slope = lambda rules: temporaries(rules, 16) - temporaries(rules, 8)
  saved = 8 * 4 * (rows // 2) * length * width
  whole, split = slope(sharding.Rules()), slope(FINE)
  assert whole - split == pytest.approx(saved - saved // 4, rel=0.03)
  # Gradients of the layers' weights are in both.
  weights = 8 * 4 * (4 * width**2 + 2 * width * 64 + 4 * 2 * width) // 4
  assert saved // 4 <= split <= saved // 4 + 2 * weights


def test_tpus_gather_and_scatter_activations():
  """Where a device's part of a sequence fills the 16 rows of a tile.

  Smaller parts, of however large activations, are cut from whole sums.
  """
  num_layers, rows, length, width = 2, 2, 128, 128
  model = model_of(num_layers, width, 128, 1024, 'bfloat16')
  mesh = tpu.mesh(data=1, tensor=8)
  activation = 2 * rows * length * width

  def found_in(rules):
    program = lowered.lower(
      mesh,
      model,
      train_state.StepConfig(),
      rules=rules,
      rows=rows,
      length=length,
    )
    found = collectives.collectives(tpu.compile_text(program), mesh)
    return [c for c in found if c.bytes >= activation // 8]

  layers = [c for c in found_in(FINE) if c.loops]
  assert {c.bytes for c in layers} == {activation}
  for kind in ('all-gather', 'reduce-scatter'):
    times = sum(c.times for c in layers if c.kind == kind)
    assert times == 4 * num_layers
  assert {c.kind for c in layers} == {'all-gather', 'reduce-scatter'}
  plain = [c for c in found_in(sharding.Rules()) if c.loops]
  assert {c.kind for c in plain} == {'all-reduce'}
  assert sum(c.times * c.bytes for c in plain) == 4 * num_layers * activation


# --- Beside other axes: rows and heads stay where they are. ---


def beside(mesh, rules):
  """Collectives of an activation's size in the layers of a step, on TPUs."""
  num_layers, rows, length, width = 2, 8, 128, 128
  program = lowered.lower(
    mesh,
    model_of(num_layers, width, 128, 1024, 'bfloat16'),
    train_state.StepConfig(),
    rules=rules,
    rows=rows,
    length=length,
  )
  found = collectives.collectives(tpu.compile_text(program), mesh)
  return [c for c in found if c.loops], 2 * rows * length * width


def test_sequence_parallelism_moves_a_devices_own_rows():
  """Were they gathered over `fsdp` first, twice as much would move."""
  found, activation = beside(tpu.mesh(data=1, fsdp=2, tensor=4), FINE)
  for kind in ('all-gather', 'reduce-scatter'):
    moved = collectives.total(found, kind, 'tensor')
    assert moved == 4 * 2 * (activation // 2)
  weights = 2 * (4 * 128**2 + 2 * 128**2) // 4
  # Forward and backward; queries' and others' may be gathered once for both.
  gathered = collectives.total(found, 'all-gather', 'fsdp')
  assert 0 < gathered <= 2 * 2 * weights


def test_an_exchange_moves_a_devices_own_rows_and_heads():
  rules = sharding.Rules(context_attention='all_to_all')
  mesh = tpu.mesh(data=1, fsdp=2, context=2, tensor=2)
  found, activation = beside(mesh, rules)
  # Queries, keys, values and outputs, and the gradient of each.
  moved = collectives.total(found, 'all-to-all')
  assert moved == 8 * 2 * (activation // 8)
  gathered = [c for c in found if c.kind == 'all-gather']
  assert {c.axes for c in gathered} == {('fsdp',)}
