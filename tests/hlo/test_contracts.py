"""Layouts held to their theory in bytes, in steps compiled for TPU.

There because the CPU's compiler turns bfloat16 into float32, and never
reduces and scatters at once.
"""

import functools

import lowered
import pytest
import tpu

from t2x.hlo import collectives
from t2x.hlo import matmul_flops
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import norm
from t2x.layers import position
from t2x.layers import stack
from t2x.losses import cross_entropy
from t2x.models import decoder
from t2x.parallel import sharding
from t2x.training import train_state

pytestmark = pytest.mark.slow  # Each step compiles for seconds.

L, D, F, N, V = 4, 256, 1024, 8, 1024
ROWS, LENGTH = 16, 64
MODEL = decoder.DecoderConfig(
  vocab_size=V,
  num_layers=L,
  embed_dim=D,
  attention=attention_config.Dense(num_heads=N, head_dim=D // N),
  mlp=mlp.MlpConfig(hidden=F, bias=False),
  norm=norm.RMSNorm(),
  position=position.Rotary(),
  tied_head='untied',
  dtype='bfloat16',
)
# Bytes in the dtype of the products.
SQUARE = 2 * D * D  # Of each of the four projections of attention.
LAYER = 4 * SQUARE + 2 * 2 * D * F
TABLE = 2 * V * D
NORMS = 4 * (2 * L + 1) * D  # float32
TOKENS = 4 * ROWS * LENGTH  # The ids of the batch, which `fsdp` gathers.
# Without it the compiler gathers a weight again if its uses lie far apart.
FAR = ('xla_tpu_spmd_threshold_for_allgather_cse=',)
# A few scalars are exchanged too: the loss, the gradient's norm.
near = functools.partial(pytest.approx, rel=0.01)


@functools.cache
def text_of(
  sizes, remat='none', reduce_dtype='compute', overrides=(), vocab_chunks=1
):
  rules = sharding.Rules(reduce_dtype=reduce_dtype)
  step = train_state.StepConfig(
    execution=stack.Execution(remat=remat),
    loss=cross_entropy.LossConfig(vocab_chunks=vocab_chunks),
  )
  program = lowered.lower(
    tpu.mesh(**dict(sizes)),
    MODEL,
    step,
    rules=rules,
    rows=ROWS,
    length=LENGTH,
    overrides=overrides,
  )
  return tpu.compile_text(program)


def step_of(mesh, *args, **kwargs):
  """Returns the collectives of a step."""
  text = text_of(tuple(mesh.items()), *args, **kwargs)
  return collectives.collectives(text, tpu.mesh(**mesh))


def reduced(found, dtype=None):
  found = [c for c in found if dtype in (None, c.dtype)]
  kinds = ('all-reduce', 'reduce-scatter')
  return sum(collectives.total(found, kind) for kind in kinds)


def gathered(found):
  return collectives.total(found, 'all-gather')


# --- Data parallel. ---


def test_data_parallel_reduces_each_gradient_once():
  found = step_of({'data': 8})
  assert {c.kind for c in found} == {'all-reduce'}
  # Matrices in the compute dtype, the head's too; the token table's rows and
  # the norms' scales are summed over tokens in float32, and so over devices.
  assert reduced(found, 'bf16') == near(L * LAYER + TABLE)
  assert reduced(found, 'f32') == near(2 * TABLE + NORMS)


def test_gradients_reduced_in_float32():
  found = step_of({'data': 8}, reduce_dtype='float32')
  assert reduced(found, 'bf16') == 0
  assert reduced(found) == near(2 * (L * LAYER + 2 * TABLE) + NORMS)


def test_chunks_of_the_vocabulary_too():
  """Their table's gradient is a product's, in the compute dtype by default."""
  found = step_of({'data': 8}, vocab_chunks=4)
  assert reduced(found, 'bf16') == near(L * LAYER + TABLE)
  found = step_of({'data': 8}, reduce_dtype='float32', vocab_chunks=4)
  assert reduced(found, 'bf16') == 0
  assert reduced(found) == near(2 * (L * LAYER + 2 * TABLE) + NORMS)


# --- FSDP. ---

FSDP = {'data': 1, 'fsdp': 8}


def test_fsdp_moves_three_passes_over_the_parameters():
  found = step_of(FSDP, 'full')
  # A layer is gathered for the forward and for the backward pass, the head
  # once. What is gathered is in the compute dtype, but for the tokens.
  assert gathered(found) == 2 * L * LAYER + TABLE + TOKENS
  kinds = {c.dtype for c in found if c.kind == 'all-gather'}
  assert kinds == {'bf16', 's32'}
  assert reduced(found, 'bf16') == L * LAYER + TABLE
  assert reduced(found, 'f32') == near(NORMS)
  # Vectors of a device's tokens are sent instead of the token table, and their
  # gradients come back to where it lies: no sum of it crosses the mesh.
  vectors = 2 * (ROWS * LENGTH // 8) * D
  assert collectives.total(found, 'all-to-all') == 2 * vectors
  want = 3 * L * LAYER + 2 * TABLE + NORMS + TOKENS + 2 * vectors
  assert collectives.total(found) == near(want, rel=1e-4)


def test_asynchronous_gathers_are_in_what_is_counted():
  """Else the counts above would say nothing of how these are told apart."""
  text = text_of(tuple(FSDP.items()), 'full')
  assert text.count('"AsyncCollectiveStart"') > 3
  parts = text.count('async_collective_fusion_config')
  assert parts > 2 * text.count('"AsyncCollectiveStart"')


def test_the_compiler_may_gather_far_weights_again():
  """Queries', keys' and values': used first forward, so last backward."""
  found = step_of(FSDP, 'full', overrides=FAR)
  extra = gathered(found) - 2 * L * LAYER - TABLE - TOKENS
  assert extra in [num * L * SQUARE for num in range(4)]


def test_fsdp_reduces_in_float32():
  found = step_of(FSDP, 'full', 'float32')
  assert reduced(found, 'bf16') == 0
  assert reduced(found) == near(2 * (L * LAYER + TABLE) + NORMS)
  # Weights still cross the mesh in the compute dtype.
  assert gathered(found) == 2 * L * LAYER + TABLE + TOKENS


# --- Tensor parallel. ---


@pytest.mark.parametrize(
  ('remat', 'num'),
  [
    ('none', 4),
    pytest.param('dots', 4, marks=pytest.mark.exhaustive),
    ('full', 5),
  ],
)
def test_tensor_parallel_sums_activations(remat, num):
  """After attention and feed-forward, and before both on the way back.

  What remat=full computes again includes attention's sum, which feed-forward
  reads; nothing reads its own.
  """
  found = step_of({'data': 1, 'tensor': 8}, remat)
  assert {c.kind for c in found} == {'all-reduce'}
  activation = 2 * ROWS * LENGTH * D
  layers = [c for c in found if c.loops]
  assert sum(c.times for c in layers) == num * L
  assert collectives.total(layers, axis='tensor') == num * L * activation
  # The embedding's rows, the head's gradient; and each token's largest logit,
  # sum of exponentials, and target's logit.
  outside = collectives.total(c for c in found if not c.loops)
  assert outside == near(2 * activation + 3 * 4 * ROWS * LENGTH)


# --- All at once. ---


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_nothing_is_gathered_but_one_layer(remat):
  found = step_of({'data': 2, 'fsdp': 2, 'tensor': 2}, remat)
  gathers = [c for c in found if c.kind == 'all-gather']
  assert gathers
  assert {c.axes for c in gathers} == {('fsdp',)}
  # Half of it: the other half belongs to the other device along `tensor`.
  assert max(c.bytes for c in gathers) == max(TABLE, 2 * D * F) // 2


# --- FLOPs. ---


def test_products_cost_six_flops_a_weight_and_token():
  """And those of attention; remat=full runs the forward pass again.

  Less each layer's last product, whose result the backward pass has no use
  for, and the head's.
  """
  tokens = ROWS * LENGTH // 8
  weights = L * (4 * D * D + 2 * D * F)
  # Scores and their product with the values; what the mask hides included.
  attention_flops = L * 2 * (2 * tokens * LENGTH * D)
  want = 6 * tokens * (weights + V * D) + 3 * attention_flops
  assert matmul_flops.matrix_flops(text_of((('data', 8),))) == want
  again = 2 * tokens * (weights - L * D * F) + attention_flops
  text = text_of(tuple(FSDP.items()), 'full')
  assert matmul_flops.matrix_flops(text) == want + again
