"""Training steps of mixtures of experts: losses, biases, optimizers."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import routing
from t2x.models import decoder
from t2x.training import optim
from t2x.training import train_state
from t2x.training import train_step

ROWS, LENGTH, VOCAB, E = 8, 8, 29, 4
ROUTER = routing.TokenChoice(balance_loss=0.5, bias_rate=0.01)
EXPERTS = moe.MoeConfig(hidden=24, num_experts=E, router=ROUTER, z_loss=0.2)
# Five layers: two groups, and a plain layer that remains.
CONFIG = decoder.DecoderConfig(
  vocab_size=VOCAB,
  vocab_multiple=8,
  num_layers=5,
  embed_dim=16,
  attention=attention_config.Dense(num_heads=2, head_dim=8),
  mlp_pattern=(mlp.MlpConfig(hidden=32), EXPERTS),
)
PATH = 'tower.layers.group.1.mlp'
KEY = jax.random.key(1)
STEP = train_state.StepConfig(ema_decay=0.5)
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@functools.cache
def make_model():
  return jit(lambda key: decoder.Decoder(CONFIG, rngs=nnx.Rngs(key)))(
    jax.random.key(0)
  )


@functools.cache
def make_batch():
  rng = np.random.default_rng(0)
  tokens = lambda: rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
  segments = np.ones((ROWS, LENGTH), np.int32)
  segments[2:, 6:] = 0
  weights = rng.uniform(0, 2, (ROWS, LENGTH)) * segments
  weights[3] = 0.0
  return {
    'inputs': tokens(),
    'targets': tokens(),
    'segments': segments,
    'weights': weights.astype(np.float32),
  }


def step_of(config=STEP, optimizer=optim.AdamW(learning_rate=0.01), **changes):
  tx = optim.make(optimizer, 10)
  state = train_state.init_state(make_model(), tx, config)
  fn = jit(functools.partial(train_step.train_step, tx=tx, config=config))
  return state, *fn(state, {**make_batch(), **changes}, KEY)


@pytest.fixture(scope='module')
def first():
  return step_of()


def test_losses_are_those_of_rows_by_their_weight(first):
  _, _, metrics = first
  batch = make_batch()
  inputs = {name: batch[name] for name in ('inputs', 'segments')}
  _, stats = jit(lambda m, x: m.features(**x))(make_model(), inputs)
  share_B = batch['weights'].sum(1) / batch['weights'].sum()
  assert stats[PATH].balance_B.shape == (2, ROWS)
  for name, rows in (
    ('balance_loss', stats[PATH].balance_B),
    ('router_z_loss', stats[PATH].z_B),
  ):
    want = (np.asarray(rows) * share_B).sum()
    assert want > 0.1
    np.testing.assert_allclose(metrics[name], want, rtol=1e-5)
  parts = (metrics[n] for n in ('nll', 'balance_loss', 'router_z_loss'))
  np.testing.assert_allclose(metrics['loss'], sum(parts), rtol=1e-6)


def test_a_row_of_no_weight_adds_no_loss(first):
  """But its tokens are the experts' work, and so their load."""
  _, _, want = first
  tokens = make_batch()['inputs'].copy()
  tokens[3] = (tokens[3] + 7) % VOCAB
  _, _, got = step_of(inputs=tokens)
  np.testing.assert_allclose(got['loss'], want['loss'], rtol=1e-6)
  load = f'expert_load/{PATH}'
  assert np.abs(got[load] - want[load]).max() > 0


def test_the_bias_follows_the_load_of_the_whole_batch(first):
  state, new_state, metrics = first
  bias = lambda s: np.asarray(s.model.tower.layers.group[1].mlp.balance_E[...])
  share = np.asarray(metrics[f'expert_load/{PATH}'])
  assert share.shape == (2, E)
  np.testing.assert_allclose(share.sum(1), 1.0, rtol=1e-6)
  np.testing.assert_allclose(
    bias(new_state) - bias(state), 0.01 * np.sign(1 / E - share), atol=1e-8
  )
  want = share.max() * E
  np.testing.assert_allclose(metrics['expert_load_max'], want, rtol=1e-6)
  # No optimizer and no average knows of it.
  assert new_state.ema.tower.layers.group[1].mlp.balance_E.get_value() is None
  moments = [s for s in new_state.opt_state if hasattr(s, 'mu')][0].mu
  assert moments.tower.layers.group[1].mlp.balance_E.get_value() is None


def test_accumulation_changes_nothing(first):
  _, want_state, want = first
  config = dataclasses.replace(STEP, accumulate=4)
  _, got_state, got = step_of(config)
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6)
  jax.tree.map(close, got, want)
  # Adam's first update is of a gradient's sign, near zero that of rounding.
  near = functools.partial(np.testing.assert_allclose, atol=1e-3)
  jax.tree.map(near, got_state.model, want_state.model)


def test_a_skipped_step_moves_no_bias():
  weights = make_batch()['weights'].copy()
  weights[0, 0] = np.inf
  state, new_state, metrics = step_of(weights=weights)
  assert metrics['num_skipped'] == 1
  jax.tree.map(np.testing.assert_array_equal, new_state.model, state.model)


@pytest.mark.parametrize(
  'optimizer', [optim.Muon(), optim.Adafactor(min_factored=8), optim.Lion()]
)
def test_optimizers_take_experts(optimizer):
  state, new_state, metrics = step_of(optimizer=optimizer)
  assert np.isfinite(metrics['loss'])
  mlp_of = lambda s: s.model.tower.layers.group[1].mlp
  for name in ('router_DE', 'up_EDF', 'down_EFD', 'up_bias_EF'):
    old, new = (getattr(mlp_of(s), name)[...] for s in (state, new_state))
    assert np.abs(np.asarray(new - old)).max() > 0, name


def test_muon_updates_each_expert_by_itself():
  axes = ('experts', 'embed', 'mlp')
  weights_EDF = jax.random.normal(jax.random.key(0), (3, 6, 10))
  grads_EDF = jax.random.normal(jax.random.key(1), (3, 6, 10))
  tx = optim.make(optim.Muon(clip_norm=None), 10)

  def update(weight, grad, axes):
    weight = {'up': nnx.Param(weight, axes=axes)}
    grad = {'up': weight['up'].replace(grad)}
    return tx.update(grad, tx.init(weight), weight)[0]['up'][...]

  together = update(weights_EDF, grads_EDF, axes)
  apart = [update(w, g, axes[1:]) for w, g in zip(weights_EDF, grads_EDF)]
  np.testing.assert_allclose(together, jnp.stack(apart), atol=1e-6)
