"""Grouped matrix products, for experts: each group of rows has its own matrix.

XLA has a kernel for the product on TPUs only, and none for its gradient by the
matrices: it multiplies every row with every group's matrix, which takes E times
the FLOPs (libtpu 0.0.42, CUDA plugin 0.10.2). So both run as Pallas kernels
where these support the shapes: JAX's megablox on TPUs, and
t2x/layers/grouped_triton.py on GPUs.

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

# By name, since a function of the package hides the module.
_megablox: Any = importlib.import_module(
  'jax.experimental.pallas.ops.tpu.megablox.gmm'
)
_LANES = 128  # Lanes of a TPU's register; sides of blocks are multiples of it.
_TILE = 512, 1024, 1024  # Rows, D and F of the largest block of 16-bit entries.

_Residuals = tuple[jax.Array, jax.Array, jax.Array]


def multiply(
  x_PD: jax.Array,
  w_EDF: jax.Array,
  sizes_E: jax.Array,
  *,
  num_rows: int | None = None,
  kernel: str | None = None,
  interpret: bool = False,
) -> jax.Array:
  """Multiplies each group of rows with its own matrix.

  Args:
    x_PD: rows of group 0, then those of group 1, and so on; rows after the last
      group have zeros as results and gradients.
    w_EDF: matrix of each group.
    sizes_E: number of rows of each group.
    num_rows: number of rows in all groups, in the mean over devices, for
      counting FLOPs; None is all rows.
    kernel: `tpu`, `gpu` or `xla`; None is the device's kernel where it supports
      the shapes, else `xla`.
    interpret: whether to run the kernel in interpreter mode, on any device and
      slowly.

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
  """Returns the name of the kernel for the devices of the active mesh."""
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


def _of_groups(x_PD: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """Sets rows of no group, whose values are undefined, to zero."""
  used_P = jnp.arange(x_PD.shape[0]) < sizes_E.sum()
  return jnp.where(used_P[:, None], x_PD, 0)


class _Call(NamedTuple):
  """Static arguments of a product.

  Attributes:
    kernel: `tpu` or `gpu`.
    interpret: whether to run the kernel in interpreter mode.
    num_rows: number of rows for counting FLOPs.
  """

  kernel: str
  interpret: bool
  num_rows: int

  def label(self, D: int, F: int) -> str:
    """Returns the name of a scope that states the FLOPs, for t2x/hlo."""
    return f'{splash.FLOPS}{2 * self.num_rows * D * F}'


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _multiply(
  call: _Call, x_PD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array
) -> jax.Array:
  return _rows(call, x_PD, w_EDF, sizes_E, transposed=False)


def _forward(
  call: _Call, x_PD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array
) -> tuple[jax.Array, _Residuals]:
  residuals = x_PD, w_EDF, sizes_E
  return _multiply(call, *residuals), residuals


def _backward(
  call: _Call, residuals: _Residuals, grad_PF: jax.Array
) -> tuple[jax.Array, jax.Array, None]:
  x_PD, w_EDF, sizes_E = residuals
  d_x_PD = _rows(call, grad_PF, w_EDF, sizes_E, transposed=True)
  d_w_EDF = _weights(call, x_PD, grad_PF, sizes_E)
  return d_x_PD, d_w_EDF, None


_multiply.defvjp(_forward, _backward)


def _rows(
  call: _Call,
  x_PD: jax.Array,
  w: jax.Array,
  sizes_E: jax.Array,
  *,
  transposed: bool,
) -> jax.Array:
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


def _weights(
  call: _Call, x_PD: jax.Array, y_PF: jax.Array, sizes_E: jax.Array
) -> jax.Array:
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


def _tiling(x_PD: jax.Array, D: int, F: int) -> tuple[int, ...]:
  """Returns the sides of a block, which divide those of the matrices."""
  scale = x_PD.dtype.itemsize // 2
  largest = [
    max(s for s in range(_LANES, most // scale + 1, _LANES) if size % s == 0)
    for size, most in zip((D, F), _TILE[1:])
  ]
  return _rows_of_block('tpu', x_PD.shape[0]), *largest
