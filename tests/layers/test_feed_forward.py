"""Norms, feed-forward layers and dropout against naive float32 versions."""

import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.layers import dropout
from t2x.layers import mlp
from t2x.layers import norm
from t2x.layers import param


def perturbed(module, seed=0):
  """The module with noise on all it has, so that no bias is zero."""
  leaves, treedef = jax.tree.flatten(module)
  rng = np.random.default_rng(seed)
  noise = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
  return treedef.unflatten([leaf + 0.3 * noise(leaf) for leaf in leaves])


NORMS = {
  'layer': norm.LayerNorm(eps=0.1),
  'no bias': norm.LayerNorm(eps=0.1, bias=False),
  'rms': norm.RMSNorm(eps=0.1),
}


@pytest.mark.parametrize('name', NORMS)
def test_norms(name):
  config = NORMS[name]
  layer = perturbed(norm.Norm(config, 6, rngs=nnx.Rngs(0)))
  x = np.random.default_rng(1).normal(2.0, 1.0, (2, 3, 6)).astype(np.float32)
  scale = np.asarray(layer.scale[...])
  assert (layer.bias is None) == (name != 'layer')
  got = layer(jnp.asarray(x))
  for index in np.ndindex(2, 3):
    row = x[index].astype(np.float64)
    if name == 'rms':
      want = row / math.sqrt((row**2).mean() + 0.1) * scale
    else:
      want = (row - row.mean()) / math.sqrt(row.var() + 0.1) * scale
    if layer.bias is not None:
      want = want + np.asarray(layer.bias[...])
    np.testing.assert_allclose(got[index], want, atol=1e-5)


def test_norm_computes_in_float32():
  """Squares of 300 overflow float16, and sums of bfloat16 are coarse."""
  layer = norm.Norm(norm.RMSNorm(), 64, rngs=nnx.Rngs(0))
  x = jnp.full((1, 1, 64), 300.0, jnp.float16)
  out = layer(x)
  assert out.dtype == jnp.float16
  np.testing.assert_allclose(out, 1.0, rtol=1e-3)


SCALARS = {
  'relu': lambda x: max(x, 0.0),
  'gelu': lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
  'gelu_tanh': lambda x: (
    0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
  ),
  'silu': lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize('gated', [False, True])
@pytest.mark.parametrize('act', SCALARS)
def test_mlp(act, gated):
  config = mlp.MlpConfig(hidden=5, activation=act, gated=gated)
  layer = perturbed(
    mlp.Mlp(
      config,
      4,
      init=param.Init(std=1.0),
      out_factor=1.0,
      rngs=nnx.Rngs(0),
    )
  )
  x = np.random.default_rng(1).normal(size=(2, 3, 4)).astype(np.float32)
  weights = {
    name: np.asarray(getattr(layer, name)[...], np.float64)
    for name in ('up_DF', 'up_bias_F', 'down_FD', 'down_bias_D')
  }
  up = x @ weights['up_DF'] + weights['up_bias_F']
  scalar = np.vectorize(SCALARS[act])
  if gated:
    hidden = scalar(x @ np.asarray(layer.gate_DF[...], np.float64)) * up
  else:
    hidden = scalar(up)
  want = hidden @ weights['down_FD'] + weights['down_bias_D']
  np.testing.assert_allclose(layer(jnp.asarray(x)), want, atol=2e-5)


def test_the_two_gelus_differ():
  x = jnp.asarray([-2.0, 0.7, 2.0])
  gap = mlp.activation('gelu', x) - mlp.activation('gelu_tanh', x)
  assert float(jnp.abs(gap).max()) > 5e-5


def test_dropout_belongs_to_rows():
  """A row's bits do not depend on the rows that stand beside it."""
  key, rows = jax.random.key(3), jnp.arange(8)
  x = jnp.ones((8, 50))
  drop = lambda x, rows: dropout.dropout(x, 0.3, dropout.row_keys(key, rows))
  whole = np.asarray(drop(x, rows))
  for part in (slice(0, 4), slice(4, 8), slice(6, 7)):
    np.testing.assert_array_equal(drop(x[part], rows[part]), whole[part])
  shuffled = jnp.asarray([5, 2, 7])
  np.testing.assert_array_equal(drop(x[:3], shuffled), whole[[5, 2, 7]])
  assert len({row.tobytes() for row in whole}) == 8


def test_dropout_rate_and_scale():
  keys = dropout.row_keys(jax.random.key(0), jnp.arange(4))
  out = np.asarray(dropout.dropout(jnp.ones((4, 5000)), 0.2, keys))
  assert set(np.unique(out)) == {np.float32(0), np.float32(1.25)}
  # Three standard errors of 20,000 draws.
  assert (out == 0).mean() == pytest.approx(0.2, abs=0.0085)


def test_dropout_keys_of_places_differ_and_none_means_none():
  keys = dropout.row_keys(jax.random.key(0), jnp.arange(2))
  x = jnp.ones((2, 200))
  at = lambda number: np.asarray(
    dropout.dropout(x, 0.5, dropout.fold(keys, number))
  )
  assert (at(0) != at(1)).any() and (at(1) == at(1)).all()
  assert dropout.fold(None, 3) is None
  np.testing.assert_array_equal(dropout.dropout(x, 0.5, None), x)
