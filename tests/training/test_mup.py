"""Rates by width and depth: every factor of the table in layers/mup.py."""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from t2x.config import experiment
from t2x.layers import mup
from t2x.layers import param
from t2x.layers import position
from t2x.models import model as model_lib
from t2x.models import sizes
from t2x.parallel import sharding
from t2x.training import optim

_M, _L = 4.0, 2.0  # Width and depth as multiples of the base.
_MUP = mup.Mup(base_width=16, base_depth=2, depth_power=0.5)
_OPTIMIZERS = {
  'adamw': optim.AdamW(weight_decay=0.1),
  'lion': optim.Lion(weight_decay=0.1),
  'adafactor': optim.Adafactor(weight_decay=0.1),
  'muon': optim.Muon(weight_decay=0.1),
}


@pytest.fixture(scope='module')
def base(tmp_path_factory):
  return tiny.experiment_of(tmp_path_factory.mktemp('mup'))


def _wide(base, **changes):
  """Four times as wide, twice as deep, with the sizes of before as the base."""
  model = sizes.with_width(base.model, 64)
  model = dataclasses.replace(model, **{'num_layers': 4, **changes})
  return dataclasses.replace(base, model=model)


def test_other_widths_grow_in_proportion(base):
  wide = sizes.with_width(base.model, 64)
  assert wide.embed_dim == 64 and wide.mlp.hidden == 128
  assert (wide.attention.num_heads, wide.attention.head_dim) == (16, 4)
  with pytest.raises(ValueError, match='num_heads=4 does not become whole'):
    sizes.with_width(base.model, 18)


def _changes(config, params, grads):
  """Returns the change of each parameter by one update, by name."""
  tx = experiment.optimizer(config, 10)
  updates, _ = tx.update(grads, tx.init(params), params)
  leaves, _ = jax.tree_util.tree_flatten_with_path(
    updates, is_leaf=sharding.is_variable
  )
  return {sharding.path_name(path): u[...] for path, u in leaves}


@pytest.mark.parametrize('kind', _OPTIMIZERS)
def test_rates_of_each_class_of_parameters(base, kind):
  optimizer = dataclasses.replace(
    _OPTIMIZERS[kind],
    clip_norm=None,
    schedule=optim.Schedule(shape='constant'),
  )
  plain = dataclasses.replace(_wide(base), optim=optimizer)
  scaled = dataclasses.replace(_wide(base, mup=_MUP), optim=optimizer)
  model = model_lib.make(plain.model, rngs=nnx.Rngs(0))
  params = nnx.state(model, nnx.Param)
  keys = iter(jax.random.split(jax.random.key(1), 99))
  grads = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
  no_decay = lambda c: dataclasses.replace(
    c, optim=dataclasses.replace(c.optim, weight_decay=0.0)
  )
  before, after = (
    _changes(no_decay(c), params, grads) for c in (plain, scaled)
  )
  matrix = {'adafactor': _M**-0.5, 'muon': _M**-0.5}.get(kind, 1 / _M)
  seen = set()
  for name, change in before.items():
    in_layer = name.startswith('tower.layers.')
    is_matrix = name.removesuffix('.value').rpartition('.')[2] in (
      'q_DNH',
      'k_DKH',
      'v_DKH',
      'o_NHD',
      'up_DF',
      'down_FD',
    )
    expected = (matrix if is_matrix else 1.0) * (_L**-0.5 if in_layer else 1)
    seen.add((is_matrix, in_layer))
    np.testing.assert_allclose(
      after[name],
      expected * np.asarray(change),
      rtol=2e-5,
      atol=1e-9,
      err_msg=name,
    )
  assert seen == {(True, True), (False, True), (False, False)}
  # Decay goes by the depth alone: over the width, rate x decay stays.
  decayed = _changes(scaled, params, grads)
  name = next(n for n in before if 'up_DF' in n)
  of = dict(
    (sharding.path_name(path), p[...])
    for path, p in jax.tree_util.tree_flatten_with_path(
      params, is_leaf=sharding.is_variable
    )[0]
  )[name]
  np.testing.assert_allclose(
    decayed[name] - after[name],
    -optimizer.learning_rate * 0.1 * _L**-0.5 * of,
    rtol=1e-3,
    atol=1e-8,
  )


def test_weights_and_multipliers(base):
  wide = _wide(base, mup=_MUP, num_layers=4).model
  wide = dataclasses.replace(wide, init=param.Init(std=0.5))
  model = model_lib.make(wide, rngs=nnx.Rngs(0))
  layer = model.tower.layers.group[0]
  std = lambda p: float(jnp.std(p[...]))
  assert std(layer.mlp.up_DF) == pytest.approx(0.5 * _M**-0.5, rel=0.05)
  assert std(model.embeddings.tokens.table_VD) == pytest.approx(0.5, rel=0.05)
  assert model.head.scale == 1 / _M
  assert layer.branch_factor == pytest.approx(_L**-0.5)
  # Drawn by the fan-in, matrices follow by themselves.
  by_fan = dataclasses.replace(wide, init=param.Init(scale='fan_in', std=1.0))
  assert by_fan.matrix_init.std == 1.0
  scaled = dataclasses.replace(wide, tied_head='tied_scaled')
  head = model_lib.make(scaled, rngs=nnx.Rngs(0)).head
  assert head.scale == pytest.approx(16**-0.5 / _M)
  # Embeddings are as large as those of the base.
  factor = lambda **own: float(
    jnp.std(
      model_lib.make(
        dataclasses.replace(wide, position=position.Rotary(), **own),
        rngs=nnx.Rngs(0),
      ).embeddings(jnp.arange(9)[None], jnp.arange(9)[None])
    )
  )
  assert factor(embed_scale=True) / factor() == pytest.approx(4, rel=1e-5)


def test_stochastic_gradient_descent_has_no_rule(base):
  config = dataclasses.replace(_wide(base, mup=_MUP), optim=optim.Sgd())
  with pytest.raises(ValueError, match='Choose another optimizer'):
    experiment.optimizer(config, 10)


def test_scores_of_larger_heads(base):
  attention = dataclasses.replace(base.model.attention, head_dim=16)
  config = dataclasses.replace(
    base.model, attention=attention, mup=mup.Mup(base_width=16, base_head_dim=4)
  )
  layer = model_lib.make(config, rngs=nnx.Rngs(0)).tower.layers.group[0]
  assert layer.attention.config.scale == pytest.approx(4**0.5 / 16)
  own = dataclasses.replace(attention, scale=1.0)
  config = dataclasses.replace(config, attention=own)
  layer = model_lib.make(config, rngs=nnx.Rngs(0)).tower.layers.group[0]
  assert layer.attention.config.scale == 1.0


def test_base_sizes_change_nothing(base):
  own = mup.Mup(base_width=16, base_depth=2, base_head_dim=4)
  config = dataclasses.replace(base.model, mup=own)
  models = [model_lib.make(c, rngs=nnx.Rngs(0)) for c in (base.model, config)]
  tokens = jnp.arange(32).reshape(1, 32)
  logits = [np.asarray(model(tokens)) for model in models]
  np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'base_width': 0}, 'base_width=0; it is 1 or more'),
    ({'depth_power': 0.3}, r'depth_power=0.3; it is in \[0.5, 1\]'),
  ],
)
def test_messages(changes, message):
  with pytest.raises(ValueError, match=message):
    mup.Mup(**changes)


def test_depth_is_scaled_once(base):
  with pytest.raises(ValueError, match='depth_scaled=true does too'):
    dataclasses.replace(
      base.model, mup=_MUP, init=param.Init(depth_scaled=True)
    )


def test_an_older_run_goes_on(base, tmp_path):
  """Its config.json knows nothing of the setting, which is none."""
  import json

  from t2x.config import overrides
  from t2x.trainer import workdir

  data = overrides.to_json(base)
  del data['model']['mup']
  (tmp_path / 'config.json').write_text(json.dumps(data))
  assert workdir.check(str(tmp_path), base) == {}
