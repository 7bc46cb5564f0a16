"""Products of groups of rows with matrices of their own, for experts.

XLA has a kernel for the product itself on TPUs alone, and for its gradient by
the matrices nowhere: it multiplies every row with every group's matrix, E times
the FLOPs (libtpu 0.0.42, CUDA plugin 0.10.2). So both run as kernels, where
they serve: jax's megablox on TPUs, t2x/layers/grouped_triton.py on GPUs.

Shape suffixes: P rows, E groups, D and F columns.
"""

import functools
import importlib
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t2x.attention import splash
from t2x.layers import grouped_triton
from t2x.parallel import manual_sharding

# Its package has a function of the module's name.
_megablox: Any = importlib.import_module(
  'jax.experimental.pallas.ops.tpu.megablox.gmm'
)
_LANES = 128  # Of a TPU's register; sides of blocks are multiples.
_TILE = 512, 1024, 1024  # Rows, D and F of the largest block, of two bytes.


def multiply(
  x_PD: jax.Array,
  w_EDF: jax.Array,
  sizes_E: jax.Array,
  *,
  num_rows: int | None = None,
  kernel: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Multiplies the rows of `x`, group by group, with matrices of their own.

  Args:
    x_PD: the rows of group 0, then those of group 1, and so on; the results
      and gradients of what comes after the last group are zeros.
    w_EDF: the matrices.
    sizes_E: rows of each group.
    num_rows: how many are of a group, in the mean over devices, by which FLOPs
      are counted; None is all.
    kernel: `tpu`, `gpu` or `xla`; None is that of the device, where it serves.
    interpret: run the kernel's text on any device, slowly.

  Returns:
    (P, F) in the dtype of `x_PD`.
  """
  if kernel is None:
    kernel = _choose(x_PD, w_EDF)
  if kernel == 'xla':
    out_PF = jax.lax.ragged_dot(_of_groups(x_PD, sizes_E), w_EDF, sizes_E)
    return _of_groups(out_PF, sizes_E)
  P = x_PD.shape[0]
  padding = -P % _rows_of_block(kernel, P)
  whole_PD = jnp.pad(x_PD, ((0, padding), (0, 0)))
  call = _Call(kernel, interpret, P if num_rows is None else num_rows)
  out_PF: Any = _multiply(call, whole_PD, w_EDF, sizes_E)
  return out_PF[:P]


def _choose(x_PD: jax.Array, w_EDF: jax.Array) -> str:
  """Returns which kernel runs on the devices of the active mesh."""
  platform, (_, D, F) = manual_sharding.platform(), w_EDF.shape
  if platform == 'tpu' and not (D % _LANES or F % _LANES):
    return 'tpu'
  if platform == 'gpu' and grouped_triton.serves(D, F):
    return 'gpu'
  return 'xla'


def _rows_of_block(kernel: str, P: int) -> int:
  if kernel == 'gpu':
    return grouped_triton.ROWS
  return min(_TILE[0], _LANES * -(-P // _LANES))


def _of_groups(x_PD, sizes_E):
  """Returns zeros for rows of no group, where there may be anything."""
  used_P = jnp.arange(x_PD.shape[0]) < sizes_E.sum()
  return jnp.where(used_P[:, None], x_PD, 0)


class _Call(NamedTuple):
  """Which kernel, and of how many rows its FLOPs are."""

  kernel: str
  interpret: bool
  num_rows: int

  def label(self, D: int, F: int) -> str:
    """Returns the scope that tells the FLOPs."""
    return f'{splash.FLOPS}{2 * self.num_rows * D * F}'


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(call, x_PD, w_EDF, sizes_E):
  return _rows(call, x_PD, w_EDF, sizes_E, transposed=False)


def _forward(call, x_PD, w_EDF, sizes_E):
  residuals = x_PD, w_EDF, sizes_E
  return _multiply(call, *residuals), residuals


def _backward(call, residuals, grad_PF):
  x_PD, w_EDF, sizes_E = residuals
  d_x_PD = _rows(call, grad_PF, w_EDF, sizes_E, transposed=True)
  d_w_EDF = _weights(call, x_PD, grad_PF, sizes_E)
  return d_x_PD, d_w_EDF, None


_multiply.defvjp(_forward, _backward)


def _rows(call, x_PD, w, sizes_E, *, transposed):
  D, F = w.shape[:0:-1] if transposed else w.shape[1:]
  settings = {'interpret': call.interpret}
  with jax.named_scope(call.label(D, F)):
    if call.kernel == 'gpu':
      out_PF = grouped_triton.rows(
        x_PD, w, sizes_E, transposed=transposed, **settings
      )
    else:
      out_PF = _megablox.gmm(
        x_PD,
        w,
        sizes_E.astype(jnp.int32),
        x_PD.dtype,
        _tiling(x_PD, D, F),
        transpose_rhs=transposed,
        **settings,
      )
  return _of_groups(out_PF, sizes_E)


def _weights(call, x_PD, y_PF, sizes_E):
  D, F = x_PD.shape[1], y_PF.shape[1]
  settings = {'interpret': call.interpret}
  with jax.named_scope(call.label(D, F)):
    if call.kernel == 'gpu':
      return grouped_triton.weights(x_PD, y_PF, sizes_E, **settings)
    return _megablox.tgmm(
      x_PD.swapaxes(0, 1),
      y_PF,
      sizes_E.astype(jnp.int32),
      x_PD.dtype,
      _tiling(x_PD, D, F),
      **settings,
    )


def _tiling(x_PD, D, F):
  """Returns the sides of a block, that divide those of the matrices."""
  scale = x_PD.dtype.itemsize // 2
  largest = [
    max(s for s in range(_LANES, most // scale + 1, _LANES) if size % s == 0)
    for size, most in zip((D, F), _TILE[1:])
  ]
  return _rows_of_block('tpu', x_PD.shape[0]), *largest
