"""The splash kernels, run as they are written, against the dense oracle."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.attention import reference
from t2x.attention import splash

B, T, H, BLOCK = 2, 256, 8, 128
Mask = mask_lib.Mask


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
  'causal': Case(mask=Mask(causal=True)),
  'window': Case(mask=Mask(causal=True, window=50)),
  'two-sided window': Case(mask=Mask(window=40)),
  'causal segments, grouped': Case(
    mask=Mask(causal=True, q_segments_BT=_OWN, k_segments_BS=_OWN), N=4
  ),
  # The second row's second target has no source: its queries see nothing.
  'cross, some see nothing': Case(
    mask=Mask(q_segments_BT=_OWN, k_segments_BS=segments((64, 64), (128,))),
    S=128,
  ),
  'soft cap and scale': Case(
    mask=Mask(causal=True), scale=1.0, soft_cap=2.0, N=1, K=1
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

  options = dense.Options(scale=case.scale, soft_cap=case.soft_cap)
  # The oracle's gradients are NaN where nothing is seen.
  blind = 'nothing' in name
  other = dense.attend if blind else reference.attend
  got = both(kernel, case)
  want = both(lambda *a: other(*a, case.mask, options=options), case)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert np.abs(b).max() > 0.1
    np.testing.assert_allclose(a, b, atol=3e-5)
