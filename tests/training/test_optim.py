"""Optimizers, schedules and the layout of their state."""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from t2x.config import experiment
from t2x.config import overrides
from t2x.layers import position
from t2x.models import decoder
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.trainer import checkpointer
from t2x.training import optim
from t2x.training import optim_state
from t2x.training import train_state

RULES = sharding.Rules()
LAYERS, D, N, H, F = 3, 8, 4, 2, 16
SCHEDULE = optim.Schedule(shape='linear', warmup_steps=2)
FIELDS = {'learning_rate': 0.1, 'schedule': SCHEDULE, 'clip_norm': 1.0}
CONFIGS = {
  'adam': optim.Adam(**FIELDS),
  'adamw': optim.AdamW(**FIELDS),
  'adafactor': optim.Adafactor(**FIELDS, weight_decay=0.1),
  'adafactor_factored': optim.Adafactor(
    **FIELDS, weight_decay=0.1, min_factored=4
  ),
  'lion': optim.Lion(**FIELDS, weight_decay=0.1),
  'muon': optim.Muon(**FIELDS),
  'sgd': optim.Sgd(**FIELDS, weight_decay=0.1, nesterov=True),
}

# One layer's parameters: name -> (shape, logical axes).
LAYER = {
  'q_DNH': ((D, N, H), ('embed', 'heads', 'head_dim')),
  'o_NHD': ((N, H, D), ('heads', 'head_dim', 'embed')),
  'q_bias_NH': ((N, H), ('heads', 'head_dim')),
  'up_DF': ((D, F), ('embed', 'mlp')),
  'down_FD': ((F, D), ('mlp', 'embed')),
  'scale': ((D,), (None,)),
}
REST = {
  'table_VD': ((12, D), ('vocab', 'embed')),
  'bias': ((D,), (None,)),
}
NOT_DECAYED = {'q_bias_NH', 'scale', 'bias'}


# Half the time goes without LLVM's optimisations.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': 0}
)


class Params(nnx.Module):
  def __init__(self, values, specs):
    for name, value in values.items():
      setattr(self, name, nnx.Param(jnp.asarray(value), axes=specs[name][1]))


def draw(seed):
  """Numbers for every layer, each layer of another size, and for the rest."""
  rng = np.random.default_rng(seed)
  normal = lambda shape, std: rng.normal(0, std, shape).astype(np.float32)
  layers = [
    {name: normal(spec[0], 0.1 * 3**i) for name, spec in LAYER.items()}
    for i in range(LAYERS)
  ]
  return layers, {name: normal(spec[0], 0.5) for name, spec in REST.items()}


def stacked(seed):
  layers, rest = draw(seed)
  layers = {name: np.stack([p[name] for p in layers]) for name in LAYER}
  return {'layers': Params(layers, LAYER), 'rest': Params(rest, REST)}


def unstacked(seed):
  layers, rest = draw(seed)
  layers = {f'layer{i}': Params(p, LAYER) for i, p in enumerate(layers)}
  return {**layers, 'rest': Params(rest, REST)}


def update(config, params, grads, state):
  updates, state = optim.make(config, 10).update(grads, state, params)
  return optax.apply_updates(params, updates), state


@functools.cache
def updater(config):
  return jit(functools.partial(update, config))


def train(config, make, num_steps=3, place=lambda x: x):
  params = place(make(0))
  state = optim.make(config, 10).init(params)
  for step in range(num_steps):
    params, state = updater(config)(params, place(make(step + 1)), state)
  return params, state


def values(tree):
  """Path -> numpy array, of a tree of parameters."""
  return {
    name: np.asarray(p.get_value())
    for name, p in optim_state.arrays_by_name(tree).items()
  }


@functools.cache
def trained(kind):
  return train(CONFIGS[kind], stacked)


@pytest.mark.parametrize('kind', CONFIGS)
def test_a_stack_is_its_layers(kind):
  got, want = (
    values(trained(kind)[0]),
    values(train(CONFIGS[kind], unstacked)[0]),
  )
  start = values(stacked(0))
  for i in range(LAYERS):
    for name in LAYER:
      a, b = got[f'layers.{name}'][i], want[f'layer{i}.{name}']
      np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6, err_msg=name)
      assert (a != start[f'layers.{name}'][i]).all()
  for name in REST:
    np.testing.assert_allclose(
      got[f'rest.{name}'], want[f'rest.{name}'], rtol=2e-6, atol=2e-6
    )


@pytest.fixture(scope='module')
def mesh():
  return mesh_lib.make(mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2))


@pytest.mark.parametrize('kind', CONFIGS)
def test_sharded_is_unsharded(kind, mesh):
  config = CONFIGS[kind]
  where = sharding.shardings(stacked(0), mesh, RULES)
  state = jax.eval_shape(optim.make(config, 10).init, stacked(0))
  state_where = optim_state.shardings(state, stacked(0), mesh, RULES)
  fn = jit(
    functools.partial(update, config), out_shardings=(where, state_where)
  )
  params = jax.device_put(stacked(0), where)
  with sharding.use(mesh, RULES):
    state = jit(optim.make(config, 10).init, out_shardings=state_where)(params)
    for step in range(3):
      grads = jax.device_put(stacked(step + 1), where)
      params, state = fn(params, grads, state)
  assert params['layers'].up_DF.get_value().sharding.spec == P(
    None, 'fsdp', 'tensor'
  )
  for name, want in values(trained(kind)[0]).items():
    np.testing.assert_allclose(
      values(params)[name], want, rtol=1e-5, atol=1e-5, err_msg=name
    )


def specs(kind, mesh):
  """Path -> spec of each array of the optimizer's state."""
  state = jax.eval_shape(optim.make(CONFIGS[kind], 10).init, stacked(0))
  where = optim_state.shardings(state, stacked(0), mesh, RULES)
  flat = jax.tree_util.tree_leaves_with_path(where)
  # As jit will hold it to.
  jax.tree.map(lambda x, s: s.shard_shape(x.shape), state, where)
  names = [sharding.path_name(path).removesuffix('.value') for path, _ in flat]
  return {n: s.spec for n, (_, s) in zip(names, flat)}


PARAMETER_SPECS = {
  'layers.q_DNH': P(None, 'fsdp', 'tensor', None),
  'layers.o_NHD': P(None, 'tensor', None, 'fsdp'),
  'layers.q_bias_NH': P(None, 'tensor', None),
  'layers.up_DF': P(None, 'fsdp', 'tensor'),
  'layers.down_FD': P(None, 'tensor', 'fsdp'),
  'layers.scale': P(None, None),
  'rest.table_VD': P('tensor', 'fsdp'),
  'rest.bias': P(None),
}


@pytest.mark.parametrize(
  'kind,moments',
  [
    ('adam', ['mu', 'nu']),
    ('adamw', ['mu', 'nu']),
    ('lion', ['mu']),
    ('sgd', ['trace']),
  ],
)
def test_moments_follow_their_parameters(kind, moments, mesh):
  found = specs(kind, mesh)
  for moment in moments:
    own = {
      name.partition(f'.{moment}.')[2]: spec
      for name, spec in found.items()
      if f'.{moment}.' in name
    }
    assert own == PARAMETER_SPECS
  rest = [n for n in found if not any(f'.{m}.' in n for m in moments)]
  assert rest and all(found[n] == P() for n in rest), 'counts are whole'


def test_muon_state_is_split(mesh):
  found = specs('muon', mesh)
  muon = {n.partition('.mu.')[2]: s for n, s in found.items() if 'muon' in n}
  matrices = ['q_DNH', 'o_NHD', 'up_DF', 'down_FD']
  for name in [f'layers.{name}' for name in matrices]:
    assert muon.pop(name) == PARAMETER_SPECS[name]
  assert all(s == P() for s in muon.values())
  others = set(PARAMETER_SPECS) - {f'layers.{name}' for name in matrices}
  adam = {n.partition('.nu.')[2]: s for n, s in found.items() if '.nu.' in n}
  assert adam == {name: PARAMETER_SPECS[name] for name in others}


def test_rows_and_columns_lose_the_reduced_dimension(mesh):
  found = specs('adafactor_factored', mesh)
  ends = lambda part, name: next(
    s for n, s in found.items() if f'.{name}.' in n and n.endswith(f'.{part}')
  )
  # optax reduces rows over the largest dimension, columns over the second.
  assert ends('v_row', 'layers.up_DF') == P(None, 'fsdp')
  assert ends('v_col', 'layers.up_DF') == P(None, 'tensor')
  assert ends('v_row', 'layers.down_FD') == P(None, 'fsdp')
  assert ends('v_col', 'layers.down_FD') == P(None, 'tensor')
  assert ends('v_row', 'layers.q_DNH') == P(None, 'tensor', None)
  assert ends('v_col', 'layers.q_DNH') == P(None, 'fsdp', None)
  assert ends('v_row', 'rest.table_VD') == P('fsdp')
  assert ends('v_col', 'rest.table_VD') == P('tensor')
  # What is not factored: the moment in `v` is whole, the others are dummies.
  assert ends('v', 'layers.q_bias_NH') == P(None, 'tensor', None)
  assert ends('v_row', 'layers.q_bias_NH') == P()
  assert ends('v', 'layers.up_DF') == P()


# --- Against other implementations. ---


def assert_same(got, want, rtol=1e-5):
  want = values(want)
  for name, value in values(got).items():
    np.testing.assert_allclose(
      value, want[name], rtol=rtol, atol=1e-6, err_msg=name
    )


def by_optax(tx, num_steps=3):
  """Updates unstacked parameters, which optax sees as they are."""
  params = unstacked(0)
  state = tx.init(params)
  step = jit(tx.update)
  for number in range(num_steps):
    updates, state = step(unstacked(number + 1), state, params)
    params = optax.apply_updates(params, updates)
  return params


def test_adamw_is_that_of_optax():
  config = CONFIGS['adamw']
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(
      optim.make_schedule(config, 10),
      config.b1,
      config.b2,
      config.eps,
      weight_decay=config.weight_decay,
      mask=optim.is_decayed,
    ),
  )
  assert_same(train(config, unstacked)[0], by_optax(tx))


@pytest.mark.parametrize('kind', ['adafactor', 'adafactor_factored'])
def test_adafactor_is_that_of_optax(kind):
  """Without decay, which optax does not multiply by the learning rate."""
  config = dataclasses.replace(CONFIGS[kind], weight_decay=0.0)
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adafactor(
      optim.make_schedule(config, 10),
      min_dim_size_to_factor=config.min_factored,
    ),
  )
  assert_same(train(config, unstacked)[0], by_optax(tx), rtol=2e-5)


def rate(step):
  """The schedule of FIELDS: two steps of warmup, then down over eight."""
  return 0.05 * (step + 1) if step < 2 else 0.1 * (1 - 0.9 * (step - 1) / 8)


def in_numpy(step_fn, decay, num_steps=3):
  """Clips, steps and decays every parameter alone, in float64."""
  params = {k: v.astype(np.float64) for k, v in values(stacked(0)).items()}
  memory = {k: (np.zeros_like(v), np.zeros_like(v)) for k, v in params.items()}
  for step in range(num_steps):
    grads = values(stacked(step + 1))
    norm = np.sqrt(
      sum((g.astype(np.float64) ** 2).sum() for g in grads.values())
    )
    assert norm > 1, 'so that clipping shows'
    for k, p in params.items():
      update, *memory[k] = step_fn(grads[k] / norm, *memory[k], step + 1)
      decayed = k.rpartition('.')[2] not in NOT_DECAYED
      params[k] = p - rate(step) * (update + decay * decayed * p)
  return params


def adam(g, m, v, t, b2=0.999):
  m, v = 0.9 * m + 0.1 * g, b2 * v + (1 - b2) * g * g
  return m / (1 - 0.9**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8), m, v


def lion(g, m, v, t):
  return np.sign(0.9 * m + 0.1 * g), 0.99 * m + 0.01 * g, v


def nesterov(g, m, v, t):
  m = g + 0.9 * m
  return g + 0.9 * m, m, v


@pytest.mark.parametrize(
  'kind,step_fn,decay',
  [
    ('adam', adam, 0.0),
    ('adamw', functools.partial(adam, b2=0.95), 0.1),
    ('lion', lion, 0.1),
    ('sgd', nesterov, 0.1),
  ],
)
def test_the_rule_in_numpy(kind, step_fn, decay):
  got = values(trained(kind)[0])
  for name, want in in_numpy(step_fn, decay).items():
    np.testing.assert_allclose(
      got[name], want, rtol=2e-5, atol=2e-6, err_msg=name
    )


def test_adafactor_decays_by_the_learning_rate():
  """Not by that times the parameter's size: zero gradients show decay alone."""
  config = optim.Adafactor(
    learning_rate=0.1,
    weight_decay=0.5,
    schedule=optim.Schedule(shape='constant'),
  )
  zeros = jax.tree.map(jnp.zeros_like, stacked(0))
  tx = optim.make(config, 10)
  updates, _ = jit(tx.update)(zeros, tx.init(stacked(0)), stacked(0))
  for name, p in values(stacked(0)).items():
    decayed = name.rpartition('.')[2] not in NOT_DECAYED
    np.testing.assert_allclose(
      values(updates)[name], -0.05 * decayed * p, rtol=1e-6, err_msg=name
    )


# --- Muon. ---

MUON = optim.Muon(
  learning_rate=1.0,
  schedule=optim.Schedule(shape='constant'),
  weight_decay=0.0,
  clip_norm=None,
)
# Flattened, in -> out: all heads are one matrix.
MATRICES = {
  'q_DNH': (D, N * H),
  'o_NHD': (N * H, D),
  'up_DF': (D, F),
  'down_FD': (F, D),
}


def test_muon_is_orthogonal_for_each_layer():
  """Five Newton-Schulz steps leave singular values in about 0.7 .. 1.2."""
  tx = optim.make(MUON, 10)
  params, grads = stacked(0), stacked(1)
  updates, _ = jit(tx.update)(grads, tx.init(params), params)
  for name, (rows, cols) in MATRICES.items():
    update = values(updates)[f'layers.{name}'].reshape(LAYERS, rows, cols)
    gradient = values(grads)[f'layers.{name}'].reshape(LAYERS, rows, cols)
    update = update / (0.2 * max(rows, cols) ** 0.5)
    for layer in range(LAYERS):
      u, _, v = np.linalg.svd(gradient[layer], full_matrices=False)
      singular = np.linalg.svd(update[layer], compute_uv=False)
      assert 0.4 < singular.min() and singular.max() < 1.3, (name, singular)
      # And in the gradient's directions.
      np.testing.assert_allclose(update[layer], -(u @ v), atol=0.35)
      # The root mean square is Adam's, about 0.2.
      rms = np.sqrt(np.square(values(updates)[f'layers.{name}'][layer]).mean())
      assert 0.1 < rms < 0.26


def test_muon_leaves_the_rest_to_adam():
  tx = optim.make(MUON, 10)
  params, grads = stacked(0), stacked(1)
  updates, _ = jit(tx.update)(grads, tx.init(params), params)
  names = ['layers.scale', 'layers.q_bias_NH', 'rest.table_VD', 'rest.bias']
  for name in names:
    g = values(grads)[name]
    np.testing.assert_allclose(
      values(updates)[name], -np.sign(g), atol=1e-4, err_msg=name
    )


# --- What is decayed, clipped and frozen. ---


def test_only_matrices_and_tables_are_decayed():
  found = optim_state.arrays_by_name(optim.is_decayed(stacked(0)))
  assert not found, 'its leaves are not arrays'
  flat = jax.tree_util.tree_leaves_with_path(optim.is_decayed(stacked(0)))
  left_out = {
    sharding.path_name(path).removesuffix('.value').rpartition('.')[2]
    for path, decayed in flat
    if not decayed
  }
  assert left_out == NOT_DECAYED


def test_clipping_by_the_global_norm():
  make = lambda clip: optim.make(
    optim.Sgd(
      learning_rate=1.0,
      schedule=optim.Schedule(shape='constant'),
      clip_norm=clip,
      momentum=0.0,
    ),
    10,
  )
  grads = stacked(1)
  norm = float(optax.tree.norm(grads))
  for clip, factor in [(1.0, 1 / norm), (2 * norm, 1.0), (None, 1.0)]:
    tx = make(clip)
    updates, _ = tx.update(grads, tx.init(stacked(0)), stacked(0))
    want = jax.tree.map(lambda g, f=factor: -f * g, grads)
    assert_same(updates, want)


@pytest.mark.parametrize('kind', CONFIGS)
def test_frozen_parameters_have_no_state(kind):
  """A part that is left out is None, in gradients and in the state."""
  whole = stacked(0)
  pattern = r'layers\.(up_DF|q_bias_NH)|rest\.table_VD'
  params, frozen = train_state.partition(whole, pattern)
  grads, _ = train_state.partition(stacked(1), pattern)
  tx = optim.make(CONFIGS[kind], 10)
  state = tx.init(params)
  new, state = updater(CONFIGS[kind])(params, grads, state)
  text = ' '.join(
    sharding.path_name(path)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if leaf.size > 8
  )
  assert 'up_DF' in text and 'table_VD' in text
  for name in ('q_DNH', 'down_FD', 'scale'):
    assert name not in text
  new = values(train_state.combine(new, frozen))
  for name, before in values(whole).items():
    trained_here = any(n in name for n in ('up_DF', 'q_bias', 'table_VD'))
    assert (new[name] != before).any() == trained_here, name


# --- Schedules. ---

ENDED = ('cosine', 'linear', 'wsd')
SHAPES = (*ENDED, 'constant', 'inverse_sqrt')


def by_corners(shape, num_steps, warmup, decay, final):
  """Shares of the peak at each update, in float64, drawn through corners."""
  number_N = np.arange(1, num_steps + 4)  # Three past the end.
  if shape in ('constant', 'inverse_sqrt'):
    rising_N = np.minimum(number_N / max(warmup, 1), 1.0)
    if shape == 'constant':
      return rising_N
    return rising_N * np.sqrt(max(warmup, 1) / np.maximum(number_N, warmup))
  if num_steps == 1:
    return np.full(4, final)
  warmup = min(warmup, num_steps - 1)
  top = max(warmup, 1)
  if shape == 'wsd':
    top = max(top, num_steps - max(round(decay * num_steps), 1))
  done_N = np.interp(number_N, [top, num_steps], [0.0, 1.0])
  if shape == 'cosine':
    done_N = np.sin(done_N * np.pi / 2) ** 2
  low = 0.0 if warmup else 1.0
  rising_N = np.interp(number_N, [0, max(warmup, 1)], [low, 1.0])
  return rising_N * (done_N * final + (1 - done_N))


def rates_of(shape, warmup, decay, final, peak=0.37):
  config = optim.Schedule(
    shape=shape, warmup_steps=warmup, decay=decay, final=final
  )
  return optim.Sgd(learning_rate=peak, schedule=config), peak


@pytest.mark.parametrize('shape', SHAPES)
def test_a_schedule_is_its_formula_up_to_its_end(shape):
  """Of any length and warmup; the ends are exact."""
  cases = [
    (num_steps, warmup, decay, final)
    for num_steps in (1, 2, 3, 5, 16, 37)
    for warmup in (*range(min(num_steps, 5) + 1), num_steps - 1, num_steps + 3)
    for decay in ((0.01, 0.2, 1.0) if shape == 'wsd' else (0.2,))
    for final in (0.0, 0.1, 1.0, 1.5)
  ]
  for number, case in enumerate(cases):
    num_steps, *rest = case
    config, peak = rates_of(shape, *rest)
    rates = optim.make_schedule(config, num_steps)
    rates = jit(rates) if number % 50 == 0 else rates
    got_N = np.asarray(rates(jnp.arange(num_steps + 3)))
    want_N = peak * by_corners(shape, *case)
    np.testing.assert_allclose(got_N, want_N, 2e-6, 1e-7, err_msg=str(case))
    if shape in ENDED:
      end = np.float32(peak * rest[-1])
      assert (got_N[num_steps - 1 :] == end).all(), case
    if rest[0] < num_steps and num_steps > 1:
      assert got_N[max(rest[0] - 1, 0)] == np.float32(peak), case


def test_a_long_run_ends_exactly():
  for shape in ENDED:
    config, peak = rates_of(shape, 10_000, 0.2, 0.1)
    rates = optim.make_schedule(config, 1_000_003)
    got = rates(jnp.array([9_999, 1_000_001, 1_000_002]))
    assert got[0] == np.float32(peak) and got[2] == np.float32(peak * 0.1)
    np.testing.assert_allclose(got[1], peak * 0.1, rtol=1e-4)


@pytest.mark.parametrize(
  'make,message',
  [
    (lambda: optim.Sgd(learning_rate=0.0), r'learning_rate=0\.0; it is above'),
    (lambda: optim.Sgd(clip_norm=0.0), r'clip_norm=0\.0; it is above 0'),
    (lambda: optim.Sgd(learning_rate=math.nan), r'learning_rate=nan; it is'),
    (lambda: optim.AdamW(b1=2.0), r'optim\.b1=2\.0; it is in \[0, 1\)'),
    (lambda: optim.Sgd(momentum=-0.1), r'optim\.momentum=-0\.1; it is in'),
    (lambda: optim.Lion(weight_decay=-1.0), r'weight_decay=-1\.0; it is 0'),
    (lambda: optim.Schedule(warmup_steps=-1), r'warmup_steps=-1; it is 0 or'),
    (lambda: optim.Schedule(decay=0.0), r'decay=0\.0; it is in \(0, 1\]'),
  ],
)
def test_settings_that_mean_nothing(make, message):
  with pytest.raises(ValueError, match=message):
    make()


def test_another_kind_on_the_command_line_leaves_the_decay_behind():
  config = experiment.Experiment(optim=optim.Muon(learning_rate=0.5))
  new = overrides.override(config, {'optim': 'adam', 'optim.b2': '0.9'})
  assert new.optim == optim.Adam(learning_rate=0.5, b2=0.9)
  with pytest.raises(ValueError, match="Adam has no 'weight_decay'"):
    overrides.override(config, {'optim': 'adam', 'optim.weight_decay': '0.1'})


def test_tables_of_relative_biases_are_not_decayed():
  config = decoder.DecoderConfig(position=position.RelativeBuckets())
  model = jax.eval_shape(lambda: decoder.Decoder(config, rngs=nnx.Rngs(0)))
  found = checkpointer.by_path(optim.is_decayed(model))
  (table,) = (name for name in found if name.endswith('table_RN.value'))
  assert table == 'tower.bias.table_RN.value'
  assert not found[table] and found['embeddings.tokens.table_VD.value']
