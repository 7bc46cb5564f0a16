import jax
from jax import lax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import pytest

from t2x.hlo import jaxpr_costs
from t2x.hlo import matmul_flops

_ONCE = 2 * 4 * 8 * 8  # Of (4, 8) with (8, 8).


def _shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


_X, _W = _shape(4, 8), _shape(8, 8)


def _count(fn, *args, trips=None) -> jaxpr_costs.Counted:
  return jaxpr_costs.count(jax.make_jaxpr(fn)(*args), trips)


def _flops(fn, *args, trips=None) -> int:
  return _count(fn, *args, trips=trips).total.flops


def test_a_product_counts_twice_its_multiply_adds():
  batched = lambda a, b: jnp.einsum('bij,bkj->bki', a, b)
  found = _count(batched, _shape(3, 5, 7), _shape(3, 11, 7, dtype=jnp.bfloat16))
  products = found.primitives['dot_general']
  assert products.flops == found.total.flops == 2 * 3 * 5 * 7 * 11
  moved = 3 * (4 * 5 * 7 + 2 * 11 * 7 + 4 * 5 * 11)
  assert products.bytes == products.product_bytes == moved
  assert found.total.product_bytes == moved


def test_bytes_are_those_of_all_operands_and_results():
  found = _count(lambda x: jnp.tanh(x * x) + 1.0, _shape(16))
  # x once, though it is both factors; the constant is in no memory.
  assert found.total.bytes == 3 * 2 * 16 * 4
  assert found.total.product_bytes == found.total.flops == 0


def test_dead_code_is_not_counted():
  def fn(x, w):
    dead = x @ w
    carry = lambda c, _: ((c[0] @ w, c[1] @ w), None)
    return lax.scan(carry, (x, dead), None, length=3)[0][0]

  assert _flops(fn, _X, _W) == 3 * _ONCE


def test_loops_count_their_trips():
  scanned = lambda x, w: lax.scan(lambda x, w: (x @ w, None), x, w)[0]
  assert _flops(scanned, _X, _shape(6, 8, 8)) == 6 * _ONCE
  fixed = lambda x, w: lax.fori_loop(0, 5, lambda _, x: x @ w, x)
  assert _flops(fixed, _X, _W) == 5 * _ONCE


def _until(x, w):
  with jax.named_scope('search'):
    return lax.while_loop(lambda x: (x @ w).sum() < 9, lambda x: x @ w, x)


def test_a_while_loop_needs_its_trips():
  message = r"while loop of source 'search' \(.*test_jaxpr.*\) runs until its"
  with pytest.raises(ValueError, match=message):
    _count(_until, _X, _W)
  with pytest.raises(ValueError, match='Give `trips`'):
    _count(_until, _X, _W, trips=lambda source: None)
  # The condition is asked once more than the body runs.
  assert _flops(_until, _X, _W, trips={'search': 4}.get) == (4 + 5) * _ONCE


def test_the_dearest_branch_counts():
  branches = [lambda x, w: x, lambda x, w: x @ w @ w, lambda x, w: x @ w]
  fn = lambda i, x, w: lax.switch(i, branches, x, w)
  assert _flops(fn, _shape(dtype=jnp.int32), _X, _W) == 2 * _ONCE


@jax.custom_jvp
def _by_jvp(x, w):
  return x @ w


_by_jvp.defjvp(lambda args, dots: (_by_jvp(*args), dots[0] @ args[1]))


@jax.custom_vjp
def _by_vjp(x, w):
  return x @ w


_by_vjp.defvjp(
  lambda x, w: (x @ w, (x, w)),
  lambda kept, grad: (grad @ kept[1].T @ kept[1].T, kept[0].T @ grad),
)


@pytest.mark.parametrize('fn', [_by_jvp, _by_vjp, jax.jit(_by_vjp)])
def test_functions_with_their_own_gradients(fn):
  assert _flops(fn, _X, _W) == _ONCE
  gradient = jax.grad(lambda x, w: (fn(x, w) ** 2).sum())
  # One more, or the two of the odd backward pass above.
  assert _flops(gradient, _X, _W) == (2 if fn is _by_jvp else 3) * _ONCE


def test_a_checkpoint_counts_what_it_makes_again():
  fn = lambda x, w: (jnp.sin(jnp.sin(x @ w) @ w) ** 2).sum()
  both = lambda fn: _flops(jax.value_and_grad(fn, (0, 1)), _X, _W)
  assert both(fn) == 6 * _ONCE
  assert both(jax.checkpoint(fn)) == 8 * _ONCE
  # Without its value the first of the two forward passes is dead.
  assert _flops(jax.grad(jax.checkpoint(fn), (0, 1)), _X, _W) == 6 * _ONCE


def test_a_shard_map_counts_on_all_devices_of_its_manual_axes():
  mesh = jax.make_mesh((2, 4), ('data', 'tensor'), (AxisType.Auto,) * 2)

  def over(*axes):
    return jax.shard_map(
      jnp.matmul,
      mesh=mesh,
      in_specs=(P(axes), P()),
      out_specs=P(axes),
      axis_names=set(axes),
    )

  # Rows are split, so that all devices together do what one would.
  x = _shape(32, 8)
  for axes in ('data',), ('tensor',), ('data', 'tensor'):
    assert _flops(over(*axes), x, _W) == 8 * _ONCE
  inner = lambda x, w: jax.shard_map(
    jnp.matmul,
    in_specs=(P('tensor'), P()),
    out_specs=P('tensor'),
    axis_names={'tensor'},
  )(x, w)
  nested = jax.shard_map(
    inner,
    mesh=mesh,
    in_specs=(P('data'), P()),
    out_specs=P('data'),
    axis_names={'data'},
  )
  assert _flops(nested, x, _W) == 8 * _ONCE
  # What is not split, every device does.
  whole = jax.shard_map(
    jnp.matmul, mesh=mesh, in_specs=(P(), P()), out_specs=P()
  )
  assert _flops(whole, x, _W) == 8 * 8 * _ONCE


@pytest.mark.parametrize('gradient', [False, True])
def test_a_ragged_product_counts_its_rows(gradient):
  """Whatever the groups: forward, and either gradient, multiply each row."""
  rows, groups, D, F = 7, 3, 4, 5

  def fn(x, w, sizes):
    return (lax.ragged_dot(x, w, sizes) ** 2).sum()

  args = _shape(rows, D), _shape(groups, D, F), _shape(groups, dtype=jnp.int32)
  fn = jax.grad(fn, (0, 1)) if gradient else fn
  assert _flops(fn, *args) == (3 if gradient else 1) * 2 * rows * D * F


@pytest.mark.parametrize(
  'groups, stride, padding, dilation',
  [(1, 1, 'SAME', 1), (4, 2, 'VALID', 1), (1, 1, [(2, 0)], 2)],
)
def test_convolutions_count_as_in_the_compiled_program(
  groups, stride, padding, dilation
):
  def fn(x_BTC, w_KCF):
    out = lax.conv_general_dilated(
      x_BTC,
      w_KCF,
      (stride,),
      padding,
      rhs_dilation=(dilation,),
      dimension_numbers=('NWC', 'WIO', 'NWC'),
      feature_group_count=groups,
    )
    return (out**2).sum()

  fn = jax.value_and_grad(fn, (0, 1))
  args = _shape(2, 16, 8), _shape(3, 8 // groups, 12)
  compiled = jax.jit(fn).lower(*args).compile()
  assert _flops(fn, *args) == matmul_flops.matrix_flops(compiled.as_text()) > 0


def _kernel(x, w, grid):
  def body(x_ref, w_ref, out_ref):
    @pl.when(pl.program_id(0) > 0)
    def _():
      out_ref[...] = x_ref[...] @ w_ref[...]

  return pl.pallas_call(
    body,
    grid=grid,
    in_specs=[
      pl.BlockSpec((4, 8), lambda i, j: (i, 0)),
      pl.BlockSpec((8, 8), lambda i, j: (0, j)),
    ],
    out_specs=pl.BlockSpec((4, 8), lambda i, j: (i, j)),
    out_shape=_shape(8, 24),
  )(x, w)


def test_a_pallas_kernel_counts_for_each_point_of_its_grid():
  args = _shape(8, 8), _shape(8, 24)
  found = _count(lambda x, w: _kernel(x, w, (2, 3)), *args)
  assert found.total.flops == 2 * 3 * _ONCE
  moved = 4 * (8 * 8 + 8 * 24 + 8 * 24)
  assert found.total == jaxpr_costs.Cost(
    flops=2 * 3 * _ONCE, bytes=moved, product_bytes=moved
  )


def test_a_grid_of_unknown_size_is_refused():
  fn = lambda n, x, w: _kernel(x, w, (n, 3))
  args = _shape(dtype=jnp.int32), _shape(8, 8), _shape(8, 24)
  with pytest.raises(ValueError, match='The grid .* of the Pallas kernel at'):
    _count(fn, *args)


def test_products_in_what_is_not_known_are_refused():
  def fn(x, w):
    solve = lambda matvec, b: b
    return lax.custom_linear_solve(lambda x: w @ x, x, solve, solve)

  with pytest.raises(ValueError, match=r"products in 'custom_linear_solve' \("):
    _count(fn, _shape(8), _W)


@pytest.mark.parametrize('scan', [True, False])
@pytest.mark.parametrize('remat', [True, False])
def test_sources_are_named_scopes_in_both_passes(scan, remat):
  def layer(x, w):
    with jax.named_scope('mlp'):
      y = jnp.sin(jnp.einsum('td,df->tf', x, w))
      with jax.named_scope('out'):
        return x + jnp.sin(y @ w)

  layer = jax.checkpoint(layer) if remat else layer

  def loss(w, x):
    with jax.named_scope('tower'):
      if scan:
        x, _ = lax.scan(lambda x, w: (layer(x, w), None), x, w)
      else:
        for i in range(3):
          x = layer(x, w[i])
    return (x @ w[0]).sum()

  def step(w, x):
    with jax.named_scope('step'):
      return jax.grad(loss)(w, x)

  found = _count(step, _shape(3, 8, 8), _X)
  flops = {name: c.flops for name, c in found.sources.items() if c.flops}
  passes = 4 if remat else 3
  first = 0 if scan else 1  # Of x itself no gradient is asked.
  assert flops == {
    'step': 2 * _ONCE,  # Whose value is not asked for.
    'step/tower/mlp': (3 * passes - first) * _ONCE,
    'step/tower/mlp/out': 3 * passes * _ONCE,
  }
  for parts in found.sources, found.primitives:
    for field in 'flops', 'bytes', 'product_bytes':
      total = sum(getattr(cost, field) for cost in parts.values())
      assert total == getattr(found.total, field)
