"""Tokens looked up where the columns lie, against the whole table."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import pytest

from t2x.hlo import collectives
from t2x.layers import embed
from t2x.layers import param
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding

V, D, B, T = 64, 16, 8, 4


def table_of(vocab=V):
  init = param.make_initializer('normal', 1.0)
  return embed.Embed(vocab, D, init=init, rngs=nnx.Rngs(0))


def compiled(sizes, vocab=V, length=T):
  """Returns a function of (table, tokens, gradient), its mesh and places."""
  mesh = mesh_lib.make(mesh_lib.MeshConfig(**{'data': 1, **sizes}))
  rules = sharding.Rules()
  place = lambda *axes: NamedSharding(
    mesh, sharding.to_spec(axes, rules, mesh=mesh)
  )
  table, tokens = place('vocab', 'embed'), place('batch', 'length')

  def run(module, tokens, d_out):
    out, back = jax.vjp(lambda m: m(tokens, jnp.float32), module)
    return out, back(d_out)[0]

  out = place('batch', 'length', 'act_embed')
  module = jax.eval_shape(functools.partial(table_of, vocab))
  where = jax.tree.map(lambda _: table, module)
  fn = jax.jit(
    run, in_shardings=(where, tokens, out), out_shardings=(out, where)
  )
  ids = jax.ShapeDtypeStruct((B, length), jnp.int32)
  grad = jax.ShapeDtypeStruct((B, length, D), jnp.float32)
  with sharding.use(mesh, rules):
    return fn.lower(module, ids, grad).compile(), mesh


LAYOUTS = {
  'fsdp': {'fsdp': 8},
  'fsdp and tensor': {'fsdp': 4, 'tensor': 2},
  'fsdp and context': {'fsdp': 4, 'context': 2},
  'all': {'data': 2, 'fsdp': 2, 'tensor': 2},
}


@pytest.mark.parametrize('name', LAYOUTS)
@pytest.mark.usefixtures('compiled_as_by_users')
def test_vectors_and_gradients_are_the_tables(name):
  fn, mesh = compiled(LAYOUTS[name])
  module = table_of()
  tokens = jax.random.randint(jax.random.key(1), (B, T), 0, V)
  # Whole numbers: their sums are exact, in whatever order.
  d_out = jax.random.randint(jax.random.key(2), (B, T, D), -9, 9) * 1.0
  args, _ = fn.input_shardings
  out, grad = fn(*jax.device_put((module, tokens, d_out), args))
  table_VD = np.asarray(module.table_VD[...])
  np.testing.assert_array_equal(out, table_VD[np.asarray(tokens)])
  want = np.zeros((V, D), np.float32)
  np.add.at(want, np.asarray(tokens), np.asarray(d_out))
  np.testing.assert_array_equal(grad.table_VD[...], want)
  found = collectives.collectives(fn.as_text(), mesh)
  sizes = mesh.shape
  f, t, rest = sizes['fsdp'], sizes['tensor'], sizes['data'] * sizes['context']
  own = B // (f * sizes['data']) * (T // sizes['context'])
  assert collectives.total(found, 'all-to-all', 'fsdp') == 2 * 4 * own * D
  # The ids of the devices that share a table; nothing else is gathered.
  assert collectives.total(found, 'all-gather') == 4 * own * f
  # What rows of another device along `tensor` add; the gradient of a part of
  # the table over devices with other tokens.
  reduced = 4 * own * D * (t > 1) + 4 * V // t * D // f * (rest > 1)
  assert collectives.total(found, 'all-reduce') == reduced


@pytest.mark.parametrize(
  ('sizes', 'vocab', 'length'),
  [
    ({'data': 8}, V, T),  # The columns are not split.
    ({'fsdp': 4, 'tensor': 2}, 16, 16),  # The table is the less to send.
  ],
)
@pytest.mark.usefixtures('compiled_as_by_users')
def test_where_the_table_is_gathered(sizes, vocab, length):
  fn, mesh = compiled(sizes, vocab, length)
  found = collectives.collectives(fn.as_text(), mesh)
  assert not collectives.total(found, 'all-to-all')
