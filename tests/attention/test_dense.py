"""Blocked attention against softmax over lists of keys, one query at a time."""

import dataclasses
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seen

from t2x.attention import blocks
from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.attention import patterns
from t2x.attention import reference as oracle
from t2x.hlo import matmul_flops
from t2x.layers import dropout
from t2x.layers import position
from t2x.parallel import zigzag

B, H = 2, 4


def sees(mask, b, t, s):
  """Whether query t of row b sees key s, from the description's words."""
  i = t if mask.q_index_BT is None else int(mask.q_index_BT[b, t])
  j = s if mask.k_index_BS is None else int(mask.k_index_BS[b, s])
  prefix = 0
  if mask.prefix_BS is not None:
    row = mask.prefix_BS[b]
    prefix = int(row[s] if len(row) > 1 else row[0])
  in_order = seen.by_place(mask.pattern, i, j, prefix)
  if mask.q_segments_BT is None:
    return in_order
  q, k = mask.q_segments_BT[b, t], mask.k_segments_BS[b, s]
  return in_order and int(q) == int(k)


def naive(q, k, v, mask, *, options=None, bias=None):
  """Returns (out, lse) as float64, by loops over rows, queries and heads."""
  options = options or dense.AttentionOptions()
  scale = options.scale or 1 / math.sqrt(q.shape[-1])
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  mask = jax.tree.map(np.asarray, mask)
  rows, T, N, _ = q.shape
  per_key_head = N // k.shape[2]
  out = np.zeros((rows, T, N, v.shape[-1]))
  lse = np.full((rows, T, N), -np.inf)
  for b in range(rows):
    for t in range(T):
      near = [s for s in range(k.shape[1]) if sees(mask, b, t, s)]
      for n in range(N if near else 0):
        keys = k[b, near, n // per_key_head]
        scores = keys @ q[b, t, n] * scale
        if options.soft_cap:
          scores = options.soft_cap * np.tanh(scores / options.soft_cap)
        if bias is not None:
          scores = scores + [bias(b, t, s, n) for s in near]
        weights = np.exp(scores - scores.max())
        lse[b, t, n] = scores.max() + math.log(weights.sum())
        values = v[b, near, n // per_key_head]
        out[b, t, n] = weights @ values / weights.sum()
  return out, lse


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Shapes, mask and options of one comparison."""

  mask: mask_lib.Mask = mask_lib.Mask()
  T: int = 11
  S: int = 11
  N: int = 2
  K: int = 2
  options: dense.AttentionOptions = dense.AttentionOptions(block=4)
  blind: bool = False  # Some query sees nothing.


def table(*rows):
  return jnp.asarray(rows, jnp.int32)


SEGMENTS = table([1, 1, 1, 2, 2, 2, 2, 3, 3, 0, 0], [1] * 6 + [2] * 5)
Mask = mask_lib.Mask
make_mask = mask_lib.make

CASES = {
  'everything': Case(),
  'causal': Case(mask=make_mask(causal=True)),
  'one block': Case(
    mask=make_mask(causal=True), options=dense.AttentionOptions()
  ),
  'block of one': Case(
    mask=make_mask(causal=True), options=dense.AttentionOptions(block=1)
  ),
  'window': Case(mask=make_mask(causal=True, window=3)),
  'window of one': Case(mask=make_mask(causal=True, window=1)),
  'two-sided window': Case(mask=make_mask(window=3)),
  'prefix': Case(mask=make_mask(causal=True, prefix_B=jnp.asarray([0, 7]))),
  'a prefix for each document': Case(
    mask=make_mask(causal=True, q_segments_BT=SEGMENTS, k_segments_BS=SEGMENTS)
    | mask_lib.Mask(
      pattern=patterns.Prefix(),
      prefix_BS=table([2] * 3 + [5] * 4 + [8] * 2 + [0] * 2, [4] * 6 + [9] * 5),
      q_segments_BT=SEGMENTS,
      k_segments_BS=SEGMENTS,
    )
  ),
  'prefix and window': Case(
    mask=make_mask(causal=True, window=2, prefix_B=jnp.asarray([3, 9]))
  ),
  'prefix and two-sided window': Case(
    mask=make_mask(window=2, prefix_B=jnp.asarray([3, 10]))
  ),
  'segments': Case(mask=Mask(q_segments_BT=SEGMENTS, k_segments_BS=SEGMENTS)),
  'causal segments and window': Case(
    mask=make_mask(
      causal=True,
      window=4,
      q_segments_BT=SEGMENTS,
      k_segments_BS=SEGMENTS,
    )
  ),
  'prefix and segments': Case(
    mask=make_mask(
      causal=True,
      prefix_B=jnp.asarray([5, 8]),
      q_segments_BT=SEGMENTS,
      k_segments_BS=SEGMENTS,
    )
  ),
  'grouped-query': Case(mask=make_mask(causal=True), N=6, K=2),
  'multi-query': Case(mask=make_mask(causal=True, window=5), N=3, K=1),
  'more keys, causal': Case(mask=make_mask(causal=True), T=5, S=9),
  'more queries, causal': Case(mask=make_mask(causal=True), T=9, S=5),
  'more queries, window': Case(
    mask=make_mask(causal=True, window=2), T=13, S=3, blind=True
  ),
  'queries somewhere': Case(
    mask=make_mask(causal=True, q_index_BT=table([4, 5, 6], [0, 1, 2])),
    T=3,
    S=8,
    N=4,
    K=2,
  ),
  'queries somewhere, window': Case(
    mask=make_mask(causal=True, window=2, q_index_BT=table([7], [3])),
    T=1,
    S=8,
  ),
  'queries and keys somewhere': Case(
    mask=make_mask(
      causal=True,
      window=4,
      q_index_BT=table([8, 9, 10], [4, 5, 6]),
      k_index_BS=table([5, 6, 7, 8, 9], [9, 8, 7, 6, 2]),
    ),
    T=3,
    S=5,
    blind=False,
  ),
  'some see nothing': Case(
    mask=Mask(
      q_segments_BT=table([1, 9, 2], [7, 7, 7]),
      k_segments_BS=table([1, 1, 2, 2], [1, 2, 3, 4]),
    ),
    T=3,
    S=4,
    blind=True,
  ),
  'scale': Case(options=dense.AttentionOptions(scale=1.0, block=4)),
  'soft cap': Case(
    mask=make_mask(causal=True),
    options=dense.AttentionOptions(soft_cap=0.7, block=3),
  ),
}


def draw(case, value_dim=H):
  keys = jax.random.split(jax.random.key(0), 3)
  normal = lambda key, *shape: 2 * jax.random.normal(key, (B, *shape))
  return (
    normal(keys[0], case.T, case.N, H),
    normal(keys[1], case.S, case.K, H),
    normal(keys[2], case.S, case.K, value_dim),
  )


def attend(case, q, k, v, **kwargs):
  options = dataclasses.replace(case.options, **kwargs)
  return dense.attend(q, k, v, case.mask, options)


def attend_part(case, q, k, v):
  return dense.attend_part(q, k, v, case.mask, options=case.options)


def run(case, *arrays):
  return jax.jit(lambda *a: attend(case, *a))(*arrays)


def reference(case, q, k, v, **kwargs):
  options = dataclasses.replace(case.options, **kwargs)
  return oracle.attend(q, k, v, case.mask, options)


def close(got, want, atol=2e-5):
  np.testing.assert_allclose(got, want, atol=atol, rtol=1e-4)


@pytest.mark.parametrize('name', CASES)
def test_attend_and_the_oracle_equal_the_loops(name):
  case = CASES[name]
  q, k, v = draw(case)
  expected, expected_lse = naive(q, k, v, case.mask, options=case.options)

  @jax.jit
  def both(*a):
    return attend_part(case, *a), reference(case, *a)

  (out, lse), oracle = both(q, k, v)
  close(out, expected)
  close(oracle, expected)
  blind = np.isinf(expected_lse)
  assert blind.any() == case.blind
  lse = np.asarray(lse)
  close(lse[~blind], expected_lse[~blind])
  assert (lse[blind] < -1e29).all()
  assert (np.asarray(out)[blind] == 0).all()


def gradients(case, fn, q, k, v):
  """Returns those of a loss that the scores matter to."""
  weight = jax.random.normal(jax.random.key(5), q.shape)
  loss = lambda *a: (fn(case, *a) * weight).sum()
  return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)


GRADIENT_CASES = [
  'causal segments and window',
  'prefix and two-sided window',
  'grouped-query',
  'queries and keys somewhere',
  'soft cap',
]


@pytest.mark.parametrize('name', GRADIENT_CASES)
def test_gradients(name):
  case = CASES[name]
  q, k, v = draw(case)
  grads = gradients(case, attend, q, k, v)
  expected = gradients(case, reference, q, k, v)
  for grad, want in zip(grads, expected):
    assert np.abs(want).max() > 0.01
    close(grad, want, atol=5e-5)


def test_gradients_where_some_see_nothing():
  """The oracle's own are NaN there; the blind must add nothing."""
  case = CASES['some see nothing']
  q, k, v = draw(case)
  grads = gradients(case, attend, q, k, v)
  assert all(np.isfinite(g).all() for g in grads)
  blind = np.isinf(naive(q, k, v, case.mask)[1])
  assert (np.asarray(grads[0])[blind] == 0).all()
  # What the seeing queries send back is as if the blind were not there.
  seeing = np.array([0, 2])
  np.testing.assert_array_equal(np.where(~blind[0].any(-1))[0], seeing)
  mask = Mask(
    q_segments_BT=case.mask.q_segments_BT[:1, seeing],
    k_segments_BS=case.mask.k_segments_BS[:1],
  )
  weight = jax.random.normal(jax.random.key(5), q.shape)[:1, seeing]
  few = lambda k: oracle.attend(q[:1, seeing], k, v[:1], mask)
  want = jax.jit(jax.grad(lambda k: (few(k) * weight).sum()))(k[:1])
  close(grads[1][:1], want, atol=5e-5)


@pytest.mark.parametrize('name', ['causal', 'queries somewhere'])
def test_t5_bias(name):
  case = CASES[name]
  q, k, v = draw(case)
  config = position.RelativeBuckets(num_buckets=8, max_distance=6)
  bias = position.RelativeBias(
    config, case.N, bidirectional=False, std=1.0, rngs=nnx.Rngs(0)
  )
  values = np.asarray(bias.table_RN[...])
  start = case.mask.q_index_BT
  index = np.asarray([range(case.T)] * B if start is None else start)
  distances = jnp.arange(-case.S, case.S)
  buckets = np.asarray(position.bucket(distances, config, False))

  def scalar(b, t, s, n):
    return values[buckets[s - index[b, t] + case.S], n]

  expected, _ = naive(q, k, v, case.mask, bias=scalar)

  def both(fn):
    """Output, and the gradient of the table, which learns."""
    loss = lambda m: (lambda out: ((out**2).sum(), out))(
      fn(case, q, k, v, bias=m)
    )
    grad, out = jax.jit(jax.grad(loss, has_aux=True))(bias)
    return out, np.asarray(grad.table_RN[...])

  (out, grad), (oracle, want) = both(attend), both(reference)
  close(out, expected)
  close(oracle, expected)
  assert np.abs(want).max() > 0.01
  close(grad, want, atol=1e-4)


def test_alibi_bias():
  case = CASES['grouped-query']
  q, k, v = draw(case)
  bias = position.AlibiBias(case.N)
  slopes = position.alibi_slopes(case.N)
  expected, _ = naive(
    q, k, v, case.mask, bias=lambda b, t, s, n: -slopes[n] * abs(s - t)
  )
  close(jax.jit(lambda q: attend(case, q, k, v, bias=bias))(q), expected)


@pytest.mark.parametrize('block', [5, 64])
def test_the_block_size_changes_nothing(block):
  case = dataclasses.replace(
    CASES['causal segments and window'],
    options=dense.AttentionOptions(block=block),
  )
  q, k, v = draw(case)
  expected, _ = naive(q, k, v, case.mask)
  close(run(case, q, k, v), expected)


@pytest.mark.parametrize('name', ['some see nothing', 'queries somewhere'])
def test_long_key_ranges_are_cut_and_merged(name, monkeypatch):
  """What runs past 2,048 keys, at a size that loops can check."""
  monkeypatch.setattr(dense, '_MAX_KEYS', 3)
  monkeypatch.setattr(blocks, 'KEEP_KEYS', 2)
  case = CASES[name]
  q, k, v = draw(case)
  expected, expected_lse = naive(q, k, v, case.mask)
  cut = jax.jit(lambda *a: attend_part(case, *a))
  out, lse = cut(q, k, v)
  close(out, expected)
  close(lse, np.maximum(expected_lse, -1e30))
  grads = gradients(case, attend, q, k, v)
  assert all(np.isfinite(g).all() for g in grads)
  if not case.blind:
    for grad, want in zip(grads, gradients(case, reference, q, k, v)):
      close(grad, want, atol=5e-5)


def test_merge_of_two_halves_is_the_whole():
  case = CASES['grouped-query']
  q, k, v = draw(case)
  half = case.S // 2
  index = jnp.broadcast_to(jnp.arange(case.S), (B, case.S))

  def part(s):
    mask = make_mask(causal=True, q_index_BT=index, k_index_BS=index[:, s])
    return dense.attend_part(q, k[:, s], v[:, s], mask)

  # The first queries see nothing of the second half.
  merge = lambda: dense.merge(part(slice(half)), part(slice(half, None)))
  merged, lse = jax.jit(merge)()
  expected, expected_lse = naive(q, k, v, case.mask)
  close(merged, expected)
  close(lse, expected_lse)


def test_values_may_be_wider_than_keys():
  case = CASES['causal']
  q, k, v = draw(case, value_dim=7)
  expected, _ = naive(q, k, v, case.mask)
  close(run(case, q, k, v), expected)


def test_bfloat16_in_and_out_with_a_float32_softmax():
  case = CASES['causal']
  q, k, v = (x.astype(jnp.bfloat16) for x in draw(case))
  out = run(case, q, k, v)
  assert out.dtype == jnp.bfloat16
  expected, _ = naive(q, k, v, case.mask)
  np.testing.assert_allclose(
    np.asarray(out, np.float32), expected, atol=0.06, rtol=0.02
  )


def test_scores_beyond_float32_exponents_do_not_overflow():
  case = CASES['causal']
  q, k, v = draw(case)
  expected, _ = naive(100 * q, 100 * k, v, case.mask)
  close(run(case, 100 * q, 100 * k, v), expected, atol=1e-3)


def test_dropout_sees_each_block_once():
  """Probabilities are dropped after the sum that divides them is taken."""
  case = CASES['causal']
  q, k, v = draw(case)
  shapes = []

  def double(probs, q_index_BT, k_index_BS):
    assert probs.shape[:3] == (B, case.K, case.N // case.K)
    assert probs.shape[3:] == q_index_BT.shape + k_index_BS.shape
    shapes.append(probs.shape[3:])
    return 2 * probs

  out = jax.jit(lambda q: attend(case, q, k, v, dropout=double))(q)
  close(out, 2 * run(case, q, k, v))
  assert shapes == [(4, 4), (4, 8), (3, 11)]


def test_blocks_and_orders_drop_the_same():
  """The bits of a probability belong to its head, query and key."""
  q, k, v = (
    jax.random.normal(jax.random.key(i), (B, 12, 4, H)) for i in (0, 1, 2)
  )
  keys_B = dropout.row_keys(jax.random.key(3), jnp.arange(B))
  drop = dropout.OfScores(keys_B=keys_B, rate=0.4)
  whole = lambda mask, **kwargs: jax.jit(
    lambda *args: dense.attend(
      *args, mask, dense.AttentionOptions(dropout=drop, **kwargs)
    )
  )
  mask = make_mask(causal=True)
  want = whole(mask)(q, k, v)
  small = whole(mask, block=5)(q, k, v)
  np.testing.assert_allclose(small, want, atol=1e-6)
  order = zigzag.index(12, 3)
  moved = dataclasses.replace(mask, q_zigzag=3, k_zigzag=3)
  out = whole(moved)(*(a[:, order] for a in (q, k, v)))
  np.testing.assert_allclose(out, want[:, order], atol=1e-6)
  assert np.abs(want - run_plain(q, k, v, mask)).max() > 0.1


def run_plain(q, k, v, mask):
  return jax.jit(lambda *args: dense.attend(*args, mask))(q, k, v)


def flops(mask, length=512, block=64):
  """Of the compiled products, loops counted."""
  shape = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
  options = dense.AttentionOptions(block=block)
  cost = lambda q, k, v: dense.attend(q, k, v, mask, options=options)
  compiled = jax.jit(cost).lower(shape, shape, shape).compile()
  return matmul_flops.matrix_flops(compiled.as_text())


@pytest.mark.usefixtures('compiled_as_by_users')
def test_blocks_that_nothing_sees_cost_nothing():
  """Half and the diagonal; two blocks of eight; three of eight."""
  whole = flops(Mask())
  assert flops(make_mask(causal=True)) < 0.65 * whole
  assert flops(make_mask(causal=True, window=64)) < 0.32 * whole
  assert flops(make_mask(window=64)) < 0.45 * whole


@pytest.mark.usefixtures('compiled_as_by_users')
def test_the_chosen_block_size_skips_too():
  whole = flops(Mask(), block=None)
  assert flops(make_mask(causal=True), block=None) < 0.65 * whole
