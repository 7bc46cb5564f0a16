"""A layer on a finely split sequence is the layer on a whole one."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.attention import mask as mask_lib
from t2x.layers import attention_config
from t2x.layers import attention_layer
from t2x.layers import dropout
from t2x.layers import param
from t2x.layers import sequence_parallel
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding

B, T, D = 2, 16, 8
RULES = sharding.Rules(norm_length=('context', 'tensor'))
WHOLE_KEYS = dataclasses.replace(RULES, kv_heads=None)
EXCHANGED = dataclasses.replace(RULES, context_attention='all_to_all')


def run(layer, x_BTD, keys_B):
  apply = lambda layer, x_BTD, keys_B: layer(
    x_BTD, mask_lib.make(causal=True), keys_B=keys_B
  )
  return sequence_parallel.run(apply, layer, x_BTD, keys_B)


def loss_and_gradients(layer, x_BTD, keys_B):
  def loss(layer, x_BTD):
    out = run(layer, x_BTD, keys_B)
    return (out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)).sum()

  return jax.value_and_grad(loss, (0, 1))(layer, x_BTD)


exhaustive = functools.partial(pytest.param, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize(
  'heads,kv_heads,rules,sizes',
  [
    exhaustive(8, 8, RULES, {'tensor': 4, 'data': 2}),
    (8, 4, RULES, {'tensor': 4, 'data': 2}),
    # Each device has its query heads, and all key heads to choose from.
    (8, 2, WHOLE_KEYS, {'tensor': 4, 'data': 2}),
    exhaustive(8, 4, WHOLE_KEYS, {'tensor': 2, 'data': 4}),
    (8, 1, WHOLE_KEYS, {'tensor': 8, 'data': 1}),
    exhaustive(8, 8, EXCHANGED, {'tensor': 4, 'context': 2, 'data': 1}),
    (8, 4, EXCHANGED, {'tensor': 2, 'context': 2, 'data': 2}),
  ],
)
def test_attention(heads, kv_heads, rules, sizes):
  config = attention_config.Dense(
    num_heads=heads, num_kv_heads=kv_heads, head_dim=4, bias=True, dropout=0.3
  )
  init = param.Init(std=0.5)
  layer = attention_layer.Attention(
    config, D, init=init, out_factor=1.0, rngs=nnx.Rngs(0)
  )
  x_BTD = jax.random.normal(jax.random.key(1), (B, T, D))
  keys_B = dropout.row_keys(jax.random.key(2), jnp.arange(B))
  want = jax.jit(loss_and_gradients)(layer, x_BTD, keys_B)
  rules = dataclasses.replace(rules, balance_context=False, batch=None)
  with sharding.use(mesh_lib.make(mesh_lib.MeshConfig(**sizes)), rules):
    got = jax.jit(lambda *args: loss_and_gradients(*args))(layer, x_BTD, keys_B)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    # A key's bias has a gradient of zero but for rounding.
    np.testing.assert_allclose(a, b, atol=1e-4 * max(1, np.abs(b).max()))
