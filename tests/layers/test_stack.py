"""A stack scanned, unrolled and applied layer by layer is the same."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.attention import mask as mask_lib
from t2x.layers import attention_config
from t2x.layers import block
from t2x.layers import dropout
from t2x.layers import mlp
from t2x.layers import stack
from t2x.models import common
from t2x.models import decoder

D, LENGTH = 16, 8


class Layer(nnx.Module):
  """Not linear, and aware of its kind, so that order matters."""

  def __init__(self, kind, rngs):
    self.kind = kind
    self.weight = nnx.Param(jax.random.normal(rngs.params(), (D, D)) / 4)

  def __call__(self, x, number):
    y = jnp.sin(x @ self.weight[...] + number)
    return x + y if self.kind == 'add' else x * y


def make_stack(num_layers, kinds):
  makers = [lambda rngs, kind=kind: Layer(kind, rngs) for kind in kinds]
  return stack.Stack(makers, num_layers, rngs=nnx.Rngs(0))


def apply(layer, x, cache, number):
  if cache is not None:
    x = x + cache
    cache = cache + number
  return layer(x, number), cache


def layers_in_order(layers):
  """Every layer on its own, by the documented place of its parameters."""
  size = max(len(layers.group), 1)
  result = []
  for i in range(layers.num_layers - len(layers.remainder)):
    member = layers.group[i % size]
    result.append(jax.tree.map(lambda p, i=i: p[i // size], member))
  return [*result, *layers.remainder]


# Layers, kinds of the group: whole repeats, a remainder, less than a group.
SHAPES = [(4, 1), (4, 2), (5, 2), (3, 3), (1, 2)]


@pytest.mark.parametrize('num_layers,size', SHAPES)
def test_scan_unrolled_and_layer_by_layer(num_layers, size):
  kinds = ('add', 'times', 'add')[:size]
  layers = make_stack(num_layers, kinds)
  x = jax.random.normal(jax.random.key(1), (2, D))
  caches = layers.map_layers(lambda layer: layer.weight[0, 0])
  want, want_caches = x, []
  for number, layer in enumerate(layers_in_order(layers)):
    assert layer.kind == kinds[number % size]
    want, cache = apply(layer, want, layer.weight[0, 0], number)
    want_caches.append(cache)
  for scan in (True, False):
    execution = stack.Execution(scan=scan)
    run = jax.jit(
      lambda layers, x, e=execution: layers(
        apply, x, caches=caches, execution=e
      )
    )
    got, (group, rest) = run(layers, x)
    np.testing.assert_allclose(got, want, atol=1e-5)
    whole = num_layers - len(rest)
    found = [group[i % size][i // size] for i in range(whole)] + list(rest)
    np.testing.assert_allclose(found, want_caches, atol=1e-5)


def test_layers_are_drawn_by_number_whatever_the_group():
  """Regrouping moves parameters; it does not change them."""
  one = layers_in_order(make_stack(5, ('add',)))
  two = layers_in_order(make_stack(5, ('add', 'add')))
  for a, b in zip(one, two, strict=True):
    np.testing.assert_array_equal(a.weight[...], b.weight[...])
  assert (one[0].weight[...] != one[1].weight[...]).any()


def test_unstack_gives_back_slices_and_one_stacked_gradient():
  tree = {'a': jnp.arange(6.0).reshape(3, 2), 'b': jnp.arange(3)}
  parts = stack.unstack(tree, 3)
  np.testing.assert_array_equal(parts[2]['a'], [4, 5])
  assert parts[1]['b'] == 1
  loss = lambda a: sum(
    (i + 1) * part['a'].sum()
    for i, part in enumerate(stack.unstack({'a': a}, 3))
  )
  np.testing.assert_array_equal(
    jax.grad(loss)(tree['a']), [[1, 1], [2, 2], [3, 3]]
  )


# --- A real decoder. ---

POLICIES = ['none', 'full', 'dots', 'save:query,attention,mlp_up']


CONFIG = decoder.DecoderConfig(
  vocab_size=32,
  vocab_multiple=1,
  num_layers=2,
  embed_dim=D,
  attention=attention_config.Dense(num_heads=2, head_dim=8),
  # What is recomputed must draw the same bits again.
  mlp=mlp.MlpConfig(hidden=64, dropout=0.1),
)


def loss_of(execution):
  tokens = jax.random.randint(jax.random.key(2), (2, LENGTH), 0, 32)
  keys = dropout.row_keys(jax.random.key(3), jnp.arange(2))
  return lambda model: jnp.square(
    model(tokens, keys_B=keys, execution=execution)
  ).sum()


@pytest.fixture(scope='module')
def model():
  return decoder.Decoder(CONFIG, rngs=nnx.Rngs(0))


@pytest.fixture(scope='module')
def expected(model):
  """Loss and gradients, unrolled, with nothing recomputed."""
  plain = stack.Execution(scan=False)
  return jax.jit(jax.value_and_grad(loss_of(plain)))(model)


@pytest.mark.parametrize('remat', POLICIES)
def test_every_policy_has_the_same_gradients(model, expected, remat):
  execution = stack.Execution(scan=True, remat=remat)
  loss, grads = jax.jit(jax.value_and_grad(loss_of(execution)))(model)
  np.testing.assert_allclose(loss, expected[0], rtol=1e-6)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(expected[1])):
    np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


def saved_bytes(model, remat):
  """What the forward pass of an unrolled model keeps for the backward one."""
  execution = stack.Execution(scan=False, remat=remat)
  _, backward = jax.eval_shape(lambda m: jax.vjp(loss_of(execution), m), model)
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(backward))


def test_policies_save_what_they_say(model):
  none, full, dots, named = (saved_bytes(model, p) for p in POLICIES)
  assert full < named < none
  assert full < dots < none


def test_unknown_policies():
  with pytest.raises(ValueError, match="remat='half'; it is none, full, dots"):
    stack.Execution(remat='half')
  with pytest.raises(ValueError, match='names among query, key, value'):
    stack.Execution(remat='save:logits')


def test_block_runs_outside_a_stack(model):
  """Layer i of a model is a block; calling blocks in turn is the tower."""
  tower = model.tower
  x = jax.random.normal(jax.random.key(4), (2, LENGTH, D))
  positions = common.positions_of({'inputs': x[..., 0]})
  context = block.Context(
    mask=mask_lib.self_attention(None, causal=True), positions_BT=positions
  )
  want = x
  for layer in layers_in_order(tower.layers):
    want, _, _ = layer(want, context)
  np.testing.assert_allclose(
    tower.end(tower(x, context)[0]), tower.final_norm(want), atol=1e-5
  )
