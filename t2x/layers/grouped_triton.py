"""Grouped matrix products on NVIDIA GPUs, as Triton kernels.

A block of rows is multiplied only with the matrices of its own groups, as in
Gale et al. (2022), "MegaBlocks". A block with rows of two groups is computed
once for each of them.

Shape suffixes: P rows, E groups, D and F columns, X pairs of a block of rows
and a group, the visits of a kernel.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

ROWS = 128  # Number of rows in a block.
_SIDES = 128, 64, 32, 16  # Possible lengths of a block's other sides.
_DEPTH_BYTES = 128  # Bytes of a factor's block along the contracted dimension.
_SETTINGS = plgpu.CompilerParams(num_warps=8, num_stages=3)


def serves(D: int, F: int) -> bool:
  """Returns whether matrices of D x F can be cut into blocks."""
  return not (D % _SIDES[-1] or F % _SIDES[-1])


def rows(
  x_PD: jax.Array,
  w: jax.Array,
  sizes_E: jax.Array,
  *,
  transposed: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """Multiplies each group of rows with its own matrix.

  Args:
    x_PD: rows, sorted by group; P is a multiple of 128.
    w: matrix of each group, (E, D, F), or (E, F, D) if `transposed`.
    sizes_E: number of rows of each group.
    transposed: whether the matrices are transposed.
    interpret: whether to run the kernel in interpreter mode, on any device and
      slowly.

  Returns:
    (P, F); values in rows of no group are undefined.
  """
  P, D = x_PD.shape
  F = w.shape[1 if transposed else 2]
  depth, width = _side(D, _depth(x_PD)), _side(F)
  starts, groups_X, blocks_X, num_used = _visits(sizes_E, P)

  def kernel(
    starts: jax.Ref,
    groups_X: jax.Ref,
    blocks_X: jax.Ref,
    num_used: jax.Ref,
    x_ref: jax.Ref,
    w_ref: jax.Ref,
    out_ref: jax.Ref,
  ) -> None:
    visit, column = pl.program_id(0), pl.program_id(1)
    used = visit < num_used[0]
    group, first = groups_X[visit], blocks_X[visit] * ROWS
    row = first + jnp.arange(ROWS)
    in_group = used & (row >= starts[group]) & (row < starts[group + 1])
    columns = pl.dslice(column * width, width)
    some = pl.dslice(first, ROWS)

    def add(step: jax.Array, total: jax.Array) -> jax.Array:
      inner = pl.dslice(step * depth, depth)
      x = x_ref[some, inner]
      if transposed:
        return total + plgpu.dot(x, w_ref[group, columns, inner].T)
      return total + plgpu.dot(x, w_ref[group, inner, columns])

    zeros = jnp.zeros((ROWS, width), jnp.float32)
    steps = used.astype(jnp.int32) * (D // depth)
    total = jax.lax.fori_loop(0, steps, add, zeros)
    plgpu.store(
      out_ref.at[some, columns],
      total.astype(out_ref.dtype),
      mask=jnp.broadcast_to(in_group[:, None], (ROWS, width)),
    )

  return pl.pallas_call(
    kernel,
    grid=(groups_X.size, F // width),
    out_shape=jax.ShapeDtypeStruct((P, F), x_PD.dtype),
    compiler_params=_SETTINGS,
    interpret=interpret,
    name='grouped_rows',
  )(starts, groups_X, blocks_X, num_used, x_PD, w)


def weights(
  x_PD: jax.Array,
  y_PF: jax.Array,
  sizes_E: jax.Array,
  *,
  interpret: bool = False,
) -> jax.Array:
  """Sums x^T y over the rows of each group: the gradient of its matrix.

  Args:
    x_PD: rows, sorted by group; P is a multiple of 128.
    y_PF: gradients of the products of these rows.
    sizes_E: number of rows of each group.
    interpret: whether to run the kernel in interpreter mode, on any device and
      slowly.

  Returns:
    (E, D, F); zeros for a group without rows.
  """
  D, F = x_PD.shape[1], y_PF.shape[1]
  tall, width, depth = _side(D), _side(F), _depth(x_PD)
  starts = _starts(sizes_E)

  def kernel(
    starts: jax.Ref, x_ref: jax.Ref, y_ref: jax.Ref, out_ref: jax.Ref
  ) -> None:
    group = pl.program_id(2)
    down = pl.dslice(pl.program_id(0) * tall, tall)
    across = pl.dslice(pl.program_id(1) * width, width)
    start, end = starts[group], starts[group + 1]

    def add(block: jax.Array, total: jax.Array) -> jax.Array:
      row = block * depth + jnp.arange(depth)
      in_group = ((row >= start) & (row < end))[:, None]
      some = pl.dslice(block * depth, depth)
      # Both, since values in rows of no group are undefined.
      x = jnp.where(in_group, x_ref[some, down], 0)
      y = jnp.where(in_group, y_ref[some, across], 0)
      return total + plgpu.dot(x.T, y)

    zeros = jnp.zeros((tall, width), jnp.float32)
    first = jax.lax.div(start, depth)
    last = jnp.where(end > start, jax.lax.div(end + depth - 1, depth), first)
    total = jax.lax.fori_loop(first, last, add, zeros)
    out_ref[group, down, across] = total.astype(out_ref.dtype)

  return pl.pallas_call(
    kernel,
    grid=(D // tall, F // width, sizes_E.size),
    out_shape=jax.ShapeDtypeStruct((sizes_E.size, D, F), x_PD.dtype),
    compiler_params=_SETTINGS,
    interpret=interpret,
    name='grouped_weights',
  )(starts, x_PD, y_PF)


def _side(size: int, most: int = _SIDES[0]) -> int:
  return next(s for s in _SIDES if size % s == 0 and s <= most)


def _depth(x: jax.Array) -> int:
  return _DEPTH_BYTES // x.dtype.itemsize


def _starts(sizes_E: jax.Array) -> jax.Array:
  """Returns the first row of each group, and the end of the last one."""
  ends_E = jnp.cumsum(sizes_E.astype(jnp.int32))
  return jnp.concatenate([jnp.zeros(1, jnp.int32), ends_E])


def _visits(
  sizes_E: jax.Array, P: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Plans the visits of the kernel, as many as there can be.

  Each group but the first may share a block with the one before.

  Returns:
    The first row of each group and the end of the last one; the group and the
    block of rows of each visit; and the number of visits that are used, (1,).
  """
  starts = _starts(sizes_E)
  first_E = starts[:-1] // ROWS
  last_E = (starts[1:] + ROWS - 1) // ROWS
  visits_E = jnp.where(sizes_E > 0, last_E - first_E, 0)
  ends_E = jnp.cumsum(visits_E)
  visit_X = jnp.arange(P // ROWS + sizes_E.size - 1)
  past_XE = visit_X[:, None] >= ends_E[None]
  group_X = jnp.minimum(past_XE.sum(1), sizes_E.size - 1)
  block_X = first_E[group_X] + visit_X - (ends_E - visits_E)[group_X]
  num_used = ends_E[-1:]
  as_int = lambda a: a.astype(jnp.int32)
  return starts, as_int(group_X), as_int(block_X), as_int(num_used)
