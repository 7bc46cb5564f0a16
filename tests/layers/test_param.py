"""The products' own gradients are those that JAX would derive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.layers import param

_SIZES = {
  'B': 2, 'T': 3, 'S': 5, 'D': 4, 'N': 2, 'K': 2, 'H': 7, 'F': 9, 'E': 6, 'V': 8
}  # fmt: skip


@pytest.mark.parametrize(
  'spec',
  [
    'BTD,DNH->BTNH',
    'BSD,DKH->BSKH',
    'BTNH,NHD->BTD',
    'BTD,DF->BTF',
    'BTF,FD->BTD',
    'BTD,VD->BTV',
    'EBD,EDF->EBF',
  ],
)
def test_gradients_are_those_of_einsum(spec):
  x_axes, w_axes = spec.split('->')[0].split(',')
  rng = np.random.default_rng(0)
  draw = lambda axes: jnp.asarray(
    rng.normal(size=[_SIZES[a] for a in axes]), jnp.float32
  )
  x, weight, ct = draw(x_axes), draw(w_axes), draw(spec.split('->')[1])
  out, backward = jax.vjp(lambda x, w: param.project(x, w, spec), x, weight)
  want, naive = jax.vjp(lambda x, w: jnp.einsum(spec, x, w), x, weight)
  np.testing.assert_allclose(out, want, rtol=1e-6)
  for a, b in zip(backward(ct), naive(ct)):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
