"""One update: what is kept, what is skipped, what is averaged."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.layers import attention_config
from t2x.layers import dropout
from t2x.layers import mlp
from t2x.layers import stack
from t2x.losses import cross_entropy
from t2x.models import decoder
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.training import optim
from t2x.training import train_state
from t2x.training import train_step

ROWS, LENGTH, VOCAB = 8, 8, 29
CONFIG = decoder.DecoderConfig(
  vocab_size=VOCAB,
  vocab_multiple=8,
  num_layers=2,
  embed_dim=16,
  dropout=0.1,
  attention=attention_config.Dense(num_heads=2, head_dim=8, bias=True),
  mlp=mlp.MlpConfig(hidden=32),
)
STEP = train_state.StepConfig(
  ema_decay=0.75,
  loss=cross_entropy.LossConfig(label_smoothing=0.1, z_loss=1e-3),
)
TX = optim.make(
  optim.AdamW(learning_rate=0.01, schedule=optim.Schedule(shape='constant')),
  10,
)
KEY = jax.random.key(1)
# Half the time goes without LLVM's optimisations.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


@functools.cache
def make_model(config=CONFIG):
  return jit(lambda key: decoder.Decoder(config, rngs=nnx.Rngs(key)))(
    jax.random.key(0)
  )


@functools.cache
def make_batch(seed=0):
  rng = np.random.default_rng(seed)
  tokens = lambda: rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
  weights = rng.uniform(0, 2, (ROWS, LENGTH)).astype(np.float32)
  return {'inputs': tokens(), 'targets': tokens(), 'weights': weights}


def make_state(config=STEP, model=None):
  return train_state.init_state(model or make_model(), TX, config)


@functools.cache
def step_fn(config=STEP, donate=False):
  fn = functools.partial(train_step.train_step, tx=TX, config=config)
  return jit(fn, donate_argnums=(0,) if donate else ())


def assert_equal(got, want):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_array_equal(a, b)


def differ(one, other):
  pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other))
  return any((np.asarray(a) != np.asarray(b)).any() for a, b in pairs)


def test_metrics_of_a_step():
  state, batch = make_state(), make_batch()
  new, metrics = step_fn()(state, batch, KEY)
  counts = {'num_skipped', 'num_updates'}
  assert set(metrics) == {'loss', 'nll', 'accuracy', 'grad_norm', *counts}
  assert new.step == 1
  assert new.num_skipped == metrics['num_skipped'] == 0

  # By hand: weighted means over the batch, dropout keyed by step and row.
  keys_B = dropout.row_keys(jax.random.fold_in(KEY, 0), jnp.arange(ROWS))

  def loss(model):
    x_BTD = model.hidden(batch['inputs'], keys_B=keys_B)
    losses = cross_entropy.token_loss(
      x_BTD, model.head, batch['targets'], STEP.loss
    )
    mean = lambda x: (x * batch['weights']).sum() / batch['weights'].sum()
    return mean(losses.objective_BT), (
      mean(losses.nll_BT),
      mean(losses.correct_BT),
    )

  fn = jit(jax.value_and_grad(loss, has_aux=True))
  (objective, (nll, accuracy)), grads = fn(state.model)
  np.testing.assert_allclose(metrics['loss'], objective, rtol=1e-6)
  np.testing.assert_allclose(metrics['nll'], nll, rtol=1e-6)
  np.testing.assert_allclose(metrics['accuracy'], accuracy, rtol=1e-6)
  norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-5)
  updates, _ = jit(TX.update)(grads, state.opt_state, state.model)
  want = jax.tree.map(jnp.add, state.model, updates)
  for a, b in zip(jax.tree.leaves(new.model), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_the_loss_falls_and_each_step_draws_anew():
  state, losses = make_state(), []
  for _ in range(10):
    state, metrics = step_fn()(state, make_batch(), KEY)
    losses.append(float(metrics['loss']))
  assert losses[-1] < losses[0] - 0.1
  # Another step number is another dropout.
  later = dataclasses.replace(make_state(), step=jnp.asarray(1, jnp.int32))
  _, metrics = step_fn()(later, make_batch(), KEY)
  assert float(metrics['loss']) != losses[0]


@pytest.mark.parametrize('accumulate', [1, 2])
def test_a_loss_that_is_not_finite_changes_nothing(accumulate):
  config = dataclasses.replace(STEP, accumulate=accumulate)
  step = step_fn(config)
  good = make_batch()
  weights = good['weights'].copy()
  weights[3, 2] = np.nan
  bad = {**good, 'weights': weights}
  state, _ = step(make_state(config), good, KEY)
  after = state
  for count in (1, 2):
    after, metrics = step(after, bad, KEY)
    assert not np.isfinite(metrics['loss'])
    assert after.num_skipped == metrics['num_skipped'] == count
    assert after.step == 1 + count
    assert metrics['num_updates'] == 1
    assert_equal(after.model, state.model)
    assert_equal(after.opt_state, state.opt_state)
    assert_equal(after.ema, state.ema)
  after, metrics = step(after, good, KEY)
  assert after.num_skipped == metrics['num_skipped'] == 0
  assert differ(after.model, state.model)
  assert differ(after.ema, state.ema)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(after.model))


@pytest.mark.parametrize('value', [np.inf, np.nan])
def test_a_gradient_that_is_not_finite_changes_nothing(value, monkeypatch):
  """The loss may be finite while one entry of one gradient is not."""
  state, batch = make_state(), make_batch()
  real = train_step.gradients

  def broken(*args):
    grads, sums = real(*args)
    leaves, tree = jax.tree.flatten(grads)
    leaves[2] = leaves[2].at[(0,) * leaves[2].ndim].set(value)
    return tree.unflatten(leaves), sums

  monkeypatch.setattr(train_step, 'gradients', broken)
  fn = jit(functools.partial(train_step.train_step, tx=TX, config=STEP))
  after, metrics = fn(state, batch, KEY)
  assert np.isfinite(metrics['loss']) and not np.isfinite(metrics['grad_norm'])
  assert after.num_skipped == 1
  for name in ('model', 'opt_state', 'ema'):
    assert_equal(getattr(after, name), getattr(state, name))


def test_moving_average():
  state, want = make_state(), make_model()
  assert_equal(state.ema, state.model)
  for _ in range(3):
    state, _ = step_fn()(state, make_batch(), KEY)
    want = jax.tree.map(lambda e, p: 0.75 * e + 0.25 * p, want, state.model)
  for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
  assert_equal(train_state.averaged_model(state, STEP), state.ema)
  plain = dataclasses.replace(STEP, ema_decay=None)
  assert make_state(plain).ema is None
  assert train_state.averaged_model(make_state(plain), plain) is make_model()


def test_the_old_state_is_given_up():
  """Donated: one copy of the state, moving average included, is alive."""
  make = jit(lambda model: make_state(model=model))
  state = make(make_model())
  new, _ = step_fn(donate=True)(state, make_batch(), KEY)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.model))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.ema))
  want, _ = step_fn()(make_state(), make_batch(), KEY)
  # Another program, whose fusions round elsewhere.
  for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_state_made_outside_jit_can_be_donated():
  """No buffer twice, though the average starts as the weights."""
  copy = jax.tree.map(lambda x: x + 0, make_model())
  new, _ = step_fn(donate=True)(make_state(model=copy), make_batch(), KEY)
  assert new.step == 1


# --- The trained part. ---


class WithCodes(nnx.Module):
  def __init__(self):
    self.weight = nnx.Param(jnp.ones((2,)), axes=(None,))
    self.codes = nnx.Param(jnp.ones((2,), jnp.int8), axes=(None,))


@pytest.mark.parametrize('pattern', ['.*', r'tower\..*', r'.*\.scale'])
def test_combine_is_the_inverse_of_partition(pattern):
  model = make_model()
  trained, rest = train_state.partition(model, pattern)
  count = lambda tree: len(jax.tree.leaves(tree))
  assert count(trained) + count(rest) == count(model)
  assert (count(rest) == 0) == (pattern == '.*')
  for parts in [(trained, rest), (rest, trained)]:
    again = train_state.combine(*parts)
    assert jax.tree.structure(again) == jax.tree.structure(model)
    assert_equal(again, model)


def test_integers_are_never_trained():
  trained, rest = train_state.partition(WithCodes(), '.*')
  assert trained.codes.get_value() is None
  assert rest.weight.get_value() is None
  assert rest.codes.get_value().dtype == jnp.int8


def test_a_pattern_that_matches_nothing():
  message = (
    r"train\.trainable='head' matches no parameter\. Paths look like "
    r'embeddings\.positions\.table_PD, embeddings\.tokens\.table_VD, '
  )
  with pytest.raises(ValueError, match=message):
    train_state.partition(make_model(), 'head')


def test_frozen_parameters_stay():
  config = dataclasses.replace(STEP, trainable=r'tower\..*mlp.*')
  state = make_state(config)
  new, _ = step_fn(config)(state, make_batch(), KEY)
  flat = jax.tree_util.tree_leaves_with_path(state.model)
  for (path, a), b in zip(flat, jax.tree.leaves(new.model), strict=True):
    name = sharding.path_name(path)
    assert (a != b).any() == ('.mlp' in name), name
  size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
  trained, _ = train_state.partition(state.model, config.trainable)
  assert size(state.ema) == size(trained)
  assert size(state.opt_state) < 2.1 * size(trained)
  averaged = train_state.averaged_model(new, config)
  assert_equal(averaged.embeddings, state.model.embeddings)


# --- Precision and memory. ---


def test_bfloat16_keeps_float32_weights():
  model = make_model(dataclasses.replace(CONFIG, dtype='bfloat16'))
  hidden = jax.eval_shape(lambda m: m.hidden(make_batch()['inputs']), model)
  assert hidden.dtype == jnp.bfloat16
  new, metrics = step_fn()(make_state(model=model), make_batch(), KEY)
  _, want = step_fn()(make_state(), make_batch(), KEY)
  assert metrics['loss'].dtype == jnp.float32
  np.testing.assert_allclose(metrics['loss'], want['loss'], rtol=0.01)
  floats = [x for x in jax.tree.leaves(new) if x.dtype != jnp.int32]
  assert {x.dtype for x in floats} == {jnp.dtype('float32')}
  assert differ(new.model, model)


@pytest.mark.slow
@pytest.mark.usefixtures('compiled_as_by_users')
def test_remat_saves_memory_and_keeps_the_loss():
  config = dataclasses.replace(CONFIG, num_layers=8)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, VOCAB, (16, 64)).astype(np.int32)
  batch = {'inputs': tokens, 'targets': tokens, 'weights': np.ones((16, 64))}
  batch = jax.tree.map(jnp.asarray, batch)
  sizes, losses = {}, {}
  for remat in ('none', 'dots', 'full'):
    execution = stack.Execution(remat=remat)
    step = dataclasses.replace(STEP, ema_decay=None, execution=execution)
    fn = jit(functools.partial(train_step.train_step, tx=TX, config=step))
    state = make_state(step, make_model(config))
    compiled = fn.lower(state, batch, KEY).compile()
    sizes[remat] = compiled.memory_analysis().temp_size_in_bytes
    losses[remat] = float(compiled(state, batch, KEY)[1]['loss'])
  assert sizes['full'] < 0.7 * sizes['none'], sizes
  assert sizes['full'] < sizes['dots'] < sizes['none'], sizes
  np.testing.assert_allclose(list(losses.values()), losses['none'], rtol=1e-6)


def test_no_weight_at_all_is_a_finite_loss():
  batch = {**make_batch(), 'weights': np.zeros((ROWS, LENGTH), np.float32)}
  _, metrics = step_fn()(make_state(), batch, KEY)
  assert metrics['loss'] == 0 and metrics['num_skipped'] == 0


def test_evaluation_sums():
  """Sums, so that batches add up; the plain loss, without dropout."""
  model, batch = make_model(), make_batch()
  fn = jit(
    functools.partial(train_step.eval_step, config=train_state.StepConfig())
  )
  got = fn(model, batch)
  log_probs = jax.nn.log_softmax(model(batch['inputs']))
  picked = np.take_along_axis(log_probs, batch['targets'][..., None], -1)[
    ..., 0
  ]
  correct = log_probs.argmax(-1) == batch['targets']
  weights = batch['weights']
  np.testing.assert_allclose(got['nll'], -(picked * weights).sum(), rtol=1e-5)
  np.testing.assert_allclose(
    got['accuracy'], (correct * weights).sum(), rtol=1e-5
  )
  np.testing.assert_allclose(got['weight'], weights.sum(), rtol=1e-6)


def test_a_step_on_a_mesh_is_a_step_on_one_device():
  """With donation, accumulation, and the state where the rules put it."""
  mesh = mesh_lib.make(mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2))
  config = dataclasses.replace(STEP, accumulate=2)
  rules = sharding.Rules()
  where = train_state.state_shardings(make_state(), mesh, rules, config)
  fn = jit(
    functools.partial(train_step.train_step, tx=TX, config=config),
    out_shardings=(where, None),
    donate_argnums=0,
  )
  state = jax.device_put(jax.device_get(make_state()), where)
  with sharding.use(mesh, rules):
    for _ in range(2):
      state, metrics = fn(state, make_batch(), KEY)
  want = make_state()
  for _ in range(2):
    want, want_metrics = step_fn()(want, make_batch(), KEY)
  for name, value in want_metrics.items():
    np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)
  for a, b in zip(jax.tree.leaves(state.ema), jax.tree.leaves(want.ema)):
    np.testing.assert_allclose(a, b, atol=2e-3)
