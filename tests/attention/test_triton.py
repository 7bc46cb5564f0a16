"""Kernels for GPUs, interpreted here and compiled for GPUs that are not."""

import functools

import gpu
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2x.attention import dense
from t2x.attention import kernels
from t2x.attention import mask as mask_lib
from t2x.attention import reference
from t2x.attention import splash
from t2x.attention import triton
from t2x.hlo import kernel_flops as plan_kernels
from t2x.hlo import matmul_flops
from t2x.parallel import sharding

B, T, N, K, H = 2, 64, 4, 2, 24  # The kernel fills H up to 32.
SCALE = 0.3


@functools.cache
def arrays():
  keys = jax.random.split(jax.random.key(0), 4)
  heads = N, K, K, N
  return [jax.random.normal(k, (B, T, n, H)) for k, n in zip(keys, heads)]


def a_mask(causal=True, segments=True):
  if not segments:
    return mask_lib.self_attention(None, causal=causal)
  ends = np.array([[20, 41, 64], [0, 63, 64]])
  ids = (np.arange(T)[None, :, None] >= ends[:, None]).sum(-1)
  return mask_lib.self_attention(jnp.asarray(ids, jnp.int32), causal=causal)


def loss(attend, weights, q, k, v):
  out = attend(q, k, v)
  return (out * weights).sum(), out


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('segments', [True, False])
def test_values_and_gradients(causal, segments):
  *parts, weights = arrays()
  mask = a_mask(causal, segments)
  kernel = functools.partial(
    triton.attend, mask=mask, scale=SCALE, block=32, interpret=True
  )
  oracle = functools.partial(
    reference.attend, mask=mask, options=dense.AttentionOptions(scale=SCALE)
  )
  grad = lambda fn: jax.grad(
    functools.partial(loss, fn, weights), (0, 1, 2), has_aux=True
  )(*parts)
  got, want = grad(kernel), grad(oracle)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_is_named_is_not_made_again():
  *parts, weights = arrays()
  fn = functools.partial(
    triton.attend, mask=a_mask(), scale=SCALE, interpret=True
  )
  runs = {}
  for names in ((), (splash.NAME,)):
    policy = jax.checkpoint_policies.save_only_these_names(*names)
    total = lambda *parts, policy=policy: loss(
      jax.checkpoint(fn, policy=policy), weights, *parts
    )[0]
    text = str(jax.make_jaxpr(jax.grad(total))(*parts))
    runs[names] = text.count('name=mha_forward')
  assert runs == {(): 2, (splash.NAME,): 1}


def reason(T=T, S=None, H=H, V=None, mask=None, dtype='bfloat16', **options):
  """Asks for queries and keys of some lengths and widths."""
  shaped = lambda length, width: jax.ShapeDtypeStruct(
    (1, length, 2, width), dtype
  )
  return kernels.unsupported_reason(
    shaped(T, H),
    shaped(S or T, H),
    shaped(S or T, V or H),
    mask or a_mask(segments=False),
    platform='gpu',
    options=dense.AttentionOptions(**options),
  )


@pytest.mark.parametrize(
  'settings, message',
  [
    ({}, None),
    ({'T': 96, 'dtype': 'float32', 'H': 256, 'block': 32}, None),
    (
      {'mask': mask_lib.make(causal=True, window=8)},
      'windows and other patterns are not',
    ),
    ({'soft_cap': 30.0}, 'soft caps are not'),
    ({'S': 128}, '64 queries and 128 keys'),
    ({'V': 32}, 'keys and values of 24 and 32 dims'),
    ({'H': 8}, 'keys and values of 8 and 8 dims'),
    ({'H': 512}, 'from 16 to 256'),
    ({'T': 48}, '48 queries are not a multiple of 32'),
    ({'block': 48}, 'a side of 64, 32, 16 here'),
    ({'H': 256, 'T': 128, 'block': 128}, 'a side of 64, 32, 16 here'),
  ],
)
def test_what_it_does_not_serve(settings, message):
  why = reason(**settings)
  assert why is None if message is None else message in why


@pytest.mark.slow
def test_compiled_for_gpus():
  """Forward and backward on each device's rows and heads, and their FLOPs."""
  mesh = gpu.mesh(data=2, tensor=4)
  shape = lambda *sizes, dtype='bfloat16': jax.ShapeDtypeStruct(sizes, dtype)
  length, width = 256, 64

  def total(q, k, v, segments):
    mask = mask_lib.self_attention(segments, causal=True)
    options = dense.AttentionOptions(kernel='flash')
    out = kernels.attend(q, k, v, mask, options=options)
    return (out.astype(jnp.float32) ** 2).sum()

  heads = (8, 4, 4)
  parts = [shape(4, length, n, width) for n in heads]
  segments = shape(4, length, dtype='int32')
  with sharding.use(mesh, sharding.Rules()):
    step = jax.jit(jax.grad(total, (0, 1, 2)))
    text = step.trace(*parts, segments).lower().compile().as_text()
  assert text and matmul_flops.matrix_flops(text) == 0
  # Two rows and two heads a device; blocks of 128 and 32 on the diagonal.
  product = 2 * 2 * 2 * width
  forward, backward = 3 * 128**2, 36 * 32**2
  assert plan_kernels.kernel_flops(text) == product * (
    2 * forward + 7 * backward
  )
