"""Counts the FLOPs and bytes of a program from its jaxpr, without compiling.

closed = jax.make_jaxpr(fn)(*shapes)
jaxpr_costs.count(closed).total.flops

Operations that JAX's own dead-code elimination drops, as the compiler does, are
not counted; a `custom_vjp` that is not differentiated counts as a whole if any
of its results is used. The compiler can drop more: it merges equal products,
and moves operations out of a loop that does not change their operands. It adds
products where it has no other way: XLA for CPUs turns a ragged product into a
product with the matrix of every group.

Axes that the compiler partitions do not show in a jaxpr, so the figures are
those of all devices together. A program without a mesh runs on one device.
"""

from collections.abc import Callable
from collections.abc import Iterable
import dataclasses
import math
from typing import Any

from jax.extend import core
from jax.extend import source_info_util
from jax.interpreters import partial_eval

from t2x.hlo import kernel_flops
from t2x.hlo import matmul_flops

# Returns the trip count of a `while` loop, given its source as in `Counted`;
# None if unknown.
Trips = Callable[[str], int | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """Cost of some operations.

  Attributes:
    flops: FLOPs of matrix products and convolutions, two for each multiply-add.
    bytes: bytes read and written if all operands and results of every operation
      went through memory. An upper bound: fusion saves most of those of
      elementwise operations.
    product_bytes: bytes of the operands and results of the products alone.
      Operations between two products are taken to fuse with them. Nearer to the
      truth, from below; only a kernel that fuses products (attention) moves
      less.
  """

  flops: int = 0
  bytes: int = 0
  product_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
  """The cost of a program, whole and in parts that add up to it.

  Attributes:
    total: cost of the whole program.
    sources: cost by source, the `jax.named_scope`s around an operation from the
      outermost to the innermost, such as 'decoder/attention/scores'; '' is
      outside all of them. The gradient of an operation has its source.
    primitives: cost by the name of JAX's primitive, such as 'dot_general'.
  """

  total: Cost
  sources: dict[str, Cost]
  primitives: dict[str, Cost]


def count(closed: core.ClosedJaxpr, trips: Trips | None = None) -> Counted:
  """Returns the cost of a program on all devices together.

  The body of a scan counts as often as it runs. Of a `cond` the dearest branch
  counts (by FLOPs, then bytes). The body of a `shard_map`, whose shapes are
  those of one device, counts once for each device of the axes that it is manual
  over. A ragged product multiplies each row with one group's matrix, whatever
  the sizes of the groups. A Pallas kernel has the FLOPs that its scopes give
  (`kernel_flops`), else those of its products once for each point of its grid;
  it moves its operands and results once.

  Args:
    closed: the program, as `jax.make_jaxpr(fn)(*args)` or
      `jit(fn).trace(*args).jaxpr` returns it.
    trips: trip counts of `while` loops, which a jaxpr does not hold.

  Raises:
    ValueError: the trip count of a `while` loop or the grid of a Pallas kernel
      is unknown, or a product lies within a primitive for which it is not known
      how often it runs the jaxpr in it.
  """
  used = [True] * len(closed.jaxpr.outvars)
  live, _ = partial_eval.dce_jaxpr(closed.jaxpr, used)
  parts = _jaxpr(live, '', trips)
  return Counted(
    total=_sum(parts.values()),
    sources=_grouped(parts, 1),
    primitives=_grouped(parts, 0),
  )


# From primitive and source to cost.
_Parts = dict[tuple[str, str], Cost]


def _grouped(parts: _Parts, index: int) -> dict[str, Cost]:
  names = dict.fromkeys(key[index] for key in parts)
  return {
    name: _sum(c for key, c in parts.items() if key[index] == name)
    for name in names
  }


def _sum(costs: Iterable[Cost]) -> Cost:
  costs = list(costs)
  return Cost(
    flops=sum(c.flops for c in costs),
    bytes=sum(c.bytes for c in costs),
    product_bytes=sum(c.product_bytes for c in costs),
  )


def _times(parts: _Parts, num: int) -> _Parts:
  return {
    key: Cost(
      flops=num * c.flops,
      bytes=num * c.bytes,
      product_bytes=num * c.product_bytes,
    )
    for key, c in parts.items()
  }


def _merged(several: Iterable[_Parts]) -> _Parts:
  merged: _Parts = {}
  for parts in several:
    for key, cost in parts.items():
      merged[key] = _sum([merged[key], cost]) if key in merged else cost
  return merged


# Primitives that run the one jaxpr among their parameters once.
_CALLS = frozenset(
  ('jit', 'remat2', 'closed_call', 'core_call', 'custom_jvp_call')
  + ('custom_vjp_call', 'run_state')
)


def _jaxpr(jaxpr: core.Jaxpr, outer: str, trips: Trips | None) -> _Parts:
  return _merged(_equation(eqn, outer, trips) for eqn in jaxpr.eqns)


def _equation(eqn: core.JaxprEqn, outer: str, trips: Trips | None) -> _Parts:
  name, params = eqn.primitive.name, eqn.params
  source = _source(eqn, outer)
  inner = [_plain(j) for j in core.jaxprs_in_params(params)]
  count_inner = lambda jaxpr: _jaxpr(jaxpr, source, trips)
  if name in _CALLS:
    return count_inner(inner[0])
  if name == 'scan':
    return _times(count_inner(inner[0]), params['length'])
  if name == 'while':
    num = _trips(eqn, source, trips)
    condition, body = (_plain(params[f'{n}_jaxpr']) for n in ('cond', 'body'))
    parts = _times(count_inner(condition), num + 1)
    return _merged([parts, _times(count_inner(body), num)])
  if name == 'cond':
    branches = [count_inner(jaxpr) for jaxpr in inner]
    price = lambda parts: dataclasses.astuple(_sum(parts.values()))
    return max(branches, key=price)
  if name == 'shard_map':
    sizes = params['mesh'].shape
    num = math.prod(sizes[axis] for axis in params['newly_manual_axes'])
    return _times(count_inner(inner[0]), num)
  if name in _PRODUCTS:
    flops = _PRODUCTS[name](eqn)
  elif name == 'pallas_call':
    flops = _kernel(eqn, source, count_inner)
  else:
    flops = 0
    if any(_sum(count_inner(j).values()).flops for j in inner):
      raise ValueError(
        f'There are products in {name!r} ({_where(eqn)}), of which it is not '
        'known how often it runs what is in it. Write it with jit, scan, cond '
        'or shard_map.'
      )
  moved = _bytes(eqn)
  product_bytes = moved if flops else 0
  cost = Cost(flops=flops, bytes=moved, product_bytes=product_bytes)
  return {(name, source): cost}


def _plain(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> core.Jaxpr:
  return jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr


def _source(eqn: core.JaxprEqn, outer: str) -> str:
  """Returns the named scopes of an equation, without JAX's own.

  JAX's own are those of einsum and checkpoint. A checkpoint that is
  differentiated has its scopes twice; the repetition is dropped.
  """
  path = outer.split('/') if outer else []
  for part in eqn.source_info.name_stack.stack:
    # Beside scopes there are transformations (jvp, transpose).
    if type(part).__name__ != 'Scope' or '->' in part.name:
      continue
    if part.name in ('rematted_computation', 'checkpoint'):
      continue
    path.append(part.name)
    for num in range(1, len(path) // 2 + 1):
      if path[-num:] == path[-2 * num : -num]:
        del path[-num:]
        break
  return '/'.join(path)


def _where(eqn: core.JaxprEqn) -> str:
  return source_info_util.summarize(eqn.source_info)


def _trips(eqn: core.JaxprEqn, source: str, trips: Trips | None) -> int:
  num = trips(source) if trips else None
  if num is None:
    raise ValueError(
      f'The while loop of source {source!r} ({_where(eqn)}) runs until its '
      'condition fails, so its trips are not known before it runs. Give '
      '`trips`, a function from that source to a number, or write the loop as '
      'a scan.'
    )
  return num


def _kernel(eqn: core.JaxprEqn, source: str, count_inner: Callable) -> int:
  """Returns the FLOPs that its scopes give, else those of its grid."""
  flops = kernel_flops.flops_named(f'{source}/{eqn.params["name"]}')
  if flops is not None:
    return round(flops)
  grid = eqn.params['grid_mapping'].grid
  if not all(isinstance(size, int) for size in grid):
    raise ValueError(
      f'The grid {grid} of the Pallas kernel at {_where(eqn)} has sizes that '
      'are not known before it runs. Give it a grid of constants.'
    )
  body = _sum(count_inner(_plain(eqn.params['jaxpr'])).values())
  return math.prod(grid) * body.flops


def _bytes(eqn: core.JaxprEqn) -> int:
  read = {v for v in eqn.invars if isinstance(v, core.Var)}
  written = [v for v in eqn.outvars if not isinstance(v, core.DropVar)]
  return sum(_size(v.aval) for v in [*read, *written])


def _size(aval: Any) -> int:
  """Returns the bytes of an abstract array; 0 for a token."""
  shape = getattr(aval, 'shape', None)
  return 0 if shape is None else math.prod(shape) * aval.dtype.itemsize


def _shapes(eqn: core.JaxprEqn) -> list[tuple[int, ...]]:
  avals: list[Any] = [v.aval for v in (*eqn.invars[:2], eqn.outvars[0])]
  return [aval.shape for aval in avals]


def _dot(eqn: core.JaxprEqn) -> int:
  lhs, _, out = _shapes(eqn)
  (contracted, _), _ = eqn.params['dimension_numbers']
  return 2 * math.prod(out) * math.prod(lhs[dim] for dim in contracted)


def _ragged_dot(eqn: core.JaxprEqn) -> int:
  """Each element of the left factor multiplies the columns of one group."""
  lhs, rhs, _ = _shapes(eqn)
  numbers = eqn.params['ragged_dot_dimension_numbers']
  (_, contracted), (_, batch) = numbers.dot_dimension_numbers
  excluded = {*contracted, *batch, *numbers.rhs_group_dimensions}
  columns = [size for dim, size in enumerate(rhs) if dim not in excluded]
  return 2 * math.prod(lhs) * math.prod(columns)


def _convolution(eqn: core.JaxprEqn) -> int:
  """Counts only positions within the input, as in `matmul_flops`."""
  lhs, rhs, out = _shapes(eqn)
  params = eqn.params
  lhs_spec, rhs_spec, out_spec = params['dimension_numbers']
  flops = 2 * out[out_spec[0]] * out[out_spec[1]] * rhs[rhs_spec[1]]
  for i, dims in enumerate(zip(lhs_spec[2:], rhs_spec[2:], out_spec[2:])):
    flops *= matmul_flops.overlaps(
      *(shape[dim] for shape, dim in zip((lhs, rhs, out), dims)),
      before=params['padding'][i][0],
      stride=params['window_strides'][i],
      spread=params['lhs_dilation'][i],
      dilation=params['rhs_dilation'][i],
    )
  return flops


_PRODUCTS: dict[str, Callable[[core.JaxprEqn], int]] = {
  'dot_general': _dot,
  'ragged_dot_general': _ragged_dot,
  'conv_general_dilated': _convolution,
}
