"""Cross-entropy against sums over lists in float64, whole and in chunks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from t2x.layers import embed
from t2x.losses import cross_entropy
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding

B, T, D, VOCAB, ROWS = 2, 5, 8, 21, 24

SETTINGS = {
  'plain': {},
  'smoothed': {'label_smoothing': 0.2},
  'z_loss': {'z_loss': 0.01},
  'both': {'label_smoothing': 0.1, 'z_loss': 0.1},
}


CAPS = pytest.mark.parametrize('cap', [None, 2.0])


def make_head(rng, bias=True, scale=1.0, cap=None):
  """Padded rows would win every comparison if they were seen."""
  table = rng.normal(size=(ROWS, D))
  table[VOCAB:] *= 100.0
  bias_V = rng.normal(size=ROWS)
  bias_V[VOCAB:] = 1000.0
  return embed.Head(
    table_VD=jnp.asarray(table, jnp.float32),
    bias_V=jnp.asarray(bias_V, jnp.float32) if bias else None,
    scale=scale,
    soft_cap=cap,
    vocab_size=VOCAB,
  )


def make_inputs(seed=0):
  rng = np.random.default_rng(seed)
  x = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32)
  return rng, x, jnp.asarray(rng.integers(0, VOCAB, (B, T)))


def naive(x, head, targets, label_smoothing=0.0, z_loss=0.0):
  """One token at a time."""
  table = np.asarray(head.table_VD, np.float64)[:VOCAB]
  bias = np.zeros(VOCAB) if head.bias_V is None else head.bias_V[:VOCAB]
  objective, nlls, correct = np.zeros((3, B, T))
  for b in range(B):
    for t in range(T):
      features = np.asarray(x[b, t], np.float64) * head.scale
      logits = table @ features + np.asarray(bias, np.float64)
      if head.soft_cap is not None:
        logits = head.soft_cap * np.tanh(logits / head.soft_cap)
      log_sum = np.log(np.exp(logits).sum())
      log_probs = logits - log_sum
      wanted = np.full(VOCAB, label_smoothing / VOCAB)
      wanted[targets[b, t]] += 1 - label_smoothing
      objective[b, t] = -(wanted * log_probs).sum() + z_loss * log_sum**2
      nlls[b, t] = -log_probs[targets[b, t]]
      correct[b, t] = logits.argmax() == targets[b, t]
  return objective, nlls, correct


def config_of(settings, chunks=1):
  return cross_entropy.LossConfig(vocab_chunks=chunks, **SETTINGS[settings])


@CAPS
@pytest.mark.parametrize('chunks', [1, 2, 8, ROWS])
@pytest.mark.parametrize('settings', SETTINGS)
def test_against_sums_over_lists(settings, chunks, cap):
  rng, x, targets = make_inputs()
  head = make_head(rng, scale=0.5, cap=cap)
  # Some predictions are right.
  best = np.asarray(head(x)).argmax(-1)
  targets = targets.at[0].set(best[0])
  want = naive(x, head, targets, **SETTINGS[settings])
  got = cross_entropy.token_loss(x, head, targets, config_of(settings, chunks))
  assert 0 < want[2].sum() < B * T
  for name, a, b in zip(got._fields, got, want):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=name)


def gradients(x, head, targets, config):
  """Of features, table and bias, each token weighted differently."""
  weights = jnp.arange(1.0, B * T + 1).reshape(B, T)

  def total(x, head):
    losses = cross_entropy.token_loss(x, head, targets, config)
    return (losses.objective_BT * weights).sum()

  return jax.value_and_grad(total, (0, 1))(x, head)


@pytest.mark.parametrize('settings', SETTINGS)
def test_gradients_of_chunks(settings):
  rng, x, targets = make_inputs(1)
  head = make_head(rng)
  fn = jax.jit(gradients, static_argnums=3)
  want = fn(x, head, targets, config_of(settings))
  got = fn(x, head, targets, config_of(settings, 4))
  paths = jax.tree_util.tree_leaves_with_path(want)
  for (path, a), b in zip(paths, jax.tree.leaves(got)):
    np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5, err_msg=path)
  head_grads = got[1][1]
  assert not head_grads.table_VD[VOCAB:].any(), 'padding has no gradient'
  assert not head_grads.bias_V[VOCAB:].any()
  assert head_grads.table_VD[:VOCAB].all()


@CAPS
@pytest.mark.parametrize('chunks', [1, 4])
def test_gradients_are_right(chunks, cap):
  """Finite differences of the naive loss, in float64."""
  rng, x, targets = make_inputs(2)
  head = make_head(rng, bias=False, cap=cap)
  config = config_of('both', chunks)
  _, (grad_x, grad_head) = gradients(x, head, targets, config)
  weights = np.arange(1.0, B * T + 1).reshape(B, T)

  def value(x, table):
    head_ = embed.Head(table_VD=table, soft_cap=cap, vocab_size=VOCAB)
    return (naive(x, head_, targets, **SETTINGS['both'])[0] * weights).sum()

  x, table = np.asarray(x, np.float64), np.asarray(head.table_VD, np.float64)
  for index in [(0, 0, 0), (1, 4, 7), (1, 2, 3)]:
    step = np.zeros_like(x)
    step[index] = 1e-5
    slope = (value(x + step, table) - value(x - step, table)) / 2e-5
    np.testing.assert_allclose(grad_x[index], slope, rtol=1e-4, atol=1e-4)
  for index in [(0, 0), (20, 7), (int(targets[0, 0]), 3)]:
    step = np.zeros_like(table)
    step[index] = 1e-5
    slope = (value(x, table + step) - value(x, table - step)) / 2e-5
    got = grad_head.table_VD[index]
    np.testing.assert_allclose(got, slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('chunks', [1, 4])
def test_a_tie_counts_as_correct(chunks):
  """And logits far out of range stay finite."""
  table = jnp.zeros((ROWS, D)).at[3].set(50.0).at[7].set(50.0)
  head = embed.Head(table_VD=table, vocab_size=VOCAB)
  targets = jnp.asarray([[3, 7, 4]])
  config = cross_entropy.LossConfig(vocab_chunks=chunks)
  got = cross_entropy.token_loss(jnp.ones((1, 3, D)), head, targets, config)
  np.testing.assert_array_equal(got.correct_BT, [[1, 1, 0]])
  nll = np.log(2)
  np.testing.assert_allclose(got.nll_BT, [[nll, nll, 400 + nll]], rtol=1e-5)


@pytest.mark.parametrize('chunks', [1, 3])
@pytest.mark.parametrize('tensor', [2, 4])
def test_a_table_split_by_rows_and_columns(tensor, chunks):
  """ROWS / (chunks x tensor) rows of a chunk on each device."""
  rng, x, targets = make_inputs(3)
  x, targets = jnp.tile(x, (2, 1, 1)), jnp.tile(targets, (2, 1))
  head = make_head(rng)
  config = config_of('both', chunks)

  def total(x, head):
    return cross_entropy.token_loss(x, head, targets, config).objective_BT.sum()

  fn = lambda: jax.jit(jax.value_and_grad(total, (0, 1)))
  want = fn()(x, head)
  mesh = mesh_lib.make(mesh_lib.MeshConfig(fsdp=2, tensor=tensor))
  put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
  head = dataclasses.replace(
    head,
    table_VD=put(head.table_VD, 'tensor', 'fsdp'),
    bias_V=put(head.bias_V, 'tensor'),
  )
  with sharding.use(mesh, sharding.Rules()):
    got = fn()(put(x, ('data', 'fsdp')), head)
  for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
    np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5)


def test_chunks_that_do_not_divide():
  rng, x, targets = make_inputs()
  message = (
    r'vocab_chunks=5 does not divide the 24 rows of the vocabulary table\. '
    r'Choose a divisor, or set model\.vocab_multiple to a multiple of 5\.'
  )
  with pytest.raises(ValueError, match=message):
    config = cross_entropy.LossConfig(vocab_chunks=5)
    cross_entropy.token_loss(x, make_head(rng), targets, config)


def test_settings_that_mean_nothing():
  with pytest.raises(ValueError, match=r'label_smoothing=1\.0; it is in'):
    cross_entropy.LossConfig(label_smoothing=1.0)
  with pytest.raises(ValueError, match='vocab_chunks=0; it is 1 or more'):
    cross_entropy.LossConfig(vocab_chunks=0)


# --- Memory and bytes, of the compiled program. ---


def mean_loss(x, head, targets, config):
  return cross_entropy.token_loss(x, head, targets, config).objective_BT.mean()


def temporaries(vocab_size, chunks):
  """Bytes beyond arguments and results: (loss, gradients of x and head)."""
  config = cross_entropy.LossConfig(vocab_chunks=chunks)
  f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  head = embed.Head(table_VD=f32(vocab_size, 16), vocab_size=vocab_size)
  fn = jax.jit(
    jax.value_and_grad(functools.partial(mean_loss, config=config), (0, 1))
  )
  targets = jax.ShapeDtypeStruct((8, 64), jnp.int32)
  compiled = fn.lower(f32(8, 64, 16), head, targets).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.usefixtures('compiled_as_by_users')
def test_memory_does_not_grow_with_the_vocabulary():
  """A chunk keeps its size; the table's own layout change is let off."""
  small, large = temporaries(2048, 8), temporaries(8192, 32)
  table = 4 * 16 * (8192 - 2048)
  assert large - small < 2.5 * table
  assert temporaries(8192, 1) - temporaries(2048, 1) > 10 * table
  assert 5 * large < temporaries(8192, 1)


# --- Chunks of tokens, whose gradients are made with the loss. ---


def mean_gradients(x, head, targets, config):
  weights = jnp.arange(1.0, B * T + 1).reshape(B, T) / 100

  def objective(x, head):
    mean = cross_entropy.mean_loss(x, head, targets, weights, config)
    return 3.0 * mean.objective, mean

  return jax.value_and_grad(objective, (0, 1), has_aux=True)(x, head)


@CAPS
@pytest.mark.parametrize('token_chunks', [1, T])
@pytest.mark.parametrize('settings', SETTINGS)
def test_closed_form_gradients_are_the_derived_ones(
  settings, token_chunks, cap
):
  """Against the chunks of the vocabulary, which JAX differentiates."""
  rng, x, targets = make_inputs(1)
  head = make_head(rng, scale=0.5, cap=cap)
  fn = jax.jit(mean_gradients, static_argnums=3)
  derived = cross_entropy.LossConfig(vocab_chunks=4, **SETTINGS[settings])
  closed = cross_entropy.LossConfig(
    token_chunks=token_chunks, **SETTINGS[settings]
  )
  want = fn(x, head, targets, derived)
  got = fn(x, head, targets, closed)
  paths = jax.tree_util.tree_leaves_with_path(want)
  for (path, a), b in zip(paths, jax.tree.leaves(got)):
    np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5, err_msg=path)


@pytest.mark.parametrize('settings', SETTINGS)
def test_chunks_of_tokens_equal_the_whole(settings):
  rng, x, targets = make_inputs(1)
  head = make_head(rng)
  fn = jax.jit(mean_gradients, static_argnums=3)
  whole = cross_entropy.LossConfig(**SETTINGS[settings])
  chunked = cross_entropy.LossConfig(token_chunks=T, **SETTINGS[settings])
  want = fn(x, head, targets, whole)
  got = fn(x, head, targets, chunked)
  paths = jax.tree_util.tree_leaves_with_path(want)
  for (path, a), b in zip(paths, jax.tree.leaves(got)):
    np.testing.assert_allclose(b, a, rtol=2e-5, atol=2e-5, err_msg=path)


def test_chunks_of_tokens_repeat_no_product():
  """Three products a chunk, and none left for the backward pass."""
  rng, x, targets = make_inputs(1)
  head = make_head(rng, bias=False)
  config = cross_entropy.LossConfig(token_chunks=T)
  jaxpr = str(
    jax.make_jaxpr(lambda x, h: mean_gradients(x, h, targets, config))(x, head)
  )
  assert jaxpr.count('dot_general') == 3
  assert jaxpr.count('= scan[') == 1


def test_chunks_of_tokens_must_divide():
  _, x, targets = make_inputs(1)
  config = cross_entropy.LossConfig(token_chunks=T + 1)
  head = embed.Head(table_VD=jnp.zeros((ROWS, D)), vocab_size=VOCAB)
  message = f'token_chunks={T + 1} does not divide the {T} tokens of a row'
  with pytest.raises(ValueError, match=message):
    mean_gradients(x, head, targets, config)
  with pytest.raises(ValueError, match='set one of them to 1'):
    cross_entropy.LossConfig(token_chunks=2, vocab_chunks=2)
