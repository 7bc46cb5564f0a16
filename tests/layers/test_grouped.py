"""Products of groups, against a loop over the groups in float64."""

import functools

import gpu
import jax
import jax.numpy as jnp
import lowered
import numpy as np
import pytest
import tpu

from t2x.hardware import target_devices
from t2x.hlo import jaxpr_costs
from t2x.hlo import kernel_flops
from t2x.hlo import matmul_flops
from t2x.layers import attention_config
from t2x.layers import grouped
from t2x.layers import moe
from t2x.layers import norm
from t2x.layers import position
from t2x.layers import routing
from t2x.models import decoder
from t2x.models import flops
from t2x.training import train_state

E, D, F = 4, 128, 256
# Rows, and those of each group: edges within blocks, groups without rows, rows
# of no group.
CASES = {
  'edges': (300, (0, 130, 40, 90)),
  'blocks': (256, (128, 0, 0, 128)),
  'one': (200, (0, 0, 200, 0)),
  'none': (128, (0, 0, 0, 0)),
}


def by_loop(x_PD, w_EDF, grad_PF, sizes):
  """Returns the product and its gradients by both factors."""
  out, d_x, d_w = (np.zeros(a.shape) for a in (grad_PF, x_PD, w_EDF))
  start = 0
  for group, size in enumerate(sizes):
    rows = slice(start, start + size)
    out[rows] = x_PD[rows] @ w_EDF[group]
    d_x[rows] = grad_PF[rows] @ w_EDF[group].T
    d_w[group] = x_PD[rows].T @ grad_PF[rows]
    start += size
  return out, d_x, d_w


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('kernel', ['gpu', 'tpu', 'xla'])
def test_against_a_loop(kernel, name):
  num_rows, sizes = CASES[name]
  rng = np.random.default_rng(0)
  shapes = (num_rows, D), (E, D, F), (num_rows, F)
  x_PD, w_EDF, grad_PF = (rng.normal(size=s) for s in shapes)
  want = by_loop(x_PD, w_EDF, grad_PF, sizes)
  # Whatever stands in rows of no group, it is nowhere else.
  x_PD[sum(sizes) :] = np.nan

  @jax.jit
  def got(x_PD, w_EDF, grad_PF):
    fn = functools.partial(
      grouped.multiply,
      sizes_E=jnp.asarray(sizes),
      kernel=kernel,
      interpret=True,
    )
    out, pull = jax.vjp(fn, x_PD, w_EDF)
    return out, *pull(grad_PF)

  with jax.default_matmul_precision('highest'):
    found = got(*(a.astype(np.float32) for a in (x_PD, w_EDF, grad_PF)))
  for a, b in zip(found, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kernel', ['gpu', 'tpu', 'xla'])
def test_a_jaxpr_counts_each_row_once(kernel):
  shapes = (200, D), (E, D, F)
  parts = (jax.ShapeDtypeStruct(shape, 'float32') for shape in shapes)
  sizes = jax.ShapeDtypeStruct((E,), 'int32')
  fn = lambda x, w, s: grouped.multiply(x, w, s, kernel=kernel).sum()
  closed = jax.make_jaxpr(jax.grad(fn, (0, 1)))(*parts, sizes)
  # The value is not used, and so the product is not made.
  products = 2
  assert jaxpr_costs.count(closed).total.flops == products * 2 * 200 * D * F


MODEL = decoder.DecoderConfig(
  vocab_size=512,
  num_layers=2,
  embed_dim=D,
  attention=attention_config.Dense(num_heads=2, head_dim=64, kernel='blocks'),
  mlp=moe.MoeConfig(
    hidden=F,
    bias=False,
    gated=True,
    num_experts=E,
    router=routing.TokenChoice(),
  ),
  norm=norm.RMSNorm(),
  position=position.Rotary(),
  tied_head='untied',
  dtype='bfloat16',
)


def check(mesh, options=None):
  """Each choice of a token meets its expert's matrices alone, three times."""
  step = train_state.StepConfig()
  program = lowered.lower(mesh, MODEL, step, rows=16, length=64)
  text = target_devices.compile(program, options).as_text()
  assert text
  parts = flops.forward_parts(
    MODEL, flops.BatchShape(16, 64), skip_masked=False
  )
  tokens = MODEL.num_layers * 16 * 64
  own, router = tokens * 2 * 3 * 2 * D * F, tokens * 2 * D * E
  rest = sum(parts.values()) - own
  # Devices that hold the same tokens route each.
  rest += router * (mesh.shape['tensor'] - 1)
  assert matmul_flops.matrix_flops(text) * mesh.size == 3 * rest
  assert kernel_flops.kernel_flops(text) * mesh.size == 3 * own


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes',
  [
    {'fsdp': 2, 'expert': 4},
    pytest.param({'fsdp': 8}, marks=pytest.mark.exhaustive),
    pytest.param({'data': 4, 'tensor': 2}, marks=pytest.mark.exhaustive),
  ],
  ids=str,
)
def test_steps_for_tpus(sizes):
  check(tpu.mesh(**sizes))


@pytest.mark.slow
def test_steps_for_gpus():
  # LLVM's optimisations cost most of the time and change no kernel.
  check(gpu.mesh(fsdp=2, expert=4), {'xla_backend_optimization_level': 0})
