"""Counts of compiled programs against counts by hand, on CPU and TPU."""

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest
import tpu

from t2x.hlo import collectives
from t2x.hlo import matmul_flops
from t2x.parallel import mesh as mesh_lib

SIZES = {'data': 2, 'tensor': 4}
BOTH = P('data', 'tensor')


@pytest.fixture(scope='module', params=['cpu', 'tpu'])
def mesh(request):
  if request.param == 'tpu':
    return tpu.mesh(**SIZES)
  return mesh_lib.make(mesh_lib.MeshConfig(**SIZES))


def compiled(fn, mesh, *args):
  """Returns the text of `fn` compiled; args are (shape, spec[, dtype])."""
  shapes = [
    jax.ShapeDtypeStruct(
      shape, *(dtype or [jnp.float32]), sharding=NamedSharding(mesh, spec)
    )
    for shape, spec, *dtype in args
  ]
  return tpu.compile_text(jax.jit(fn).lower(*shapes))


def sent(fn, mesh, in_spec, out_spec, shape):
  """What `fn` sends, run on each device's part of one array."""
  fn = jax.shard_map(
    fn, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False
  )
  text = compiled(fn, mesh, (shape, in_spec))
  return [
    (c.kind, c.axes, c.bytes, c.times, c.loops)
    for c in collectives.collectives(text, mesh)
  ]


def test_a_sum_in_a_scan(mesh):
  def fn(x):
    body = lambda x, _: (lax.psum(2 * x + 1, 'tensor'), None)
    return lax.scan(body, x, length=5)[0]

  found = sent(fn, mesh, BOTH, BOTH, (16, 512))
  assert found == [('all-reduce', ('tensor',), 8 * 128 * 4, 5, 1)]


def test_a_gather_counts_what_it_returns(mesh):
  fn = lambda x: lax.all_gather(x, 'tensor', tiled=True)
  found = sent(fn, mesh, P('tensor'), P(), (64, 128))
  assert found == [('all-gather', ('tensor',), 64 * 128 * 4, 1, 0)]


def test_a_scatter_counts_what_it_is_given(mesh):
  fn = lambda x: lax.psum_scatter(x, 'data', tiled=True)
  found = sent(fn, mesh, P(None, 'tensor'), BOTH, (64, 512))
  assert found == [('reduce-scatter', ('data',), 64 * 128 * 4, 1, 0)]


def test_a_ring_in_a_loop(mesh):
  ring = [(i, (i + 1) % 4) for i in range(4)]
  step = lambda _, x: lax.ppermute(x, 'tensor', ring) + 1
  fn = lambda x: lax.fori_loop(0, 3, step, x)
  found = sent(fn, mesh, BOTH, BOTH, (16, 512))
  assert found == [('collective-permute', ('tensor',), 8 * 128 * 4, 3, 1)]


def test_an_exchange_of_all_with_all(mesh):
  fn = lambda x: lax.all_to_all(x, 'tensor', 0, 1, tiled=True)
  found = sent(fn, mesh, P('tensor'), P(None, 'tensor'), (64, 128))
  assert found == [('all-to-all', ('tensor',), 16 * 128 * 4, 1, 0)]


def test_nested_loops_multiply(mesh):
  def fn(x):
    inner = lambda _, x: lax.psum(x + 1, ('data', 'tensor'))
    outer = lambda _, x: 2 * lax.fori_loop(0, 4, inner, x)
    return lax.fori_loop(0, 3, outer, x)

  found = sent(fn, mesh, BOTH, BOTH, (16, 512))
  assert found == [('all-reduce', ('data', 'tensor'), 8 * 128 * 4, 12, 2)]


def test_a_loop_of_unknown_trips_is_named(mesh):
  def fn(x, n):
    body = lambda _, x: lax.psum(x + 1, 'data')
    return lax.fori_loop(0, n, body, x)

  fn = jax.shard_map(
    fn, mesh=mesh, in_specs=(BOTH, P()), out_specs=BOTH, check_vma=False
  )
  text = compiled(fn, mesh, ((16, 512), BOTH), ((), P(), jnp.int32))
  message = r'The loop while\S* in \S+ \(jit\(fn\)/shard_map/while\) runs until'
  with pytest.raises(ValueError, match=message):
    collectives.collectives(text, mesh)
  assert matmul_flops.matrix_flops(text) == 0  # Nothing in it to count.


def test_products_in_a_scan(mesh):
  """2 M N K for each trip, on each device's rows."""

  def fn(x, weights):
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]

  text = compiled(fn, mesh, ((128, 256), P('data')), ((6, 256, 256), P()))
  assert matmul_flops.matrix_flops(text) == 6 * 2 * (128 // 2) * 256 * 256


def test_the_dearest_branch_counts(mesh):
  def fn(x, w, flag):
    return lax.cond(flag, lambda x: x @ w, lambda x: (x @ w) @ w, x)

  square = (256, 256)
  text = compiled(fn, mesh, (square, P()), (square, P()), ((), P(), jnp.bool_))
  assert matmul_flops.matrix_flops(text) == 2 * 2 * 256**3


@pytest.mark.parametrize(
  ('groups', 'stride', 'padding'),
  [(1, 1, 'SAME'), (1, 2, 'VALID'), (4, 1, 'SAME')],
)
def test_convolutions_and_their_gradients(groups, stride, padding):
  """Each pair of an output's and a kernel's position where an input is.

  On CPU: a TPU splits long dimensions of small convolutions into batches, and
  computes some positions twice.
  """
  mesh = mesh_lib.make(mesh_lib.MeshConfig(**SIZES))
  B, T, C, F, K = 2, 16, 8, 12, 3

  def fn(x_BTC, w_KCF):
    return lax.conv_general_dilated(
      x_BTC,
      w_KCF,
      (stride,),
      padding,
      dimension_numbers=('NWC', 'WIO', 'NWC'),
      feature_group_count=groups,
    )

  args = ((B, T, C), P()), ((K, C // groups, F), P())
  pad = 1 if padding == 'SAME' else 0
  starts = range(-pad, T + pad - K + 1, stride)
  pairs = sum(0 <= start + k < T for start in starts for k in range(K))
  once = 2 * B * F * (C // groups) * pairs
  assert matmul_flops.matrix_flops(compiled(fn, mesh, *args)) == once
  both = jax.grad(lambda x, w: (fn(x, w) ** 2).sum(), (0, 1))
  assert matmul_flops.matrix_flops(compiled(both, mesh, *args)) == 3 * once
