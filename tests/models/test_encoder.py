"""Encoders whose head reads the predicted positions alone."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.hlo import matmul_flops
from t2x.layers import attention_config
from t2x.layers import convolution
from t2x.layers import linear
from t2x.layers import low_rank
from t2x.layers import mlp
from t2x.layers import position
from t2x.layers import sparse
from t2x.losses import cross_entropy
from t2x.models import decoder
from t2x.models import encoder
from t2x.models import flops
from t2x.objectives import masked_lm

CONFIG = encoder.EncoderConfig(
  vocab_size=300,
  num_layers=1,
  embed_dim=32,
  attention=attention_config.Dense(num_heads=4, head_dim=8),
  mlp=mlp.MlpConfig(hidden=48),
)
ROWS, LENGTH = 4, 64


def shapes(num_targets=None):
  int32 = lambda *shape: jax.ShapeDtypeStruct((ROWS, *shape), jnp.int32)
  batch = {'inputs': int32(LENGTH), 'targets': int32(num_targets or LENGTH)}
  if num_targets:
    batch['target_positions'] = int32(num_targets)
  return batch


def loss(model, batch):
  targets = batch['targets']
  inputs = {n: a for n, a in batch.items() if n != 'targets'}
  weights = jnp.full(targets.shape, 1 / targets.size)
  x_BMD = model.hidden(**inputs)
  return cross_entropy.mean_loss(x_BMD, model.head, targets, weights).objective


def counted(batch):
  """The FLOPs of a forward pass, as compiled."""
  make = lambda: encoder.Encoder(CONFIG, rngs=nnx.Rngs(0))
  compiled = jax.jit(loss).lower(jax.eval_shape(make), batch).compile()
  return matmul_flops.matrix_flops(compiled.as_text())


def test_kinds_that_do_not_fit():
  make = lambda kind, **rest: dataclasses.replace(
    CONFIG, attention=kind, **rest
  )
  with pytest.raises(ValueError, match='width=4: an encoder has as many taps'):
    make(convolution.Convolution(num_heads=4, width=4))
  with pytest.raises(
    ValueError, match='relative adds to scores, and model.att'
  ):
    make(linear.Linear(num_heads=4), position=position.RelativeBuckets())
  apart = sparse.Longformer(num_heads=4, global_projections=True)
  with pytest.raises(ValueError, match='takes learned or sinusoidal positions'):
    make(apart, position=position.Rotary())
  assert make(apart).attention == apart


@pytest.mark.parametrize(
  'kind',
  [
    low_rank.Linformer(num_heads=4),
    sparse.Longformer(num_heads=4, global_projections=True),
  ],
)
def test_kinds_that_a_decoder_cannot_have(kind):
  with pytest.raises(ValueError, match='model.kind=encoder'):
    decoder.DecoderConfig(attention=kind)


def test_predicted_positions_have_the_features_that_they_have_among_all():
  model = encoder.Encoder(CONFIG, rngs=nnx.Rngs(0))
  ids = jax.random.randint(jax.random.key(0), (3, 20), 0, 300)
  places = jnp.asarray([[1, 5, 7], [0, 3, 19], [2, 4, 0]])
  features = jax.jit(lambda **inputs: model.hidden(**inputs))
  some = features(inputs=ids, target_positions=places)
  among = jnp.take_along_axis(features(inputs=ids), places[..., None], axis=1)
  np.testing.assert_allclose(some, among, atol=2e-6)


@pytest.mark.usefixtures('compiled_as_by_users')
def test_the_heads_cost_falls_with_the_rate():
  num = masked_lm.MaskedLM(rate=0.25).num_targets(LENGTH)
  assert num == LENGTH // 4
  head = 2 * ROWS * LENGTH * 32 * (384 + 32)  # 300 rows are padded to 384.
  whole, some = counted(shapes()), counted(shapes(num))
  assert whole - some == head * 3 // 4
  # The model's own count, without the padded rows.
  parts = flops.forward_parts(CONFIG, flops.BatchShape(ROWS, LENGTH))
  few = flops.forward_parts(
    CONFIG, flops.BatchShape(ROWS, LENGTH, num_targets=num)
  )
  assert 4 * few.pop('head') == parts.pop('head')
  assert few == parts
