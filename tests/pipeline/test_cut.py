"""The pieces of a layer's gradient, against the gradient in one piece."""

import dataclasses
import functools
import math

from flax import nnx
import jax
from jax.extend import core
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.attention import mask as mask_lib
from t2x.layers import attention_config
from t2x.layers import block
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import norm
from t2x.layers import position
from t2x.losses import load_balancing
from t2x.models import decoder
from t2x.models import model as model_lib
from t2x.pipeline import cut

B, T, D = 4, 16, 32

# Of programs this small compiling takes the time.
jit = functools.partial(
  jax.jit, compiler_options={'xla_backend_optimization_level': '0'}
)
_MODEL = decoder.DecoderConfig(
  vocab_size=16,
  num_layers=1,
  embed_dim=D,
  dropout=0.1,
  attention=attention_config.Dense(num_heads=4, head_dim=8, bias=True),
  mlp=mlp.MlpConfig(hidden=128),
)
_CONFIGS = {
  'gpt2': _MODEL,
  'llama': dataclasses.replace(
    _MODEL,
    mlp=mlp.MlpConfig(hidden=128, gated=True, activation='silu', bias=False),
    norm=norm.RMSNorm(),
    position=position.Rotary(),
  ),
  'post_norm': dataclasses.replace(_MODEL, residual='post_norm'),
  'parallel': dataclasses.replace(_MODEL, residual='parallel'),
  'sandwich': dataclasses.replace(
    _MODEL,
    residual='sandwich',
    norm=norm.RMSNorm(unit_offset=True),
    attention=attention_config.Dense(
      num_heads=4, head_dim=8, bias=True, out_bias=False, qk_norm=True
    ),
  ),
  'relative': dataclasses.replace(_MODEL, position=position.RelativeBuckets()),
  'experts': dataclasses.replace(
    _MODEL, mlp=moe.MoeConfig(num_experts=4, hidden=128)
  ),
  'bfloat16': dataclasses.replace(_MODEL, dtype='bfloat16'),
}


class Layer:
  """One layer of a model, as a function to be cut, and its inputs."""

  def __init__(self, config, remat='none', trainable=True):
    model = model_lib.make(config, rngs=nnx.Rngs(0))
    self.tower = model.tower
    layer = jax.tree.map(lambda a: a[0], self.tower.layers.group[0])
    shared = {'bias': self.tower.bias}
    self.params = cut.Params(slot=layer, shared=shared)
    if not trainable:
      self.params = cut.Params(slot_frozen=layer, shared_frozen=shared)
    self.x = jax.random.normal(jax.random.key(1), (B, T, D))
    self.x = self.x.astype(config.dtype)
    keys_B = jax.random.split(jax.random.key(2), B)
    self.rest = keys_B, jnp.full(B, 1 / B)
    self.piece = cut.Cut(
      self.fn, self.params, self.x, None, self.rest, remat=remat
    )
    self.d_y = jax.random.normal(jax.random.key(3), self.x.shape, self.x.dtype)
    self.d_aux = jax.tree.map(jnp.ones_like, self.piece.aux)

  def fn(self, params, x, side, rest):
    del side
    keys_B, share_B = rest
    shared = params.shared or params.shared_frozen
    context = block.Context(
      mask=mask_lib.self_attention(None, causal=True),
      keys_B=keys_B,
      rotary=getattr(self.tower.config, 'position', None)
      if isinstance(self.tower.config.position, position.Rotary)
      else None,
      bias=shared['bias'],
    )
    layer = params.slot or params.slot_frozen
    y, _, stats = layer(x, context)
    if stats is None:
      return y, None, None
    stats = {'': jax.tree.map(lambda a: a[None], stats)}
    return y, sum(load_balancing.losses(stats, share_B).values()), None

  @property
  def fixed(self):
    params = self.params
    return (
      self.piece.slot_values(params.slot, params.slot_frozen),
      self.piece.shared_values(params.shared, params.shared_frozen),
    )

  def whole(self, params, x):
    """Returns outputs and gradients in one piece."""
    out, pull = jax.vjp(
      lambda p, x: self.fn(p, x, None, self.rest)[:2], params, x
    )
    return out, pull((self.d_y, self.d_aux))

  def pieces(self):
    """Returns (y, d_x, gradients by place), piece by piece."""
    piece, fixed = self.piece, self.fixed
    y, _, _, stored = jit(piece.forward)(fixed, self.x, None, self.rest)
    d_x, _, early, crossing = jit(piece.backward)(
      fixed, stored, None, self.rest, self.d_y, self.d_aux
    )
    late = jit(piece.weight)(fixed, stored[1], None, self.rest, crossing)
    grads = dict(zip(piece.early + piece.late, [*early, *late]))
    return y, d_x, grads


def products(jaxpr) -> int:
  """Returns the multiply-adds of a jaxpr's products, calls gone into."""
  total = 0
  for eqn in jaxpr.eqns:
    for inner in core.jaxprs_in_params(eqn.params):
      total += products(inner) * eqn.params.get('length', 1)
    if eqn.primitive.name in ('dot_general', 'ragged_dot_general'):
      left, right = (v.aval.shape for v in eqn.invars[:2])
      numbers = eqn.params.get('dimension_numbers')
      if eqn.primitive.name == 'dot_general':
        (contracted, _), _ = numbers
        size = math.prod(left[i] for i in contracted)
        total += math.prod(eqn.outvars[0].aval.shape) * size
      else:  # Each row meets one matrix.
        total += math.prod(left) * math.prod(right) // right[0] // left[1]
  return total


def multiply_adds(fn, *args) -> int:
  return products(jax.make_jaxpr(fn)(*args).jaxpr)


def forward_backward_weight(layer):
  """Returns the multiply-adds of the three pieces."""
  piece, fixed = layer.piece, layer.fixed
  args = (fixed, layer.x, None, layer.rest)
  *_, stored = jax.eval_shape(piece.forward, *args)
  d = layer.d_y, layer.d_aux
  b_args = (fixed, stored, None, layer.rest, *d)
  *_, crossing = jax.eval_shape(piece.backward, *b_args)
  w_args = (fixed, stored[1], None, layer.rest, crossing)
  return (
    multiply_adds(piece.forward, *args),
    multiply_adds(piece.backward, *b_args),
    multiply_adds(piece.weight, *w_args),
  )


def close(got, want, tolerance, least=0.0):
  scale = max(float(jnp.abs(want).max()), least)
  got, want = (np.asarray(a, np.float32) for a in (got, want))
  np.testing.assert_allclose(got, want, atol=tolerance * scale)


def least_of(leaves) -> float:
  """The least scale of a gradient: that of a key's bias is 0 but for noise."""
  return 1e-3 * max(float(jnp.abs(leaf).max()) for leaf in leaves)


@pytest.mark.parametrize('name', _CONFIGS)
def test_pieces_make_the_gradient_and_repeat_nothing(name):
  layer = Layer(_CONFIGS[name])
  y, d_x, grads = layer.pieces()
  (want, _), (d_params, want_d_x) = jit(layer.whole)(layer.params, layer.x)
  tolerance = 1e-5 if layer.x.dtype == jnp.float32 else 2e-2
  close(y, want, tolerance)
  close(d_x, want_d_x, tolerance)
  leaves = jax.tree.leaves(d_params)
  assert sorted(grads) == list(range(len(leaves)))
  for i, grad in grads.items():
    close(grad, leaves[i], tolerance, least_of(leaves))
  parts = forward_backward_weight(layer)
  whole = multiply_adds(layer.whole, layer.params, layer.x)
  assert sum(parts) == whole
  # Each of the three is about a third: attention's scores have no weights.
  if name != 'experts':  # Products of groups are not counted by their rows.
    assert max(parts) < 0.4 * whole


@pytest.mark.parametrize('name', _CONFIGS)
def test_what_is_kept_depends_on_activations(name):
  """No cast weight, and no table made of weights, goes into a buffer."""
  layer = Layer(_CONFIGS[name])
  piece = layer.piece
  twice = lambda a: jnp.concatenate([a, a])
  double = cut.Cut(
    layer.fn,
    layer.params,
    twice(layer.x),
    None,
    jax.tree.map(twice, layer.rest),
  )
  size = lambda s: math.prod(s.shape)
  for kept, more in (
    (piece.stored, double.stored),
    (piece.crossing, double.crossing),
  ):
    kept, more = jax.tree.leaves(kept), jax.tree.leaves(more)
    assert kept
    assert [2 * size(s) for s in kept] == [size(s) for s in more]
  # The weights are cast once, before any loop.
  dtypes = {
    s.dtype for s in piece.fixed_slot if len(s.shape) >= 2 and min(s.shape) > 1
  }
  if name == 'bfloat16':
    assert dtypes == {jnp.dtype('bfloat16')}


def test_gradients_without_a_product_of_their_own_are_early():
  layer = Layer(_CONFIGS['gpt2'])
  paths = [
    jax.tree_util.keystr(path)
    for path, _ in jax.tree_util.tree_leaves_with_path(
      (layer.params.slot, layer.params.shared)
    )
  ]
  early = {paths[i].split('.')[-2] for i in layer.piece.early}
  late = {paths[i].split('.')[-2] for i in layer.piece.late}
  assert {'scale', 'bias', 'up_bias_F', 'o_bias_D'} <= early
  assert late == {'q_DNH', 'k_DKH', 'v_DKH', 'o_NHD', 'up_DF', 'down_FD'}


def test_policies_keep_less():
  size = lambda remat: sum(
    np.prod(s.shape) for part in Layer(_MODEL, remat).piece.stored for s in part
  )
  assert size('save:query') < size('dots') < size('none')
  assert size('full') == size('none')  # It makes all of it again, for a while.


@pytest.mark.parametrize('remat', ['dots', 'save:query,mlp_up'])
def test_policies_change_no_number(remat):
  layer = Layer(_MODEL, remat)
  _, d_x, grads = layer.pieces()
  _, (d_params, want) = jit(layer.whole)(layer.params, layer.x)
  np.testing.assert_allclose(d_x, want, atol=1e-5)
  leaves = jax.tree.leaves(d_params)
  for i, leaf in enumerate(leaves):
    close(grads[i], leaf, 1e-5, least_of(leaves))


def test_recomputation_gives_what_the_forward_kept():
  layer = Layer(_MODEL)
  args = (layer.fixed, layer.x, None, layer.rest)
  y, _, _, stored = jit(layer.piece.forward)(*args)
  again, kept = jit(layer.piece.recompute)(*args)
  np.testing.assert_array_equal(y, again)
  jax.tree.map(np.testing.assert_array_equal, stored, kept)


def test_frozen_parameters_have_no_gradients_and_no_products():
  layer = Layer(_MODEL, trainable=False)
  assert not layer.piece.early and not layer.piece.late
  assert not layer.piece.crossing
  _, d_x, grads = layer.pieces()
  want = jit(layer.whole)(layer.params, layer.x)[1][1]
  np.testing.assert_allclose(d_x, want, atol=1e-5)
  assert not grads
