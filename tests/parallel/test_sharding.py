"""Logical axes to mesh axes, and what is said of a layout that cannot be."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding

RULES = sharding.Rules()


@pytest.fixture(scope='module')
def mesh():
  return mesh_lib.make(mesh_lib.MeshConfig(data=2, fsdp=2, tensor=2))


class Layer(nnx.Module):
  def __init__(self, shape, axes, num_stacked=0):
    stack = (3,) * num_stacked
    self.weight = nnx.Param(jnp.zeros(stack + shape), axes=axes)


class Model(nnx.Module):
  def __init__(self, *args, **kwargs):
    self.layers = nnx.List([Layer(*args, **kwargs)])


def to_spec(*axes, rules=RULES, **kwargs):
  return sharding.to_spec(axes, rules, **kwargs)


def test_names_become_mesh_axes(mesh):
  assert to_spec('embed', 'heads', 'head_dim') == P('fsdp', 'tensor', None)
  batch = ('data', 'fsdp', 'expert')
  assert to_spec('batch', None, 'act_embed') == P(batch, None, None)
  dropped = to_spec('batch', 'mlp', drop=frozenset({'data', 'tensor'}))
  assert dropped == P(('fsdp', 'expert'), None)


def test_stacked_dimensions_come_first(mesh):
  for num_stacked, before in enumerate([(), (None,)]):
    shapes = jax.eval_shape(
      functools.partial(Model, (4, 8), ('embed', 'mlp'), num_stacked)
    )
    tree = sharding.shardings(shapes, mesh, RULES)
    weight = tree.layers[0].weight.get_value()
    assert weight == NamedSharding(mesh, P(*before, 'fsdp', 'tensor'))
    # What comes back is a tree of shardings that jit takes as it is.
    assert jax.tree.structure(tree) == jax.tree.structure(shapes)


def test_other_leaves_are_whole(mesh):
  tree = {'step': jnp.zeros(()), 'model': Model((4, 8), ('embed', 'mlp'))}
  tree = sharding.shardings(tree, mesh, RULES)
  assert tree['step'] == NamedSharding(mesh, P())


def test_too_many_stacked_dimensions(mesh):
  model = Model((4, 8), ('embed', 'mlp'), 3)
  message = r"of 5 dimensions has axes \('embed', 'mlp'\); expected one name"
  with pytest.raises(sharding.ShardingError, match=message):
    sharding.shardings(model, mesh, RULES)


def test_unknown_logical_axis(mesh):
  message = (
    r"layers\.0\.weight of shape \(4, 8\) names the logical axis 'width'; "
    r'Rules knows act_embed, batch, embed, '
  )
  with pytest.raises(sharding.ShardingError, match=message):
    sharding.shardings(Model((4, 8), ('embed', 'width')), mesh, RULES)


def test_unknown_mesh_axis(mesh):
  rules = dataclasses.replace(RULES, embed='model')
  message = (
    r"rules\.embed='model' names no mesh axis; the mesh has pipe, data, fsdp, "
    r'expert, tensor, context\. Set rules\.embed to one of these or none\.'
  )
  with pytest.raises(sharding.ShardingError, match=message):
    sharding.shardings(Model((4, 8), ('embed', 'mlp')), mesh, rules)


def test_two_dimensions_on_one_axis(mesh):
  rules = dataclasses.replace(RULES, embed='tensor')
  message = (
    r"layers\.0\.weight of shape \(4, 8\) has axes \('embed', 'mlp'\): the "
    r"dimensions 'embed' and 'mlp' both live on the mesh axis 'tensor', which "
    r'can split only one\. Set rules\.mlp=none or rules\.embed=none\.'
  )
  with pytest.raises(sharding.ShardingError, match=message):
    sharding.shardings(Model((4, 8), ('embed', 'mlp')), mesh, rules)


def test_one_axis_twice_in_one_rule(mesh):
  rules = dataclasses.replace(RULES, embed=('fsdp', 'fsdp'))
  with pytest.raises(sharding.ShardingError, match="mesh axis 'fsdp'"):
    to_spec('embed', rules=rules)


def test_a_dimension_that_does_not_divide(mesh):
  message = (
    r"layers\.0\.weight of shape \(4, 7\): dimension 1 \('mlp'\) of size 7 is "
    r'not divisible by 2 \(mesh\.tensor=2; rules\.mlp=tensor\)\. Choose a size '
    r'or a mesh that divides, or keep it whole: --set rules\.mlp=none\.'
  )
  with pytest.raises(sharding.ShardingError, match=message):
    sharding.shardings(Model((4, 7), ('embed', 'mlp')), mesh, RULES)


def test_a_batch_that_does_not_divide(mesh):
  message = (
    r"batch of shape \(6, 4\): dimension 0 \('batch'\) of size 6 is not "
    r'divisible by 4 \(mesh\.data=2, mesh\.fsdp=2, mesh\.expert=1; '
    r'rules\.batch=data,fsdp,expert\)'
  )
  with pytest.raises(sharding.ShardingError, match=message):
    to_spec('batch', 'length', shape=(6, 4), mesh=mesh, name='batch')


def test_a_name_for_each_dimension(mesh):
  message = (
    r'activation of shape \(8, 4, 2\) has axes .*: 2 names for 3 dimensions\.'
  )
  with pytest.raises(sharding.ShardingError, match=message):
    to_spec('batch', 'length', shape=(8, 4, 2), mesh=mesh)


def test_constrain_outside_use_is_the_identity():
  x = jnp.ones((3, 5))
  # Neither divides anything nor is a known name.
  assert sharding.constrain(x, 'batch', 'nonsense') is x


def test_constrain_splits(mesh):
  x = jnp.arange(32.0).reshape(8, 4)
  fn = jax.jit(lambda x: sharding.constrain(2 * x, 'batch', 'mlp'))
  with sharding.use(mesh, RULES):
    y = fn(x)
  assert y.addressable_shards[0].data.shape == (2, 2)
  np.testing.assert_array_equal(y, 2 * x)
  with sharding.use(mesh, RULES):
    with pytest.raises(sharding.ShardingError, match='activation of shape'):
      fn(jnp.ones((8, 3)))


def test_constrain_drops_manual_axes(mesh):
  """Inside, a row is this device's part: 2 rows, split over fsdp alone."""
  seen = []

  def body(x):
    seen.append(x.shape)
    return sharding.constrain(x, 'batch', 'mlp')

  fn = jax.jit(
    jax.shard_map(
      body, in_specs=P('data'), out_specs=P('data'), axis_names={'data'}
    )
  )
  x = jnp.arange(16.0).reshape(4, 4)
  with sharding.use(mesh, RULES):
    y = fn(x)
  assert set(seen) == {(2, 4)}
  np.testing.assert_array_equal(y, x)


def test_rules_are_part_of_the_key_of_jit(mesh):
  traced = []

  @jax.jit
  def fn(x):
    traced.append(1)
    return sharding.constrain(x, None, 'embed')

  x = jnp.ones((8, 4))
  parts = []
  whole = dataclasses.replace(RULES, embed=None)
  for rules in (RULES, RULES, whole, RULES):
    with sharding.use(mesh, rules):
      parts.append(fn(x).addressable_shards[0].data.shape)
  assert parts == [(8, 2), (8, 2), (8, 4), (8, 2)]
  assert len(traced) == 2
  assert fn(x) is not None
  assert len(traced) == 3, 'outside `use` is a third case'


def test_path_names():
  tree = {'a': [jnp.ones(())], 'b': Layer((2, 2), (None, None))}
  flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=sharding.is_variable)
  names = [sharding.path_name(path) for path, _ in flat]
  assert names == ['a.0', 'b.weight']


def test_the_dtype_of_reductions_is_no_axis(mesh):
  assert not sharding.reduces_in_float32()
  for dtype in ('compute', 'float32'):
    with sharding.use(mesh, sharding.Rules(reduce_dtype=dtype)):
      assert sharding.reduces_in_float32() == (dtype == 'float32')
  message = "names the logical axis 'reduce_dtype'; Rules knows act_embed"
  with pytest.raises(sharding.ShardingError, match=message) as error:
    to_spec('embed', 'reduce_dtype')
  assert 'reduce_dtype' not in str(error.value).partition('knows')[2]
