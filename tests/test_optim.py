"""Optimizers, schedules and the layout of their state."""

import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

from t2x import mesh as mesh_lib
from t2x import optim
from t2x import sharding
from t2x import train_step

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
  return jax.jit(functools.partial(update, config))


def train(config, make, num_steps=3, place=lambda x: x):
  params = place(make(0))
  state = optim.make(config, 10).init(params)
  for step in range(num_steps):
    params, state = updater(config)(params, place(make(step + 1)), state)
  return params, state


def values(tree):
  """Path -> numpy array, of a tree of parameters."""
  return {
    name: np.asarray(p.get_value()) for name, p in optim.named(tree).items()
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
  state_where = optim.shardings(state, stacked(0), mesh, RULES)
  fn = jax.jit(
    functools.partial(update, config), out_shardings=(where, state_where)
  )
  params = jax.device_put(stacked(0), where)
  with sharding.use(mesh, RULES):
    state = jax.jit(optim.make(config, 10).init, out_shardings=state_where)(
      params
    )
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
  """Path -> spec of each array of the optimizer's state, replicated left out."""
  state = jax.eval_shape(optim.make(CONFIGS[kind], 10).init, stacked(0))
  where = optim.shardings(state, stacked(0), mesh, RULES)
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
    s for n, s in found.items() if n.endswith(name) and f'.{part}.' in n
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
