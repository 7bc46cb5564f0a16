"""The attention layer against products written out by hand."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.attention import mask as mask_lib
from t2x.layers import attention
from t2x.layers import attention_layer
from t2x.layers import dropout
from t2x.layers import param
from t2x.layers import position

B, T, D = 2, 6, 10
BASE = attention.Dense(num_heads=4, num_kv_heads=2, head_dim=4)
CAUSAL = mask_lib.make(causal=True)


def make(config):
  layer = attention_layer.Attention(
    config, D, init=param.Init(std=0.5), out_factor=1.0, rngs=nnx.Rngs(0)
  )
  leaves, treedef = jax.tree.flatten(layer)
  rng = np.random.default_rng(0)
  return treedef.unflatten(
    [x + jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for x in leaves]
  )


def inputs(length=T, seed=1):
  x = np.random.default_rng(seed).normal(size=(B, length, D))
  return jnp.asarray(x, jnp.float32)


def rms(x, scale):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale


def naive(layer, x, source=None, window=None, causal=True):
  """Softmax attention of every head, materialised."""
  config = layer.config
  x = np.asarray(x, np.float64)
  source = x if source is None else np.asarray(source, np.float64)
  array = lambda p: 0.0 if p is None else np.asarray(p[...], np.float64)
  q = np.einsum('btd,dnh->btnh', x, array(layer.q_DNH))
  k = np.einsum('bsd,dkh->bskh', source, array(layer.k_DKH))
  v = np.einsum('bsd,dkh->bskh', source, array(layer.v_DKH))
  q, k = q + array(layer.q_bias_NH), k + array(layer.k_bias_KH)
  v = v + array(layer.v_bias_KH)
  if config.qk_norm:
    q, k = rms(q, array(layer.q_norm.scale)), rms(k, array(layer.k_norm.scale))
  out = np.zeros((B, x.shape[1], D)) + array(layer.o_bias_D)
  for n in range(config.num_heads):
    kv = n // (config.num_heads // config.kv_heads)
    scores = np.einsum('bth,bsh->bts', q[:, :, n], k[:, :, kv])
    scores *= config.head_dim**-0.5 if config.scale is None else config.scale
    if config.soft_cap:
      scores = config.soft_cap * np.tanh(scores / config.soft_cap)
    distance = np.arange(x.shape[1])[:, None] - np.arange(source.shape[1])
    seen = (distance >= 0) if causal else np.full(distance.shape, True)
    if window:
      seen = seen & (distance < window)
    weights = np.where(seen, np.exp(scores - scores.max()), 0)
    weights /= weights.sum(-1, keepdims=True)
    heads = np.einsum('bts,bsh->bth', weights, v[:, :, kv])
    out += np.einsum('bth,hd->btd', heads, array(layer.o_NHD)[n])
  return out


CONFIGS = {
  'grouped-query': BASE,
  'biases': dataclasses.replace(BASE, bias=True),
  'qk norm': dataclasses.replace(BASE, qk_norm=True),
  'scale': dataclasses.replace(BASE, scale=1.0),
  'soft cap': dataclasses.replace(BASE, soft_cap=0.5),
  'local': attention.Local(num_heads=2, head_dim=4, window=3),
}


@pytest.mark.parametrize('name', CONFIGS)
def test_layer(name):
  config = CONFIGS[name]
  layer = make(config)
  x = inputs()
  got = jax.jit(lambda layer, x: layer(x, CAUSAL))(layer, x)
  want = naive(layer, x, window=3 if name == 'local' else None)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_every_option_matters():
  """Each config differs from the plain one on the same weights."""
  x = inputs()
  plain = naive(make(BASE), x)
  for change in ({'soft_cap': 0.5}, {'scale': 1.0}):
    other = make(dataclasses.replace(BASE, **change))
    assert np.abs(naive(other, x) - plain).max() > 0.01


def test_cross_attention():
  layer = make(BASE)
  x, source = inputs(), inputs(9, seed=2)
  got = layer(x, mask_lib.Mask(), encoded_BSD=source)
  np.testing.assert_allclose(
    got, naive(layer, x, source, causal=False), atol=2e-5
  )


def test_cache_equals_no_cache():
  """Three tokens at once, then one by one, as prefill and decode do."""
  layer = make(dataclasses.replace(BASE, bias=True))
  x = inputs()
  rotary = position.Rotary()
  positions = jnp.broadcast_to(jnp.arange(T), (B, T))
  want = layer(x, CAUSAL, positions_BT=positions, rotary=rotary)

  @jax.jit
  def step(x, index, cache):
    mask = mask_lib.make(causal=True, q_index_BT=index)
    return layer.step(x, mask, cache, positions_BT=index, rotary=rotary)

  cache = layer.empty_cache(B, T + 2, jnp.float32)
  out, cache = step(x[:, :3], positions[:, :3], cache)
  outs = [out]
  for t in range(3, T):
    out, cache = step(x[:, t : t + 1], positions[:, t : t + 1], cache)
    outs.append(out)
  np.testing.assert_allclose(jnp.concatenate(outs, 1), want, atol=2e-5)


def test_dropout_of_probabilities_keeps_their_mean():
  config = dataclasses.replace(BASE, dropout=0.4)
  layer = make(config)
  x = jnp.broadcast_to(inputs()[:1], (B, T, D))
  still = layer(x, CAUSAL)
  run = jax.jit(
    jax.vmap(
      lambda seed: layer(
        x,
        CAUSAL,
        keys_B=dropout.row_keys(jax.random.key(seed), jnp.arange(B)),
      )
    )
  )
  outs = np.asarray(run(jnp.arange(2000)))
  assert (outs[0, 0] != outs[0, 1]).any(), 'rows must draw apart'
  error = outs.std(0) / np.sqrt(2000)
  assert (np.abs(outs.mean(0) - still) < 5 * error + 1e-5).all()
  assert outs.std(0).min() > 1e-3


def test_heads_that_do_not_divide():
  with pytest.raises(
    ValueError, match='num_heads=6 must be a multiple of .*=4'
  ):
    attention.Dense(num_heads=6, num_kv_heads=4)
  with pytest.raises(ValueError, match='attention.window=0; a query sees'):
    attention.Local(window=0)
