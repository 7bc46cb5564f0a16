"""The scan over blocks against the oracle, which holds every score."""

import dataclasses
import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.attention import block_patterns
from t2x.attention import blocks
from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.attention import pairs
from t2x.attention import patterns
from t2x.attention import reference
from t2x.attention import scanned
from t2x.attention.patterns import Causal
from t2x.attention.patterns import DilatedPattern
from t2x.attention.patterns import Global
from t2x.attention.patterns import Window
from t2x.hlo import matmul_flops
from t2x.layers import dropout
from t2x.layers import position

B, H = 2, 4
Mask = mask_lib.Mask
_RANDOM = block_patterns.RandomBlocks(size=4, num=2, num_blocks=12)
_SEGMENTS = jnp.asarray(
  [[1] * 20 + [2] * 20 + [0] * 3, [1] * 9 + [2] * 14 + [3] * 20]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  mask: Mask = Mask()
  T: int = 43
  S: int = 43
  N: int = 2
  K: int = 2
  V: int = H
  options: dense.AttentionOptions = dense.AttentionOptions(block=8)


def of(pattern, **kwargs):
  return Case(mask=Mask(pattern=pattern), **kwargs)


CASES = {
  'everything': Case(),
  'causal': of(Causal()),
  'causal, chosen blocks': of(Causal(), options=dense.AttentionOptions()),
  'window': of(Causal() & Window(5)),
  'two-sided window, grouped': of(Window(6), N=6, K=2),
  'dilated': of(Causal() & Window(18) & DilatedPattern(3)),
  'global': of(Causal() & (Window(4) | Global(3))),
  'bigbird': of(
    Window(5) | Global(4) | _RANDOM, options=dense.AttentionOptions(block=4)
  ),
  'bigbird, chosen blocks': of(Window(5) | Global(4) | _RANDOM, K=1),
  'region': of(patterns.Region(8)),
  'a row of blocks sees nothing': of(
    block_patterns.Blocks(
      8, ('100001', '000000', '011000', '000001') + ('111111',) * 2
    )
  ),
  'segments': Case(
    mask=mask_lib.self_attention(_SEGMENTS, causal=True)
    & (Window(9) | Global(2))
  ),
  'prefix': Case(
    mask=mask_lib.make(causal=True, prefix_B=jnp.asarray([5, 30]))
  ),
  'a prefix for each key': Case(
    mask=mask_lib.make(causal=True)
    | mask_lib.with_prefix(
      jnp.asarray([[6] * 20 + [28] * 23, [43] * 9 + [0] * 34])
    )
  ),
  'other lengths': of(patterns.Everything(), T=19, S=50, V=6),
  'soft cap and scale': of(
    Causal(), options=dense.AttentionOptions(block=8, soft_cap=0.9, scale=0.7)
  ),
}


def draw(case):
  keys = jax.random.split(jax.random.key(0), 4)
  normal = lambda key, *shape: 2 * jax.random.normal(key, (B, *shape))
  return (
    normal(keys[0], case.T, case.N, H),
    normal(keys[1], case.S, case.K, H),
    normal(keys[2], case.S, case.K, case.V),
  ), normal(keys[3], case.T, case.N, case.V)


def both(fn, case, bias=None):
  """Returns the output and the gradients."""
  qkv, weights = draw(case)

  @jax.jit
  def run(qkv, bias):
    return jax.value_and_grad(
      lambda qkv, bias: (
        ((out := fn(*qkv, bias)) * weights).sum() + 0 * out.sum()
      ),
      (0, 1),
    )(qkv, bias)

  out = jax.jit(fn)(*qkv, bias)
  return out, run(qkv, bias)[1]


def close(got, want, atol=3e-5):
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


def options_of(case, bias, drop=None):
  return dataclasses.replace(case.options, bias=bias, dropout=drop)


def oracle(case):
  # What sees nothing has no gradient in the oracle, but NaN.
  blind = not patterns.sees_itself(case.mask.pattern, case.S)
  fn = functools.partial(dense.attend) if blind else reference.attend
  return lambda q, k, v, bias: fn(q, k, v, case.mask, options_of(case, bias))


def scan(case, drop=None):
  return lambda q, k, v, bias: scanned.attend(
    q, k, v, case.mask, options_of(case, bias, drop)
  )


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients_are_the_oracles(name):
  case = CASES[name]
  close(both(scan(case), case), both(oracle(case), case))


def test_gradients_against_differences():
  case = CASES['global']
  qkv, weights = draw(case)
  f = jax.jit(lambda *qkv: (scan(case)(*qkv, None) * weights).sum())
  grads = jax.grad(f, (0, 1, 2))(*qkv)
  for i, step in enumerate(draw(dataclasses.replace(case))[0]):
    moved = lambda e, i=i, step=step: f(
      *(a + e * step if i == j else a for j, a in enumerate(qkv))
    )
    found = (moved(1e-2) - moved(-1e-2)) / 2e-2
    np.testing.assert_allclose(found, (grads[i] * step).sum(), rtol=2e-2)


@pytest.mark.parametrize('name', ['causal', 'bigbird', 'segments'])
def test_a_learned_bias_and_its_gradient(name):
  case = CASES[name]
  config = position.RelativeBuckets(num_buckets=8, max_distance=16)
  bias = position.RelativeBias(
    config, case.N, bidirectional=True, std=1.0, rngs=nnx.Rngs(0)
  )
  got, want = (both(fn, case, bias) for fn in (scan(case), oracle(case)))
  close(got, want, atol=2e-4)
  assert max(abs(a).max() for a in jax.tree.leaves(want[1][1])) > 0.1


def test_dropout_drops_what_the_unrolled_blocks_drop():
  case = CASES['segments']
  drop = dropout.OfScores(
    keys_B=dropout.row_keys(jax.random.key(3), jnp.arange(B)),
    rate=0.5,
    heads_KG=jnp.arange(case.N).reshape(case.K, -1),
  )
  other = lambda q, k, v, bias: dense.attend(
    q, k, v, case.mask, options_of(case, bias, drop)
  )
  got, want = both(scan(case, drop), case), both(other, case)
  close(got, want)
  assert abs(got[0] - both(scan(case), case)[0]).max() > 0.1


# --- What is computed. ---


@pytest.mark.parametrize('name', ['causal', 'window', 'bigbird', 'global'])
@pytest.mark.usefixtures('compiled_as_by_users')
def test_blocks_that_nothing_sees_are_left_out(name):
  case = CASES[name]
  steps = pairs.plan(case.mask.pattern, case.T, case.S, case.options.block)
  side = case.options.block
  length = -(-case.T // side) * side
  places = np.arange(length)
  whole = case.mask.pattern & patterns.Below(case.S)
  seen = whole.sees(places[:, None], places, None) & (places < case.T)[:, None]
  blocks_seen = seen.reshape(-1, side, length // side, side).any((1, 3))
  met = np.zeros_like(blocks_seen)
  for row, columns in zip(steps.q_P, steps.k_PC):
    for column in columns[columns < len(met)]:
      met[row, column] = True
  assert met[blocks_seen].all()
  if not steps.is_sliced:
    np.testing.assert_array_equal(met, blocks_seen)
  # Each step costs the same, so its products are counted exactly.
  qkv, _ = draw(case)
  compiled = jax.jit(scan(case)).lower(*qkv, None).compile()
  found = matmul_flops.matrix_flops(compiled.as_text())
  assert found == 2 * B * case.N * (H + case.V) * steps.pairs


@pytest.mark.parametrize(
  'pattern, most',
  [
    (Causal(), 0.6),
    (Causal() & Window(256), 0.07),
    (
      Window(192)
      | Global(64)
      | block_patterns.RandomBlocks(64, num=3, num_blocks=128),
      0.15,
    ),
    (Causal() & Window(1024) & DilatedPattern(4), 0.2),
  ],
)
def test_long_sequences_cost_what_is_seen(pattern, most):
  T = 8192
  assert pairs.plan(pattern, T, T, None).pairs < most * T * T


def test_when_blocks_are_scanned():
  scanned_at = lambda mask, T: blocks.are_scanned(mask, T, T, None)
  causal = mask_lib.make(causal=True)
  assert scanned_at(causal, 1024) and not scanned_at(causal, 512)
  sparse = Mask(pattern=block_patterns.Blocks(64, ('10000001',) * 8))
  assert scanned_at(sparse, 512) and not scanned_at(sparse, 64)
  moved = mask_lib.make(causal=True, q_index_BT=jnp.zeros((1, 1024), int))
  assert not scanned_at(moved, 1024)
