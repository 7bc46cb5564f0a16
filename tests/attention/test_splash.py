"""The splash kernels, run as they are written, against the dense oracle."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seen

from t2x.attention import dense
from t2x.attention import kernels
from t2x.attention import mask as mask_lib
from t2x.attention import reference
from t2x.attention import splash

B, T, H, BLOCK = 2, 256, 8, 128
Mask = mask_lib.Mask
make_mask = mask_lib.make


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
  """Shapes, mask and options of one comparison."""

  mask: mask_lib.Mask = Mask()
  S: int = T
  N: int = 2
  K: int = 2
  scale: float = H**-0.5
  soft_cap: float | None = None


def segments(*lengths):
  """Returns (B, T): rows of segments of the given lengths."""
  ids = [np.repeat(np.arange(len(row)), row) for row in lengths]
  return jnp.asarray(np.stack(ids), jnp.int32)


_OWN = segments((100, 156), (30, 226))
CASES = {
  'everything': Case(),
  'causal': Case(mask=make_mask(causal=True)),
  'window': Case(mask=make_mask(causal=True, window=50)),
  'two-sided window': Case(mask=make_mask(window=40)),
  'causal segments, grouped': Case(
    mask=make_mask(causal=True, q_segments_BT=_OWN, k_segments_BS=_OWN), N=4
  ),
  # The second row's second target has no source: its queries see nothing.
  'cross, some see nothing': Case(
    mask=Mask(q_segments_BT=_OWN, k_segments_BS=segments((64, 64), (128,))),
    S=128,
  ),
  'soft cap and scale': Case(
    mask=make_mask(causal=True), scale=1.0, soft_cap=2.0, N=1, K=1
  ),
}


def both(fn, case):
  """Returns fn's output, and gradients of a weighted sum of it."""
  keys = jax.random.split(jax.random.key(0), 4)
  draw = lambda key, *shape: jax.random.normal(key, (B, *shape, H))
  q, weights = draw(keys[0], T, case.N), draw(keys[3], T, case.N)
  k, v = draw(keys[1], case.S, case.K), draw(keys[2], case.S, case.K)

  @jax.jit
  def run(q, k, v):
    out, vjp = jax.vjp(fn, q, k, v)
    return out, vjp(weights)

  return run(q, k, v)


@pytest.mark.parametrize('name', CASES)
def test_values_and_gradients_are_the_oracles(name):
  case = CASES[name]

  def kernel(q, k, v):
    return splash.attend(
      q,
      k,
      v,
      case.mask,
      scale=case.scale,
      soft_cap=case.soft_cap,
      block=BLOCK,
      interpret=True,
    )

  options = dense.AttentionOptions(scale=case.scale, soft_cap=case.soft_cap)
  # The oracle's gradients are NaN where nothing is seen.
  blind = 'nothing' in name
  other = dense.attend if blind else reference.attend
  got = both(kernel, case)
  want = both(lambda *a: other(*a, case.mask, options=options), case)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, atol=3e-5)


# --- What is visited, and where the kernel serves. ---


@pytest.mark.parametrize(
  'mask',
  [
    Mask(),
    make_mask(causal=True),
    make_mask(causal=True, window=1),
    make_mask(causal=True, window=130),
    make_mask(causal=True, window=129),
    make_mask(window=257),
  ],
)
@pytest.mark.parametrize('sides', [(128, 128), (256, 128), (128, 384)])
def test_visited_blocks_are_those_with_a_seen_pair(mask, sides):
  length = 768
  places = range(length)
  visible = np.array(
    [[seen.by_place(mask.pattern, i, j) for j in places] for i in places]
  )
  q_side, k_side = sides
  blocks = visible.reshape(length // q_side, q_side, length // k_side, k_side)
  want = blocks.any((1, 3)).sum() * q_side * k_side
  assert splash.num_computed_pairs(mask, length, length, *sides) == want


def test_the_chosen_block_divides():
  assert [splash.block_size(n) for n in (128, 640, 768, 1024, 2048)] == [
    128, 128, 384, 512, 512,
  ]  # fmt: skip
  assert splash.block_size(192) is None


def why(mask=make_mask(causal=True), T=T, S=None, platform='tpu', **options):
  shape = lambda length: jax.ShapeDtypeStruct((B, length, 2, H), jnp.float32)
  keys, options = shape(S or T), dense.AttentionOptions(**options)
  return kernels.unsupported_reason(
    shape(T), keys, keys, mask, options, platform=platform
  )


@pytest.mark.parametrize(
  ('given', 'words'),
  [
    ({'platform': 'cpu'}, 'there is no kernel for cpu devices'),
    ({'bias': abs}, 'a bias on the scores .* is not in it'),
    ({'dropout': abs}, 'dropout on the scores is not in it'),
    (
      {'mask': make_mask(causal=True, prefix_B=jnp.zeros(2))},
      'prefixes, and tokens in another order, are not',
    ),
    ({'mask': Mask(q_index_BT=jnp.zeros((1, T)))}, 'in another order'),
    (
      {'mask': make_mask(causal=True, q_zigzag=2, k_zigzag=2)},
      'in another order',
    ),
    ({'T': 192}, '192 queries and 192 keys are not multiples of 128'),
    ({'T': 256, 'S': 128}, 'in an order, 256 queries of 128 keys'),
    ({'block': 64}, 'attention.block=64 is no multiple of 128 that divides'),
    ({'T': 384, 'block': 256}, 'divides 384 queries and 384 keys'),
  ],
)
def test_why_no_kernel_serves(given, words):
  assert re.search(words, why(**given) or '')


def test_where_it_serves():
  own = jnp.zeros((B, T))
  segments = make_mask(causal=True, q_segments_BT=own, k_segments_BS=own)
  for given in (
    {},
    {'mask': segments},
    {'mask': make_mask(window=5)},
    {'mask': Mask(), 'S': 128},
    {'block': 128},
  ):
    assert why(**given) is None


def test_flash_is_refused_where_it_cannot_be():
  q = jnp.ones((1, 128, 1, H))
  flash = dense.AttentionOptions(kernel='flash')
  with pytest.raises(
    ValueError,
    match='attention.kernel=flash: there is no kernel for cpu devices. Set it',
  ):
    kernels.attend(q, q, q, Mask(), options=flash)
