"""Facts about Flax that the design rests on; a new version may change them."""

import warnings

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


class Linear(nnx.Module):
  """A weight with logical axes in its metadata, and a static field."""

  def __init__(self, rngs, name='linear'):
    self.name = name
    self.weight = nnx.Param(
      jax.random.normal(rngs.params(), (3, 3)), axes=('embed', 'mlp')
    )

  def __call__(self, x):
    return x @ self.weight[...]


def test_a_module_is_a_pytree_of_its_arrays():
  model = Linear(nnx.Rngs(0))
  leaves, treedef = jax.tree.flatten(model)
  assert [leaf.shape for leaf in leaves] == [(3, 3)]
  assert isinstance(leaves[0], jax.Array)
  again = treedef.unflatten([leaves[0] + 1])
  assert again.name == 'linear'
  np.testing.assert_array_equal(again.weight[...], model.weight[...] + 1)


def test_paths_end_in_value():
  flat = jax.tree_util.tree_flatten_with_path(Linear(nnx.Rngs(0)))[0]
  names = [
    jax.tree_util.keystr(path, simple=True, separator='.') for path, _ in flat
  ]
  assert names == ['weight.value']


def test_plain_transforms_take_modules():
  model = Linear(nnx.Rngs(0))
  x = jnp.ones((2, 3))
  loss = lambda model, x: jnp.square(model(x)).sum()
  grads = jax.jit(jax.grad(loss))(model, x)
  assert isinstance(grads, Linear)
  tx = optax.sgd(0.1)
  updates, _ = tx.update(grads, tx.init(model), model)
  stepped = optax.apply_updates(model, updates)
  assert loss(stepped, x) < loss(model, x)
  checkpointed = jax.grad(jax.checkpoint(loss))(model, x)
  np.testing.assert_allclose(
    checkpointed.weight[...], grads.weight[...], rtol=1e-6
  )


def test_vmap_stacks_and_scan_unstacks():
  keys = jax.random.split(jax.random.key(0), 4)
  layers = jax.vmap(lambda key: Linear(nnx.Rngs(key)))(keys)
  assert layers.weight[...].shape == (4, 3, 3)
  out, _ = jax.lax.scan(
    lambda x, layer: (layer(x), None), jnp.ones((1, 3)), layers
  )
  want = jnp.ones((1, 3))
  for i in range(4):
    want = want @ layers.weight[...][i]
  np.testing.assert_allclose(out, want, rtol=1e-5)


def test_metadata_is_untouched_by_stacking_and_transforms():
  keys = jax.random.split(jax.random.key(0), 4)
  layers = jax.vmap(lambda key: Linear(nnx.Rngs(key)))(keys)
  assert layers.weight.get_metadata('axes') == ('embed', 'mlp')
  shapes = jax.eval_shape(lambda: Linear(nnx.Rngs(0)))
  assert shapes.weight.get_metadata('axes') == ('embed', 'mlp')
  mapped = jax.jit(lambda m: jax.tree.map(lambda x: 2 * x, m))(layers)
  assert mapped.weight.get_metadata('axes') == ('embed', 'mlp')


def test_a_variable_mutated_under_jit_is_lost():
  """Hence modules are immutable; if this raised, the rule could relax."""
  model = Linear(nnx.Rngs(0))
  before = np.asarray(model.weight[...])

  @jax.jit
  def mutate(model):
    model.weight[...] = model.weight[...] + 1
    return model.weight[...]

  inside = mutate(model)
  np.testing.assert_array_equal(inside, before + 1)
  np.testing.assert_array_equal(model.weight[...], before)


def test_one_param_under_two_attributes_is_two_leaves():
  """Hence tied weights are tied by calling, never by sharing a Param."""

  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.a = nnx.Param(jnp.ones(2))
      self.b = self.a

  assert len(jax.tree.leaves(Tied(nnx.Rngs(0)))) == 2


def test_flaxs_own_sharding_metadata_raises_without_a_mesh():
  """Hence logical names are kept under `axes`, which Flax does not read."""
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    with pytest.raises(ValueError, match='mesh'):
      nnx.Param(jnp.ones((2, 2)), sharding_names=('a', 'b'))
  assert nnx.Param(jnp.ones((2, 2)), axes=('a', 'b')).shape == (2, 2)


def test_plain_lists_of_modules_are_refused():
  """Hence nnx.List, whose members are part of the tree."""

  class Plain(nnx.Module):
    def __init__(self, rngs):
      self.layers = [Linear(rngs), Linear(rngs)]

  class Listed(nnx.Module):
    def __init__(self, rngs):
      self.layers = nnx.List([Linear(rngs), Linear(rngs)])

  with pytest.raises(ValueError, match='nnx.List'):
    Plain(nnx.Rngs(0))
  assert len(jax.tree.leaves(Listed(nnx.Rngs(0)))) == 2


def count_traces(models):
  """How often a jitted function is traced for these models."""
  traces = []
  run = jax.jit(lambda model, x: traces.append(None) or model(x))
  for model in models:
    run(model, jnp.ones((1, 3)))
  return len(traces)


def test_equal_static_fields_share_a_compilation():
  same = [Linear(nnx.Rngs(0)), Linear(nnx.Rngs(1))]
  assert count_traces(same) == 1
  other = [Linear(nnx.Rngs(0)), Linear(nnx.Rngs(0), name='other')]
  assert count_traces(other) == 2


def test_a_lambda_attribute_recompiles_for_every_instance():
  """Hence activations are named in configs."""

  class WithLambda(Linear):
    def __init__(self, rngs):
      super().__init__(rngs)
      self.act = lambda x: x

  assert count_traces([WithLambda(nnx.Rngs(0)) for _ in range(2)]) == 2
