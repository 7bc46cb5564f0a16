"""Mixtures of experts against loops over tokens in float64."""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.layers import attention_config
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import param
from t2x.layers import routing
from t2x.losses import load_balancing
from t2x.models import decoder
from t2x.models import encoder
from t2x.parallel import zigzag

B, T, D, F, E = 3, 12, 8, 10, 5
NUM_REAL = (12, 7, 0)
TOKENS = routing.TokenChoice
ROUTERS = {
  'dropless': TOKENS(),
  'three choices': TOKENS(top_k=3, score='sigmoid'),
  'switch': TOKENS(top_k=1, normalize=False, capacity=1.0),
  'capacity': TOKENS(capacity=0.8, score='sigmoid', normalize=False),
  'roomy': TOKENS(capacity=100.0),
  'biased': TOKENS(bias_rate=0.1, capacity=1.1),
  'experts choose': routing.ExpertChoice(capacity=0.8),
  'experts choose all': routing.ExpertChoice(capacity=5.0),
}


def make(router, *, seed=0, **kwargs):
  shape = {'hidden': F, 'activation': 'silu', 'gated': True, 'num_experts': E}
  config = moe.MoeConfig(**{**shape, **kwargs}, router=router)
  draw = {'init': param.Init(std=0.5), 'out_factor': 1.0}
  layer = moe.make(config, D, **draw, rngs=nnx.Rngs(seed))
  leaves, treedef = jax.tree.flatten(layer)
  rng = np.random.default_rng(seed)
  noise = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
  return treedef.unflatten([leaf + 0.3 * noise(leaf) for leaf in leaves])


def inputs(seed=1):
  x_BTD = np.random.default_rng(seed).normal(size=(B, T, D))
  real_BT = np.arange(T)[None] < np.asarray(NUM_REAL)[:, None]
  return x_BTD.astype(np.float32), real_BT


def value(variable):
  return np.asarray(variable[...], np.float64)


def scores_of(layer, x_TD):
  """Logits, scores of tokens for experts, and scores that sum to 1."""
  logits = x_TD.astype(np.float64) @ value(layer.router_DE)
  exp = np.exp(logits)
  softmax = exp / exp.sum(-1, keepdims=True)
  if getattr(layer.config.router, 'score', 'softmax') == 'softmax':
    return logits, softmax, softmax
  sigmoid = 1 / (1 + np.exp(-logits))
  return logits, sigmoid, sigmoid / sigmoid.sum(-1, keepdims=True)


def expert(layer, e, x_D):
  up = x_D @ value(layer.up_EDF)[e]
  if layer.up_bias_EF is not None:
    up = up + value(layer.up_bias_EF)[e]
  gate = x_D @ value(layer.gate_EDF)[e]
  out = (gate / (1 + np.exp(-gate)) * up) @ value(layer.down_EFD)[e]
  if layer.down_bias_ED is not None:
    out = out + value(layer.down_bias_ED)[e]
  return out


def chosen_by_tokens(layer, scores):
  """Returns {(token, expert): weight}, choices before capacity, and lost."""
  router = layer.config.router
  wanted = scores
  if layer.balance_E is not None:
    wanted = scores + value(layer.balance_E)
  num = len(scores)
  room = num if router.capacity is None else router.capacity * router.top_k
  room = num if router.capacity is None else math.ceil(room * num / E - 1e-9)
  taken, kept, counts, lost = [0] * E, {}, [0] * E, 0
  for t in range(num):
    order = sorted(range(E), key=lambda e: (-wanted[t, e], e))
    order = order[: router.top_k]
    total = sum(scores[t, e] for e in order) if router.normalize else 1.0
    for e in order:
      counts[e] += 1
      if taken[e] < room:
        taken[e] += 1
        kept[t, e] = scores[t, e] / total
      else:
        lost += 1
  return kept, counts, lost


def chosen_by_experts(layer, scores):
  num = len(scores)
  room = min(math.ceil(layer.config.router.capacity * num / E - 1e-9), num)
  kept = {}
  for e in range(E):
    for t in sorted(range(num), key=lambda t: (-scores[t, e], t))[:room]:
      kept[t, e] = scores[t, e]
  lost = num - len({t for t, _ in kept})
  return kept, [room] * E, lost


def naive(layer, x_BTD, real_BT):
  """Outputs, balance and z-loss of each row, tokens of experts, lost."""
  config = layer.config
  out = np.zeros(x_BTD.shape)
  balance_B, z_B = np.zeros(len(x_BTD)), np.zeros(len(x_BTD))
  counts, lost = np.zeros(E), 0
  for b, (x_TD, real_T) in enumerate(zip(x_BTD, real_BT)):
    places = np.flatnonzero(real_T)
    if not len(places):
      continue
    logits, scores, shares = scores_of(layer, x_TD[places])
    by_tokens = isinstance(config.router, routing.TokenChoice)
    choose = chosen_by_tokens if by_tokens else chosen_by_experts
    kept, row_counts, row_lost = choose(layer, scores)
    for (t, e), weight in kept.items():
      place = places[t]
      x_D = x_TD[place].astype(np.float64)
      out[b, place] += weight * expert(layer, e, x_D)
    if by_tokens:
      fell = np.asarray(row_counts) / (len(places) * config.router.top_k)
      product = (fell * shares.mean(0)).sum()
      balance_B[b] = config.router.balance_loss * E * product
    z_B[b] = config.z_loss * (np.log(np.exp(logits).sum(-1)) ** 2).mean()
    counts += row_counts
    lost += row_lost
  return out, balance_B, z_B, counts, lost


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('name', ROUTERS)
def test_against_loops_over_tokens(name, bias):
  layer = make(ROUTERS[name], bias=bias, z_loss=0.1)
  x_BTD, real_BT = inputs()
  out, stats = jax.jit(type(layer).__call__)(layer, x_BTD, real_BT)
  want, balance_B, z_B, counts, lost = naive(layer, x_BTD, real_BT)
  np.testing.assert_allclose(out, want, atol=2e-5)
  np.testing.assert_allclose(stats.balance_B, balance_B, rtol=1e-5)
  np.testing.assert_allclose(stats.z_B, z_B, rtol=1e-5)
  load = load_balancing.loads({'mlp': stats})['mlp']
  np.testing.assert_array_equal(load.tokens_E, counts)
  assert load.lost == lost
  short = {'switch', 'capacity', 'biased', 'experts choose'}
  assert (lost > 0) == (name in short)


@pytest.mark.parametrize('name', ['dropless', 'capacity', 'experts choose'])
def test_gradients_against_differences(name):
  """Of all weights and of the input, along random directions."""
  layer = make(ROUTERS[name], bias=True)
  x_BTD, real_BT = inputs()
  coefficients = np.random.default_rng(5).normal(size=x_BTD.shape)

  def loss(layer, x_BTD):
    out, stats = layer(x_BTD, real_BT)
    return (out * coefficients).sum() + stats.balance_B.sum() + stats.z_B.sum()

  grads = jax.grad(loss, (0, 1))(layer, x_BTD)

  def naive_loss(layer, x_BTD):
    out, balance_B, z_B, _, _ = naive(layer, x_BTD, real_BT)
    return (out * coefficients).sum() + balance_B.sum() + z_B.sum()

  rng = np.random.default_rng(6)
  leaves, treedef = jax.tree.flatten((layer, x_BTD))
  for index, grad in enumerate(jax.tree.leaves(grads)):
    # So small that no choice changes; the naive version is float64 but for
    # the weights themselves.
    step = rng.normal(size=grad.shape)
    step *= 2e-3 / np.abs(step).max()
    moved = lambda sign, i=index, step=step: treedef.unflatten(
      [x if j != i else x + sign * step for j, x in enumerate(leaves)]
    )
    change = naive_loss(*moved(1.0)) - naive_loss(*moved(-1.0))
    want = (np.asarray(grad, np.float64) * 2 * step).sum()
    np.testing.assert_allclose(change, want, rtol=2e-2, atol=2e-5)


@pytest.mark.parametrize('name', ['dropless', 'capacity', 'biased'])
def test_no_token_sees_a_later_one(name):
  layer = make(ROUTERS[name])
  x_BTD, _ = inputs()
  changed = x_BTD.copy()
  changed[:, 6:] += 1.0
  first, _ = layer(jnp.asarray(x_BTD))
  second, _ = layer(jnp.asarray(changed))
  np.testing.assert_array_equal(first[:, :6], second[:, :6])
  assert np.abs(first[:, 6:] - second[:, 6:]).max() > 0.1


@pytest.mark.parametrize('name', ['dropless', 'capacity'])
def test_zigzag_order_changes_nothing(name):
  layer = make(ROUTERS[name])
  x_BTD, real_BT = inputs()
  order = zigzag.index(T, 3)
  want, stats = layer(jnp.asarray(x_BTD), real_BT)
  got, other = layer(jnp.asarray(x_BTD[:, order]), real_BT[:, order], 3)
  np.testing.assert_allclose(got, want[:, order], atol=1e-6)
  jax.tree.map(np.testing.assert_allclose, other.load, stats.load)


def test_more_padding_changes_nothing():
  """Slots are counted by real tokens, however long the arrays are."""
  layer = make(ROUTERS['capacity'])
  x_BTD, real_BT = inputs()
  want, stats = layer(jnp.asarray(x_BTD), real_BT)
  pad = lambda a: np.pad(a, [(0, 0), (0, 4)] + [(0, 0)] * (a.ndim - 2))
  got, other = layer(jnp.asarray(pad(x_BTD)), pad(real_BT))
  np.testing.assert_allclose(got[:, :T], want, atol=1e-6)
  assert not np.asarray(got[:, T:]).any()
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
  jax.tree.map(close, other, stats)


@pytest.mark.parametrize('normalize', [True, False])
@pytest.mark.parametrize('logit', [-5.0, -50.0, -200.0])
def test_sigmoids_that_are_too_small_for_a_float(logit, normalize):
  """Their shares are those of exp(logits), the sigmoid's limit."""
  router = routing.TokenChoice(
    top_k=2, score='sigmoid', normalize=normalize, balance_loss=1.0
  )
  offsets_E = np.array([0.3, -0.2, 0.1, 0.0])

  def weights_and_loss(logits_E):
    logits_BTE = jnp.broadcast_to(logits_E, (1, 3, 4))
    choices, _, loss_B = routing.choose(
      logits_BTE, jnp.ones((1, 3), bool), None, router, np.arange(3)
    )
    return choices.weights_BTJ[0, 0], loss_B[0]

  logits_E = jnp.asarray(logit + offsets_E, jnp.float32)
  weights_J, loss = weights_and_loss(logits_E)
  scores_E = 1 / (1 + np.exp(-(logit + offsets_E)))  # float64
  best_J = scores_E[[0, 2]]
  want_J = best_J / best_J.sum() if normalize else best_J
  np.testing.assert_allclose(weights_J, want_J, rtol=1e-4, atol=1e-37)
  np.testing.assert_allclose(
    loss, 4 * 0.5 * best_J.sum() / scores_E.sum(), rtol=1e-4
  )
  total = lambda logits_E: sum(jnp.sum(x) for x in weights_and_loss(logits_E))
  assert np.isfinite(jax.grad(total)(logits_E)).all()


def test_the_router_computes_in_float32():
  """bfloat16 logits would tie where float32 ones differ."""
  layer = make(ROUTERS['dropless'])
  x_BTD = jnp.asarray(inputs()[0], jnp.bfloat16)
  _, stats = layer(x_BTD)
  _, want = layer(x_BTD.astype(jnp.float32))
  jax.tree.map(np.testing.assert_array_equal, stats, want)
  out, _ = layer(x_BTD)
  assert out.dtype == jnp.bfloat16


def test_the_balancing_bias_follows_the_load():
  """Fewer tokens than the mean: up by the rate; more: down; as many: still."""
  layer = make(ROUTERS['biased'])
  before = np.asarray(layer.balance_E[...])
  tokens_E = jnp.asarray([4.0, 1.0, 3.0, 3.0, 4.0])
  load = load_balancing.LayerLoad(tokens_E, jnp.zeros(()), jnp.asarray(15.0))
  after = load_balancing.update({'mlp': layer}, {'mlp': load})['mlp']
  want = before + 0.1 * np.asarray([-1, 1, 0, 0, -1])
  np.testing.assert_allclose(after.balance_E[...], want, rtol=1e-6)
  np.testing.assert_array_equal(after.up_EDF[...], layer.up_EDF[...])


def test_metrics_of_load():
  loads = {
    'a': load_balancing.LayerLoad(
      jnp.asarray([[3.0, 1.0], [2.0, 2.0]]),
      jnp.asarray([1.0, 0.0]),
      jnp.asarray([4.0, 4.0]),
    ),
    'b': load_balancing.LayerLoad(
      jnp.asarray([1.0, 1.0, 6.0]), jnp.asarray(0.0), jnp.asarray(8.0)
    ),
  }
  metrics = load_balancing.metrics(loads)
  np.testing.assert_allclose(
    metrics['expert_load/a'], [[0.75, 0.25], [0.5, 0.5]]
  )
  np.testing.assert_allclose(metrics['expert_load/b'], [0.125, 0.125, 0.75])
  assert metrics['expert_load_max'] == pytest.approx(2.25)
  assert metrics['tokens_dropped'] == pytest.approx(1 / 16)
  assert (
    load_balancing.metrics({}) == load_balancing.losses({}, jnp.ones(2)) == {}
  )


CHOICE = moe.MoeConfig(router=routing.ExpertChoice())


@pytest.mark.parametrize(
  'build, message',
  [
    (lambda: TOKENS(top_k=1), r'top_k=1 makes every weight 1'),
    (lambda: TOKENS(top_k=0), r'mlp\.router\.top_k=0; it is 1 or more'),
    (lambda: TOKENS(capacity=0.0), r'mlp\.router\.capacity=0\.0; it is above'),
    (lambda: moe.MoeConfig(num_experts=1), r'num_experts=1; it is 2 or more'),
    (
      lambda: moe.MoeConfig(num_experts=2, router=TOKENS(top_k=3)),
      r'top_k=3 of mlp\.num_experts=2',
    ),
    (lambda: moe.MoeConfig(dropout=0.1), r'Set mlp\.dropout=0;'),
    (
      lambda: decoder.DecoderConfig(mlp=CHOICE),
      r'a decoder would see the future.*router=token_choice',
    ),
    (
      lambda: decoder.DecoderConfig(mlp_pattern=(moe.MoeConfig(), CHOICE)),
      r'a decoder would see the future',
    ),
  ],
)
def test_what_cannot_be(build, message):
  with pytest.raises(ValueError, match=message):
    build()


def test_an_encoder_may_let_experts_choose():
  config = encoder.EncoderConfig(
    mlp=CHOICE,
    attention_pattern=(attention_config.Dense(), attention_config.Local()),
    mlp_pattern=(mlp.MlpConfig(), CHOICE, CHOICE),
  )
  kinds = [(type(a).__name__, m) for a, m in config.group]
  plain = config.mlp_pattern[0]
  assert kinds == [
    ('Dense', plain),
    ('Local', CHOICE),
    ('Dense', CHOICE),
    ('Local', plain),
    ('Dense', CHOICE),
    ('Local', CHOICE),
  ]
