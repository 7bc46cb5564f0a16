"""Attention by feature maps against its quadratic form."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.attention import linear
from t2x.attention import mask as mask_lib
from t2x.hlo import matmul_flops
from t2x.layers import linear as layers

B, T, K, G, F, H = 2, 29, 2, 3, 5, 4
SEGMENTS = jnp.asarray([[1] * 7 + [2] * 12 + [3] * 6 + [0] * 4, [1] * 29])


def draw(length=T, seed=0):
  keys = jax.random.split(jax.random.key(seed), 3)
  positive = lambda key, *shape: jax.random.uniform(key, (B, length, *shape))
  return (
    positive(keys[0], K * G, F),
    positive(keys[1], K, F),
    jax.random.normal(keys[2], (B, length, K, H)),
  )


def quadratic(q, k, v, segments=None, *, causal):
  """The mean of values by the products of features, all T x T of them."""
  q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
  k, v = np.repeat(k, G, 2), np.repeat(v, G, 2)
  weights = np.einsum('btnf,bsnf->bnts', q, k)
  if causal:
    weights = weights * np.tri(q.shape[1])
  if segments is not None:
    segments = np.asarray(segments)
    same = segments[:, :, None] == segments[:, None, :]
    weights = weights * same[:, None]
  weights /= weights.sum(-1, keepdims=True)
  return np.einsum('bnts,bsnh->btnh', weights, v)


@pytest.mark.parametrize('chunk', [4, 29, 128])
@pytest.mark.parametrize('segments', [None, SEGMENTS])
@pytest.mark.parametrize('causal', [True, False])
def test_the_scan_is_the_quadratic_form(causal, segments, chunk):
  qkv = draw()
  got = linear.attend(*qkv, segments, causal=causal, chunk=chunk)
  want = quadratic(*qkv, segments, causal=causal)
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('causal', [True, False])
def test_gradients_against_differences(causal):
  qkv, step = draw(), draw(seed=1)
  weights = jax.random.normal(jax.random.key(5), (B, T, K * G, H))

  @jax.jit
  def f(*qkv):
    out = linear.attend(*qkv, SEGMENTS, causal=causal, chunk=8)
    return (out * weights).sum()

  grads = jax.grad(f, (0, 1, 2))(*qkv)
  for i in range(3):
    moved = lambda e, i=i: f(
      *(a + e * b if i == j else a for j, (a, b) in enumerate(zip(qkv, step)))
    )
    found = (moved(1e-2) - moved(-1e-2)) / 2e-2
    np.testing.assert_allclose(found, (grads[i] * step[i]).sum(), rtol=1e-2)


def test_a_state_goes_on_where_a_call_left_off():
  q, k, v = draw()
  state = linear.empty(B, K, F, H)
  outs = []
  for start, stop in ((0, 11), (11, 12), (12, T)):
    part = slice(start, stop)
    real = jnp.ones((B, stop - start), bool)
    out, state = linear.step(q[:, part], k[:, part], v[:, part], real, state, 4)
    outs.append(out)
  want = quadratic(q, k, v, causal=True)
  np.testing.assert_allclose(jnp.concatenate(outs, 1), want, atol=1e-5)


def test_padding_leaves_no_trace_in_a_state():
  q, k, v = draw()
  state = linear.empty(B, K, F, H)
  real = jnp.arange(T)[None] < jnp.asarray([[9], [29]])
  _, padded = linear.step(q, k, v, real, state, 4)
  _, alone = linear.step(
    q[:1, :9], k[:1, :9], v[:1, :9], real[:1, :9], linear.empty(1, K, F, H)
  )
  np.testing.assert_allclose(padded.sum_BKFH[0], alone.sum_BKFH[0], atol=1e-5)


def test_later_tokens_change_no_bit():
  q, k, v = draw()
  run = jax.jit(lambda *a: linear.attend(*a, SEGMENTS, causal=True, chunk=8))
  before = run(q, k, v)
  after = run(*(a.at[:, 13].add(100.0) for a in (q, k, v)))
  np.testing.assert_array_equal(before[:, :13], after[:, :13])
  # Nor those of another document, later or earlier.
  np.testing.assert_array_equal(before[0, 19:], after[0, 19:])
  assert (before[0, 13:19] != after[0, 13:19]).any()


@pytest.mark.usefixtures('compiled_as_by_users')
def test_cost_grows_with_the_length():
  def flops(length):
    shapes = jax.eval_shape(lambda: draw(length))
    run = lambda *a: linear.attend(*a, None, causal=True, chunk=32)
    text = jax.jit(run).lower(*shapes).compile().as_text()
    return matmul_flops.matrix_flops(text)

  assert flops(512) == 2 * flops(256) == 4 * flops(128)


# --- Random features. ---


def kernel(function, q, k):
  """What the products of features are the mean of, of vectors (..., H)."""
  q, k = (a * a.shape[-1] ** -0.25 for a in (q, k))
  dot = np.einsum('nh,mh->nm', q, k)
  norm = lambda a: np.linalg.norm(a, axis=-1)
  lengths = norm(q)[:, None] * norm(k)
  if function == 'softmax':
    return np.exp(dot)
  if function == 'gaussian':
    return np.exp(-((q[:, None] - k[None]) ** 2).sum(-1) / 2)
  if function == 'polynomial':
    return lengths**2 + 2 * dot**2
  angle = np.arccos(np.clip(dot / lengths, -1, 1))
  return (
    lengths * (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / (2 * np.pi)
  )


def weights_of(function, q, k, num, seed, orthogonal=True):
  """Returns estimated weights of each query, which add up to 1."""
  w = layers.draw(jax.random.key(seed), q.shape[-1], num, orthogonal)
  phi = lambda a, of_keys: layers.random_features(
    a, w, function, of_keys=of_keys
  )
  products = phi(q, False) @ phi(k, True).T
  return np.asarray(products / products.sum(-1, keepdims=True))


FUNCTIONS = ('softmax', 'gaussian', 'relu', 'polynomial')


@pytest.mark.parametrize('function', FUNCTIONS)
def test_errors_fall_as_the_root_of_the_features(function):
  rng = np.random.default_rng(0)
  # Longer ones need more features before their error falls so.
  q, k = rng.standard_normal((2, 20, 16)).astype(np.float32) / 2
  want = kernel(function, q.astype(np.float64), k.astype(np.float64))
  want /= want.sum(-1, keepdims=True)

  def error(num):
    found = [weights_of(function, q, k, num, seed) for seed in range(12)]
    return np.sqrt(np.mean((np.array(found) - want) ** 2))

  few, many = error(64), error(64 * 64)
  assert 6 < few / many < 10.7  # 8, for 64 times as many.
  mean = np.mean([weights_of(function, q, k, 4096, s) for s in range(12)], 0)
  np.testing.assert_allclose(mean, want, atol=0.02)


def test_orthogonal_features_are_so_and_err_less():
  w = np.asarray(layers.draw(jax.random.key(0), 16, 48, True)).T
  for block in w.reshape(3, 16, 16):
    products = block @ block.T
    assert abs(products - np.diag(np.diag(products))).max() < 1e-4
  rng = np.random.default_rng(1)
  q, k = rng.standard_normal((2, 20, 16)).astype(np.float32) / 2
  want = kernel('softmax', q, k)
  want /= want.sum(-1, keepdims=True)
  error = lambda orthogonal: np.mean(
    [
      (weights_of('softmax', q, k, 64, seed, orthogonal) - want) ** 2
      for seed in range(40)
    ]
  )
  assert error(True) < 0.9 * error(False)


def test_small_sums_of_weights_have_gradients():
  q, k, v = draw()
  scale = 1e-13  # Of queries and of keys: sums of about 1e-25.
  f = lambda scale, q, k, v: (
    linear.attend(q * scale, k * scale, v, None, causal=True) ** 2
  ).sum()
  small = jax.grad(f, (1, 2, 3))(scale, q, k, v)
  plain = jax.grad(f, (1, 2, 3))(1.0, q, k, v)
  for a, b in zip(small, plain):
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_large_keys_and_queries_stay_finite():
  x = 30 * jax.random.normal(jax.random.key(0), (1, 8, 2, 64))
  config = layers.Performer(num_heads=2, num_features=32)
  mixer = layers.PerformerMixer(config, rngs=nnx.Rngs(0))
  out = mixer(x, x, x, mask_lib.make(causal=True), jnp.arange(2))
  assert np.isfinite(out).all()
