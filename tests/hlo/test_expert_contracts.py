"""Bytes of mixtures of experts, in steps compiled for TPU."""

import dataclasses
import functools

import lowered
import pytest
import tpu

from t2x.hlo import collectives
from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import norm
from t2x.layers import position
from t2x.layers import routing
from t2x.models import decoder
from t2x.training import train_state

pytestmark = pytest.mark.slow  # Each step compiles for seconds.

L, D, E, K, N = 4, 256, 8, 2, 8
ROWS, LENGTH = 16, 64
MODEL = decoder.DecoderConfig(
  vocab_size=1024,
  num_layers=L,
  embed_dim=D,
  attention=attention_config.Dense(num_heads=N, head_dim=D // N),
  mlp=moe.MoeConfig(hidden=512, bias=False, num_experts=E),
  norm=norm.RMSNorm(),
  position=position.Rotary(),
  tied_head='untied',
  dtype='bfloat16',
)
TOKENS = 2 * ROWS * LENGTH * D  # Bytes of the batch's activations.
# Routers' weights and logits, and scalars, are exchanged too.
near = functools.partial(pytest.approx, rel=0.02)


@functools.cache
def step_of(capacity, **sizes):
  router = routing.TokenChoice(top_k=K, capacity=capacity)
  model = dataclasses.replace(
    MODEL, mlp=dataclasses.replace(MODEL.mlp, router=router)
  )
  mesh = tpu.mesh(data=1, **sizes)
  program = lowered.lower(
    mesh, model, train_state.StepConfig(), rows=ROWS, length=LENGTH
  )
  return collectives.collectives(tpu.compile_text(program), mesh)


def test_slots_travel_by_all_to_all_there_and_back_twice():
  """To the experts and back, and so do their gradients."""
  capacity = 1.25
  found = step_of(capacity, expert=8)
  slots = capacity * K * TOKENS / 8
  assert collectives.total(found, 'all-to-all', 'expert') == 4 * L * slots
  assert collectives.total(found, 'all-gather') == 0


def test_experts_gradients_stay_where_the_experts_are():
  """What is reduced over `expert` is all but the experts' weights."""
  dense = dataclasses.replace(MODEL, mlp=mlp.MlpConfig(hidden=1, bias=False))
  mesh = tpu.mesh(data=1, expert=8)
  program = lowered.lower(
    mesh, dense, train_state.StepConfig(), rows=ROWS, length=LENGTH
  )
  rest = collectives.collectives(tpu.compile_text(program), mesh)
  want = collectives.total(rest, 'all-reduce')
  found = step_of(1.25, expert=8)
  routers = 4 * L * D * E
  assert collectives.total(found, 'all-reduce') == near(want + routers)


def test_without_capacity_tokens_are_gathered_and_outputs_scattered():
  found = step_of(None, expert=8)
  # Forward the tokens, backward the gradient of the outputs.
  assert collectives.total(found, 'all-gather') == near(2 * L * TOKENS)
  assert collectives.total(found, 'reduce-scatter') == near(2 * L * TOKENS)
  assert collectives.total(found, 'all-to-all') == 0


@pytest.mark.parametrize('capacity', [1.25, None])
def test_tensor_parallel_experts_add_no_reduction(capacity):
  """Four of an activation to a layer, as of a plain feed-forward layer."""
  found = step_of(capacity, expert=4, tensor=2)
  activation = TOKENS // 4
  sums = [c for c in found if c.axes == ('tensor',) and c.dtype == 'bf16']
  assert {c.kind for c in sums} == {'all-reduce'}
  # Also the look-up in the table, and the gradient of the features.
  assert collectives.total(sums) == near((4 * L + 2) * activation)
