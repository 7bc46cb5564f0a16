"""What the balancer is told of layers is what they store, and their sizes."""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import norm
from t2x.layers import position
from t2x.layers import routing
from t2x.losses import cross_entropy
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import encoder_decoder
from t2x.models import model as model_lib
from t2x.parallel import sharding
from t2x.pipeline import layer_costs
from t2x.pipeline import pieces as pieces_lib
from t2x.pipeline import placement
from t2x.pipeline import schedules
from t2x.pipeline import weights
from t2x.training import train_state

ROWS, LENGTH = 2, 128
HEADS = attention_config.Dense(num_heads=4, num_kv_heads=2, head_dim=16)
SHARED = {
  'vocab_size': 96,
  'vocab_multiple': 32,
  'num_layers': 4,
  'embed_dim': 32,
  'attention': HEADS,
  'mlp': mlp.MlpConfig(hidden=48),
}
GATED = mlp.MlpConfig(hidden=48, gated=True, activation='silu', bias=False)
EXPERTS = moe.MoeConfig(
  hidden=24, num_experts=4, gated=True, router=routing.TokenChoice(top_k=2)
)
CONFIGS = {
  'decoder': decoder.DecoderConfig(**SHARED),
  'bfloat16': decoder.DecoderConfig(
    **SHARED | {'mlp': GATED}, dtype='bfloat16', position=position.Rotary()
  ),
  'encoder': encoder.EncoderConfig(**SHARED, residual='post_norm'),
  'encoder_decoder': encoder_decoder.EncoderDecoderConfig(
    **SHARED, position=position.RelativeBuckets()
  ),
  'experts': decoder.DecoderConfig(**SHARED, mlp_pattern=(GATED, EXPERTS)),
  'sandwich': decoder.DecoderConfig(
    **SHARED,
    norm=norm.RMSNorm(unit_offset=True),
    residual='sandwich',
    logit_soft_cap=5.0,
  ),
  'qk_norm': decoder.DecoderConfig(
    **SHARED | {'attention': dataclasses.replace(HEADS, qk_norm=True)}
  ),
}
WHOLE = layer_costs.MeshSplit(sizes={'pipe': 2}, rules=sharding.Rules())


def batch_of(config):
  encodes = isinstance(config, encoder_decoder.EncoderDecoderConfig)
  source = LENGTH // 2 if encodes else None
  return layer_costs.Batch(
    rows=ROWS, length=LENGTH, num_targets=LENGTH, encoder_length=source
  )


def shapes_of(config):
  make = lambda key: model_lib.make(config, rngs=nnx.Rngs(key))
  return jax.eval_shape(make, jax.random.key(0))


def pieces_of(config):
  """The programs that a pipeline would run of a microbatch."""
  model = shapes_of(config)
  nothing = jax.tree.map(lambda _: None, model)
  one = lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype)
  units = {}
  for name in model.towers:
    members = getattr(model, name).layers.group
    own = [jax.tree.map(one, member) for member in members]
    units[name] = [(m, jax.tree.map(lambda _: None, m)) for m in own]
  array = lambda length, dtype: jax.ShapeDtypeStruct((ROWS, length), dtype)
  rows = {
    'inputs': array(LENGTH, jnp.int32),
    'targets': array(LENGTH, jnp.int32),
    'weights': array(LENGTH, jnp.float32),
    'rows': jax.ShapeDtypeStruct((ROWS,), jnp.int32),
    'row_shares': jax.ShapeDtypeStruct((ROWS,), jnp.float32),
  }
  source = batch_of(config).encoder_length
  if source is not None:
    rows['encoder_inputs'] = array(source, jnp.int32)
  return pieces_lib.make(
    weights.outside_layers(model),
    nothing,
    units,
    rows,
    jax.eval_shape(lambda: jax.random.key(0)),
    combine=train_state.combine,
    loss=cross_entropy.of_terms,
    zigzag=1,
    remat='none',
  )


def stacks_of(config, layout=WHOLE, batch=None):
  """Returns stacks with their bytes, and those of a device besides."""
  group = len(config.group)
  num = config.num_layers
  names = (
    ('encoder', 'decoder')
    if isinstance(config, encoder_decoder.EncoderDecoderConfig)
    else ('tower',)
  )
  towers = [placement.TowerLayers(name, num, group) for name in names]
  batch = batch or batch_of(config)
  table = schedules.make('one_f_one_b', num_stages=2, num_microbatches=2)
  stacks = layer_costs.stacks(config, towers, batch, False)
  return layer_costs.with_bytes(stacks, table, config, batch, layout)


def size(tree):
  return sum(
    math.prod(leaf.shape) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )


@pytest.mark.parametrize('name', CONFIGS)
def test_activations_are_those_that_a_pipeline_stores(name):
  stacks, _, _ = stacks_of(CONFIGS[name])
  exact = 0.0 if name != 'experts' else 0.02
  layers = pieces_of(CONFIGS[name]).layers
  for stack, pieces in zip(stacks, layers, strict=True):
    stored = sum(size(piece.stored) for piece in pieces)
    crossing = sum(size(piece.crossing) for piece in pieces)
    assert stack.kept_bytes == pytest.approx(stored, rel=exact)
    assert stack.left_bytes == pytest.approx(crossing, rel=exact)


@pytest.mark.parametrize('name', CONFIGS)
def test_parameters_are_counted(name):
  """16 bytes each where nothing is split but the stages, and a copy."""
  config = CONFIGS[name]
  model = shapes_of(config)
  tower_of = lambda stack: getattr(model, stack.tower.name)
  count = lambda tree: sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
  stacks, fixed, moved = stacks_of(config)
  copy = 2 if name == 'bfloat16' else 4
  in_layers = 0
  for stack in stacks:
    units = len(stack.costs)
    layers = count(tower_of(stack).layers)
    in_layers += layers
    assert stack.unit_bytes == (copy + 4) * layers / units
  assert moved == 4 * in_layers / 2
  everything = count(model)
  batch = batch_of(config)
  logits = 2 * 4 * ROWS * LENGTH * 96
  messages = fixed - logits - 12 * everything / 2 - 8 * (everything - in_layers)
  tokens = ROWS * (LENGTH + (batch.encoder_length or 0))
  each = tokens * config.embed_dim * copy
  # Inputs and gradients of two microbatches at the most, and one for no one.
  assert messages % each == 0 and 3 <= messages / each <= 6


def test_what_mesh_axes_split():
  config, batch = CONFIGS['bfloat16'], batch_of(CONFIGS['bfloat16'])
  one = dataclasses.replace
  of = lambda gather='once', **sizes: stacks_of(
    config, one(WHOLE, sizes={'pipe': 2, **sizes}, gather=gather)
  )[0][0]
  whole, tensor, fsdp = of(), of(tensor=2), of(fsdp=2)
  # Norms are whole, and so are the 2 x 32 numbers of a token between layers.
  norms = 4 * config.embed_dim
  assert tensor.unit_bytes == (whole.unit_bytes - 6 * norms) / 2 + 6 * norms
  between = 2 * 2 * config.embed_dim * ROWS * LENGTH
  assert tensor.kept_bytes == (whole.kept_bytes - between) / 2 + between
  # fsdp splits gradients, and the copies only if each tick gathers them.
  assert 0.6 < fsdp.unit_bytes / whole.unit_bytes < 0.7
  each_tick = of(gather='tick', fsdp=2).unit_bytes
  assert 0.5 <= each_tick / whole.unit_bytes < 0.52
  assert fsdp.kept_bytes == whole.kept_bytes
  fixed = lambda **settings: stacks_of(config, batch=one(batch, **settings))[1]
  assert fixed() - fixed(head_chunks=4) == 0.75 * 8 * ROWS * LENGTH * 96


def test_dearer_layers_and_the_head():
  """Costs are FLOPs: 3 forwards of each, 4 of a layer that is run again."""
  config = CONFIGS['experts']
  tower = placement.TowerLayers('tower', 3, 2)
  of = lambda again: layer_costs.stacks(
    dataclasses.replace(config, num_layers=3), [tower], batch_of(config), again
  )[0]
  once, again = of(False), of(True)
  assert [a / b for a, b in zip(again.costs, once.costs)] == [4 / 3] * 2
  head = 3 * 2 * LENGTH * config.vocab_size * config.embed_dim
  assert once.last == again.last == head
  # Two layers, and one: its feed-forward layer is gated and has no router.
  assert once.costs[1] < once.costs[0] < 2.2 * once.costs[1]
