"""The products' own gradients are those that JAX would derive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.layers import param
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding

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


@pytest.mark.parametrize('reduce_dtype', ['compute', 'float32'])
def test_gradients_have_the_dtype_in_which_devices_sum(reduce_dtype):
  """Of products and biases: rounded before the sum over devices, or after."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  weight, bias = draw(4, 9), draw(9)
  x, ct = draw(8, 16, 4).astype('bfloat16'), draw(8, 16, 9).astype('bfloat16')

  def fn(x, weight, bias):
    return param.add_bias(param.project(x, weight, 'BTD,DF->BTF'), bias)

  mesh = mesh_lib.make(mesh_lib.MeshConfig(data=8))
  with sharding.use(mesh, sharding.Rules(reduce_dtype=reduce_dtype)):
    out, backward = jax.vjp(fn, x, weight, bias)
    d_x, *grads = backward(ct)
  assert out.dtype == d_x.dtype == jnp.bfloat16
  exact = [
    np.einsum('btd,btf->df', *(np.asarray(a, np.float64) for a in (x, ct))),
    np.asarray(ct, np.float64).sum((0, 1)),
  ]
  for grad, want in zip(grads, exact):
    assert grad.dtype == jnp.float32
    error = np.abs(grad - want).max() / np.abs(want).max()
    assert (error < 1e-5) == (reduce_dtype == 'float32')
