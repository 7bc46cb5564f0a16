"""FLOPs and bytes of a program, counted from its jaxpr before any compiler.

closed = jax.make_jaxpr(fn)(*shapes)
jaxpr.count(closed).total.flops

What JAX's own dead-code elimination drops, as the compiler does, is not
counted; of a `custom_vjp` that is not differentiated, all counts if any of its
results is used. The compiler can drop more: equal products are merged, and what
does not change is taken out of loops. It adds products where it has no other
way: XLA for CPUs turns a ragged one into one with every group.

A program without a mesh is that of one device; under one, axes that the
compiler partitions do not show in a jaxpr, so that figures are always of all
devices together.
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

# The trips of a `while` loop by its source, as in `Counted`; None is unknown.
Trips = Callable[[str], int | None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
  """What some operations cost.

  Attributes:
    flops: of matrix products and convolutions, 2 x multiply-adds.
    bytes: read and written if all operands and results of every operation went
      through memory. Fusion saves most of those of elementwise operations: an
      upper bound.
    product_bytes: those of products alone, each by itself. What lies between
      two products is taken to fuse with them, so it is nearer the truth from
      below; only a kernel that fuses products (attention) moves less.
  """

  flops: int = 0
  bytes: int = 0
  product_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
  """The cost of a program, whole and in parts that add up to it.

  Attributes:
    total: of everything.
    sources: by where it was written, the `jax.named_scope`s from the outside
      in, such as 'decoder/attention/scores'; '' is outside all of them. A
      gradient counts where its forward pass does.
    primitives: by the name of JAX's primitive, such as 'dot_general'.
  """

  total: Cost
  sources: dict[str, Cost]
  primitives: dict[str, Cost]


def count(closed: core.ClosedJaxpr, trips: Trips | None = None) -> Counted:
  """Returns what a program costs on all devices together.

  A scan counts its length, of a `cond` the dearest branch (by FLOPs, then
  bytes), and the body of a `shard_map`, whose shapes are those of a device,
  times the devices of the axes that it is manual over. A ragged product
  multiplies each row with one group's matrix, whatever the sizes of the groups.
  A Pallas kernel runs its products once for each point of its grid, where its
  scopes do not tell them (`kernel_flops`), and moves its operands and results
  once.

  Args:
    closed: of `jax.make_jaxpr(fn)(*args)`, or `jit(fn).trace(*args).jaxpr`.
    trips: of `while` loops, whose trips a jaxpr does not tell.

  Raises:
    ValueError: a `while` loop of unknown trips, a Pallas grid of unknown size,
      or a product within a primitive of which it is not known how often it runs
      what is in it.
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


def _joined(several: Iterable[_Parts]) -> _Parts:
  joined: _Parts = {}
  for parts in several:
    for key, cost in parts.items():
      joined[key] = _sum([joined[key], cost]) if key in joined else cost
  return joined


# Primitives that run the one jaxpr among their parameters once.
_CALLS = frozenset(
  ('jit', 'remat2', 'closed_call', 'core_call', 'custom_jvp_call')
  + ('custom_vjp_call', 'run_state')
)


def _jaxpr(jaxpr: core.Jaxpr, outer: str, trips: Trips | None) -> _Parts:
  return _joined(_equation(eqn, outer, trips) for eqn in jaxpr.eqns)


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
    return _joined([parts, _times(count_inner(body), num)])
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
  """Returns named scopes, less those of JAX (einsum, checkpoint).

  A checkpoint that is differentiated stands in its scopes twice; what repeats
  is dropped.
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
  """Returns the FLOPs that its scopes tell, else those of its grid."""
  told = kernel_flops.flops_named(f'{source}/{eqn.params["name"]}')
  if told is not None:
    return round(told)
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


def _size(aval) -> int:
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
  """Every element of the left factor meets the columns of one group."""
  lhs, rhs, _ = _shapes(eqn)
  numbers = eqn.params['ragged_dot_dimension_numbers']
  (_, contracted), (_, batch) = numbers.dot_dimension_numbers
  met = {*contracted, *batch, *numbers.rhs_group_dimensions}
  columns = [size for dim, size in enumerate(rhs) if dim not in met]
  return 2 * math.prod(lhs) * math.prod(columns)


def _convolution(eqn: core.JaxprEqn) -> int:
  """Only positions within the input count, as in `matmul_flops`."""
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
