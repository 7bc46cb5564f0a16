"""Attention's kernel in programs compiled for TPU: once, on a device's own."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import lowered
import pytest
import tpu

from t2x.attention import context
from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.compilation import lowering
from t2x.config import experiment
from t2x.data import config as data
from t2x.data import tokenizers
from t2x.hlo import collectives
from t2x.hlo import kernel_flops
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import norm
from t2x.layers import position
from t2x.layers import stack
from t2x.models import decoder
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.pipeline import config as pipeline_config
from t2x.training import train_state

ROWS, LENGTH, N, H = 8, 256, 8, 128
BLOCK = 128
# Pairs in the blocks of 128 at and below the diagonal.
PAIRS = 3 * BLOCK**2
# Two products forward; scores again, and dP, dV and dK, and again, dP, and dQ.
PRODUCTS = 2 + 4 + 3


def calls(text):
  """Returns the kernels' names, in order, without numbers."""
  found = re.findall(r'%(splash_mha_[a-z]+)[\w.]* = .*custom-call\(', text)
  return sorted(name.removeprefix('splash_mha_') for name in found)


def flops(rows, heads):
  return PRODUCTS * 2 * rows * heads * PAIRS * H


def attend(mesh, rules=sharding.Rules(), num_kv=N):
  """Returns the text of attention alone and of its gradients."""

  def shape(heads, axis):
    spec = sharding.to_spec(('batch', 'length', axis, None), rules, mesh=mesh)
    return jax.ShapeDtypeStruct(
      (ROWS, LENGTH, heads, H), jnp.bfloat16, sharding=NamedSharding(mesh, spec)
    )

  def both(q, k, v, d_out):
    mask = mask_lib.make(causal=True)
    options = dense.AttentionOptions(kernel='flash', block=BLOCK)
    fn = lambda q, k, v: context.attend(q, k, v, mask, options=options)
    out, back = jax.vjp(fn, q, k, v)
    return out, back(d_out)

  q, k = shape(N, 'heads'), shape(num_kv, 'kv_heads')
  places = q.sharding, (q.sharding, k.sharding, k.sharding)
  with sharding.use(mesh, rules):
    program = jax.jit(both, out_shardings=places).lower(q, k, k, q)
  return tpu.compile_text(program)


def test_rows_and_heads_stay_where_they_are():
  mesh = tpu.mesh(data=1, fsdp=4, tensor=2)
  text = attend(mesh, num_kv=4)
  assert calls(text) == ['dkv', 'dq', 'fwd']
  assert collectives.collectives(text, mesh) == []
  assert kernel_flops.kernel_flops(text) == flops(ROWS // 4, N // 2)


def test_keys_that_every_device_has():
  """Each picks those of its queries; their gradients are summed."""
  mesh = tpu.mesh(data=1, fsdp=2, tensor=4)
  text = attend(mesh, sharding.Rules(kv_heads=None), num_kv=2)
  assert calls(text) == ['dkv', 'dq', 'fwd']
  found = collectives.collectives(text, mesh)
  assert {(c.kind, c.axes) for c in found} == {('all-reduce', ('tensor',))}
  keys = 2 * (ROWS // 2) * LENGTH * 2 * H
  assert collectives.total(found) == 2 * keys
  assert kernel_flops.kernel_flops(text) == flops(ROWS // 2, N // 4)


def test_heads_that_were_exchanged():
  mesh = tpu.mesh(data=1, fsdp=2, context=4)
  text = attend(mesh, sharding.Rules(context_attention='all_to_all'))
  assert calls(text) == ['dkv', 'dq', 'fwd']
  found = collectives.collectives(text, mesh)
  assert {(c.kind, c.axes) for c in found} == {('all-to-all', ('context',))}
  own = 2 * (ROWS // 2) * (LENGTH // 4) * N * H
  assert collectives.total(found) == 8 * own
  assert kernel_flops.kernel_flops(text) == flops(ROWS // 2, N // 4)


# --- In whole steps. ---

L, D, F = 2, 256, 256
MODEL = decoder.DecoderConfig(
  vocab_size=512,
  num_layers=L,
  embed_dim=D,
  attention=attention_config.Dense(
    num_heads=N, head_dim=H, kernel='flash', block=BLOCK
  ),
  mlp=mlp.MlpConfig(hidden=F, bias=False),
  norm=norm.RMSNorm(),
  position=position.Rotary(),
  tied_head='untied',
  dtype='bfloat16',
)


@functools.cache
def step_of(remat='none', rules=sharding.Rules(), **sizes):
  step = train_state.StepConfig(execution=stack.Execution(remat=remat))
  program = lowered.lower(
    tpu.mesh(data=1, **sizes),
    MODEL,
    step,
    rules=rules,
    rows=ROWS,
    length=LENGTH,
  )
  return tpu.compile_text(program)


def carried(text):
  """Returns (dtype, shape) of all that any loop carries."""
  types = re.findall(r' = (\(.*\)) while\(', text)
  arrays = re.findall(r'\b(\w+)\[([\d,]+)\]', ' '.join(types))
  return [(dtype, tuple(map(int, dims.split(',')))) for dtype, dims in arrays]


@pytest.mark.slow
def test_sequence_parallelism_gathers_before_the_projections_alone():
  fine = sharding.Rules(norm_length=('context', 'tensor'))
  sizes = {'fsdp': 2, 'tensor': 4}
  text = step_of(rules=fine, **sizes)
  assert calls(text) == ['dkv', 'dq', 'fwd']
  found = collectives.collectives(text, tpu.mesh(data=1, **sizes))
  layers = [c for c in found if c.loops and 'tensor' in c.axes]
  activation = 2 * (ROWS // 2) * LENGTH * D
  assert {(c.kind, c.bytes) for c in layers} == {
    ('all-gather', activation),
    ('reduce-scatter', activation),
  }
  assert sum(c.times for c in layers) == 8 * L
  assert kernel_flops.kernel_flops(text) == L * flops(ROWS // 2, N // 4)


@pytest.mark.slow
def test_what_attention_gives_is_saved_once():
  """Its output and the sums of its softmax; the kernel does not run again."""
  text = step_of('save:attention', fsdp=8)
  assert calls(text) == ['dkv', 'dq', 'fwd']
  # One stack, in the loop that fills it and in the one that empties it.
  stacks = [each for each in carried(text) if each[1][0] == L]
  out, sums = (L, ROWS // 8, N, LENGTH, H), (L, ROWS // 8, N, LENGTH)
  one = lambda shape: tuple(n for n in shape if n > 1)
  kept = lambda shape: [t for t, s in stacks if one(s) == one(shape)]
  assert kept(out) == ['bf16', 'bf16'] and kept(sums) == ['f32', 'f32']


@pytest.mark.slow
def test_gradients_of_weights_are_stacked_in_the_compute_dtype():
  text = step_of('save:attention', fsdp=8)
  shard = D // 8
  shapes = {(L, shard, N, H), (L, N, H, shard), (L, shard, F), (L, F, shard)}
  found = [dtype for dtype, shape in carried(text) if shape in shapes]
  # Six matrices, forward and backward, and there six gradients.
  assert found == ['bf16'] * 18


@pytest.mark.slow
def test_stages_keep_what_it_gives():
  """It is named inside a `shard_map`, where the stages' policy finds it."""
  config = experiment.Experiment(
    model=MODEL,
    data=data.DataConfig(
      length=LENGTH, batch_size=ROWS, tokenizer=tokenizers.Bytes()
    ),
    train=experiment.TrainConfig(remat='save:attention'),
    mesh=mesh_lib.MeshConfig(data=1, pipe=2, tensor=4),
    pipeline=pipeline_config.PipelineConfig(microbatches=2),
  )
  mesh = mesh_lib.make(config.mesh, tpu.devices('v5e:2x4'))
  text = tpu.compile_text(lowering.lower_step(config, mesh))
  assert calls(text) == ['dkv', 'dq', 'fwd']
