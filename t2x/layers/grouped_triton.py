"""Products of groups of rows on NVIDIA GPUs, as Triton kernels.

A block of rows meets the matrices of the groups that it holds and no others, as
in Gale et al. (2022), "MegaBlocks". A block on the edge of two groups is
visited once for each.

Shape suffixes: P rows, E groups, D and F columns, X blocks of rows of a group.
"""

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
import jax.numpy as jnp

ROWS = 128  # Of a block.
_SIDES = 128, 64, 32, 16  # Of a block's other sides: what divides comes first.
_DEPTH_BYTES = 128  # Of a row of a factor, along what is summed over.
_SETTINGS = plgpu.CompilerParams(num_warps=8, num_stages=3)


def serves(D: int, F: int) -> bool:
  """Whether matrices of D x F can be cut into blocks."""
  return not (D % _SIDES[-1] or F % _SIDES[-1])


def rows(
  x_PD: jax.Array,
  w: jax.Array,
  sizes_E: jax.Array,
  *,
  transposed: bool = False,
  interpret: bool = False,
) -> jax.Array:
  """Multiplies each group's rows with its matrix.

  Args:
    x_PD: rows, P a multiple of 128, those of a group together.
    w: (E, D, F), or (E, F, D) where `transposed`.
    sizes_E: rows of each group.
    transposed: the matrices are.
    interpret: run the kernel's text on any device, slowly.

  Returns:
    (P, F), without a defined value in rows of no group.
  """
  P, D = x_PD.shape
  F = w.shape[1 if transposed else 2]
  depth, width = _side(D, _depth(x_PD)), _side(F)
  starts, groups_X, blocks_X, num_used = _visits(sizes_E, P)

  def kernel(starts, groups_X, blocks_X, num_used, x_ref, w_ref, out_ref):
    visit, column = pl.program_id(0), pl.program_id(1)
    used = visit < num_used[0]
    group, first = groups_X[visit], blocks_X[visit] * ROWS
    row = first + jnp.arange(ROWS)
    own = used & (row >= starts[group]) & (row < starts[group + 1])
    columns = pl.dslice(column * width, width)
    some = pl.dslice(first, ROWS)

    def add(step, total):
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
      mask=jnp.broadcast_to(own[:, None], (ROWS, width)),
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
    x_PD: rows, P a multiple of 128.
    y_PF: rows of as many.
    sizes_E: rows of each group.
    interpret: run the kernel's text on any device, slowly.

  Returns:
    (E, D, F); zeros for a group without rows.
  """
  D, F = x_PD.shape[1], y_PF.shape[1]
  tall, width, depth = _side(D), _side(F), _depth(x_PD)
  starts = _starts(sizes_E)

  def kernel(starts, x_ref, y_ref, out_ref):
    group = pl.program_id(2)
    down = pl.dslice(pl.program_id(0) * tall, tall)
    across = pl.dslice(pl.program_id(1) * width, width)
    start, end = starts[group], starts[group + 1]

    def add(block, total):
      row = block * depth + jnp.arange(depth)
      own = ((row >= start) & (row < end))[:, None]
      some = pl.dslice(block * depth, depth)
      # Both, since a row of no group may hold anything.
      x = jnp.where(own, x_ref[some, down], 0)
      y = jnp.where(own, y_ref[some, across], 0)
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
  """Returns where each group starts, and where the last one ends."""
  ends_E = jnp.cumsum(sizes_E.astype(jnp.int32))
  return jnp.concatenate([jnp.zeros(1, jnp.int32), ends_E])


def _visits(sizes_E: jax.Array, P: int):
  """Returns starts, of each visit its group and block, and how many count.

  As many as there can be: each group but the first may share a block.
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
