"""The attention layer against products written out by hand."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.attention import mask as mask_lib
from t2x.layers import attention_config
from t2x.layers import attention_layer
from t2x.layers import block
from t2x.layers import dropout
from t2x.layers import mlp
from t2x.layers import norm
from t2x.layers import param
from t2x.layers import position
from t2x.models import decoder

B, T, D = 2, 6, 10
BASE = attention_config.Dense(num_heads=4, num_kv_heads=2, head_dim=4)
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


def rms(x, scale, eps=1e-6):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


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
    q = rms(q, array(layer.q_norm.scale), config.qk_norm_eps)
    k = rms(k, array(layer.k_norm.scale), config.qk_norm_eps)
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
  'no bias of the output': dataclasses.replace(BASE, bias=True, out_bias=False),
  'qk norm': dataclasses.replace(BASE, qk_norm=True),
  'qk norm of another eps': dataclasses.replace(
    BASE, qk_norm=True, qk_norm_eps=0.5
  ),
  'scale': dataclasses.replace(BASE, scale=1.0),
  'soft cap': dataclasses.replace(BASE, soft_cap=0.5),
  'local': attention_config.Local(num_heads=2, head_dim=4, window=3),
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


def test_biases_are_those_that_the_config_names():
  layer = make(CONFIGS['no bias of the output'])
  assert layer.q_bias_NH is not None and layer.o_bias_D is None
  of_output = make(dataclasses.replace(BASE, out_bias=True))
  assert of_output.q_bias_NH is None and of_output.o_bias_D is not None


@pytest.mark.parametrize('residual', ['pre_norm', 'sandwich'])
@pytest.mark.parametrize('unit_offset', [False, True])
def test_norms_of_a_block(residual, unit_offset):
  """Before a branch, and in sandwich order of what it adds."""
  made = block.Block(
    BASE,
    mlp.MlpConfig(hidden=6, activation='relu', bias=False),
    norm.RMSNorm(unit_offset=unit_offset),
    D,
    residual=residual,
    dropout_rate=0.0,
    init=param.Init(std=0.5),
    out_factor=1.0,
    rngs=nnx.Rngs(0),
  )
  start = np.asarray(made.mlp_norm.scale[...])
  np.testing.assert_array_equal(start, 0.0 if unit_offset else 1.0)
  leaves, treedef = jax.tree.flatten(made)
  rng = np.random.default_rng(1)
  draw = lambda x: x + jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype)
  made = treedef.unflatten(list(map(draw, leaves)))

  def normed(layer, x):
    if layer is None:
      return x
    return rms(x, np.asarray(layer.scale[...], np.float64) + unit_offset)

  def feed_forward(x):
    up, down = (np.asarray(w[...]) for w in (made.mlp.up_DF, made.mlp.down_FD))
    return np.maximum(x @ up, 0) @ down

  x = np.asarray(inputs(), np.float64)
  assert (made.attention_out_norm is None) == (residual == 'pre_norm')
  branch = naive(made.attention, normed(made.attention_norm, x))
  want = x + normed(made.attention_out_norm, branch)
  branch = feed_forward(normed(made.mlp_norm, want))
  want = want + normed(made.mlp_out_norm, branch)
  got, _, _ = made(inputs(), block.Context(mask=CAUSAL))
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_layers_without_positions_need_a_model_with_rotary_ones():
  heads = dataclasses.replace(BASE, rotary=False)
  with pytest.raises(
    ValueError, match='model.position=alibi has none'
  ) as error:
    decoder.DecoderConfig(attention=heads, position=position.Alibi())
  assert '\n' not in str(error.value)
  with pytest.raises(ValueError, match='logit_soft_cap=0; it is above 0'):
    decoder.DecoderConfig(logit_soft_cap=0)
  with pytest.raises(ValueError, match='qk_norm_eps=0; it is above 0'):
    attention_config.Dense(qk_norm_eps=0)


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
    attention_config.Dense(num_heads=6, num_kv_heads=4)
  with pytest.raises(ValueError, match='attention.window=0; a query sees'):
    attention_config.Local(window=0)
