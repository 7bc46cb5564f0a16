"""What a compiled program sends between devices, counted.

found = collectives(compiled.as_text(), mesh)
print(table(found))
total(found, kind='all-gather', axis='fsdp')  # Bytes, into each device.
"""

from collections.abc import Iterable
import dataclasses
import math
import re
from typing import Any

import numpy as np

from t2x.hlo import cross_slice
from t2x.hlo import execution
from t2x.hlo import module as module_lib
from t2x.hlo import overlap
from t2x.hlo import replica_groups

KINDS = (
  'all-gather',
  'all-reduce',
  'all-to-all',
  'collective-broadcast',
  'collective-permute',
  'ragged-all-to-all',
  'reduce-scatter',
)
Times = execution.Times
_SLICES = ('dynamic-slice', 'slice')


@dataclasses.dataclass(frozen=True)
class Collective:
  """One exchange between devices; one of several dtypes is listed for each.

  Attributes:
    kind: one of `KINDS`. An all-reduce of which the same kernel keeps a slice
      is a reduce-scatter, whatever the compiler calls it.
    axes: mesh axes along which its data moves, in the mesh's order.
    bytes: on one device, each time: what an all-gather returns, and what the
      others are given.
    times: how often it runs, the loops around it counted.
    loops: how many loops are around it.
    dtype: as HLO writes it: `bf16`, `f32`, `s32`.
    op_name: path of the JAX operation that it came from, or ''.
    hidden: whether products run while it does, see `overlap`.
    between: whether it goes from one slice to others, and not within one. None
      in a program that all devices share.
  """

  kind: str
  axes: tuple[str, ...]
  bytes: int
  times: Times
  loops: int
  dtype: str
  op_name: str = ''
  hidden: bool = False
  between: bool | None = None


def collectives(
  text: str, mesh, trips: execution.Trips | None = None
) -> list[Collective]:
  """Lists the collectives of a program, asynchronous ones once.

  Args:
    text: of `compiled.as_text()`.
    mesh: the Mesh or AbstractMesh that it was compiled for.
    trips: of loops of which the text does not tell them.

  Raises:
    ValueError: the mesh has another number of devices, or a loop with
      collectives in it has an unknown number of trips.
  """
  module = module_lib.parse(text)
  sizes, places = dict(mesh.shape), _places(text, mesh)
  started = _started(module)
  is_slice = len(places) < math.prod(sizes.values())

  def find(scope, instruction):
    kind = cross_slice.kind(instruction)
    if kind:
      axes, num = cross_slice.joined(instruction, mesh)
      # What is sent; an all-gather returns as much of each slice.
      sent = _sizes(scope.type_of(instruction.operands[0]))
      parts = num if kind == 'all-gather' else 1
      given = {dtype: parts * size for dtype, size in sent.items()}
      hidden = cross_slice.is_hidden(scope, instruction)
      return made(kind, axes, instruction, given, hidden, True)
    kind = instruction.op.removesuffix('-start')
    if kind not in KINDS or _repeats(scope, instruction, started):
      return []
    if kind == 'all-reduce' and _keeps_a_slice(scope, instruction):
      kind = 'reduce-scatter'
    axes = replica_groups.axes(instruction, sizes, places)
    if not axes:  # Of each device with itself.
      return []
    hidden = overlap.is_hidden(scope, instruction)
    between = False if is_slice else None
    given = _payload(kind, scope, instruction)
    return made(kind, axes, instruction, given, hidden, between)

  def made(kind, axes, instruction, given, *how):
    return [
      Collective(kind, axes, size, 1, 0, dtype, instruction.op_name, *how)
      for dtype, size in given.items()
    ]

  found = execution.executed(module, find, lambda c: c.bytes, trips)
  return [
    dataclasses.replace(c, times=times, loops=depth)
    for c, times, depth in found
  ]


def total(
  found: Iterable[Collective], kind: str | None = None, axis: str | None = None
) -> int:
  """Returns the bytes of all that is of a kind, or moves along an axis.

  Raises:
    ValueError: no such kind.
  """
  if kind is not None and kind not in KINDS:
    raise ValueError(f'kind={kind!r}; it is one of {", ".join(KINDS)}.')
  return round(
    sum(
      c.bytes * c.times
      for c in found
      if kind in (None, c.kind) and (axis is None or axis in c.axes)
    )
  )


def summary(
  found: Iterable[Collective],
) -> dict[tuple[str, tuple[str, ...]], tuple[int, int]]:
  """Returns (kind, axes) -> (how often, bytes), the most bytes first."""
  sums: dict = {}
  for c in found:
    times, size = sums.get((c.kind, c.axes), (0, 0))
    sums[c.kind, c.axes] = times + c.times, size + c.bytes * c.times
  sums = {
    key: (round(times), round(size)) for key, (times, size) in sums.items()
  }
  return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


def table(found: Iterable[Collective]) -> str:
  """Returns `summary` as lines of text."""
  rows = [('collective', 'axes', 'times', 'MB')]
  rows += [
    (kind, ','.join(axes), f'{times}', f'{size / 1e6:.3f}')
    for (kind, axes), (times, size) in summary(found).items()
  ]
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  return '\n'.join(
    f'{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}'
    for a, b, c, d in rows
  )


def _places(text: str, mesh: Any) -> np.ndarray:
  """Returns where on the mesh the program's devices lie, (devices, axes)."""
  found = re.search(r'\bnum_partitions=(\d+)', text.partition('\n')[0])
  num = int(found[1]) if found else 1
  shape = tuple(mesh.shape.values())
  if num == math.prod(shape):
    return np.array(list(np.ndindex(shape)))
  return cross_slice.places(mesh, num)


def _payload(kind, scope, instruction) -> dict[str, int]:
  """Returns dtype -> bytes."""
  operands = instruction.operands
  if kind == 'ragged-all-to-all':
    operands = operands[:1]  # The others are its result and its offsets.
  given = _sizes(','.join(scope.type_of(name) for name in operands))
  if kind != 'all-gather':
    return given
  made = _sizes(instruction.type)
  if instruction.op.endswith('-start'):  # It returns its operands too.
    return {dtype: made[dtype] - size for dtype, size in given.items()}
  return made


def _sizes(type_: str) -> dict[str, int]:
  sums: dict[str, int] = {}
  for dtype, dims in module_lib.shapes(type_):
    sums[dtype] = sums.get(dtype, 0) + module_lib.num_bytes(dtype, dims)
  return sums


# --- What the TPU compiler makes of collectives. ---


def _started(module: module_lib.Module) -> set[tuple]:
  """Returns the collectives that fusions start, by kind, channel and type.

  A TPU carries out a collective beside its products by writing it into each
  of several fusions: one starts it, some go on with it, one ends it.
  """
  return {
    _identity(instruction)
    for computation in module.computations.values()
    for instruction in computation.instructions.values()
    if _starts(computation, instruction)
  }


def _identity(instruction: module_lib.Instruction) -> tuple:
  channel = re.search(r'channel_id=(\d+)', instruction.attributes)
  shape = tuple(module_lib.shapes(instruction.type))
  return instruction.op, channel and channel[1], shape


def _starts(computation: module_lib.Computation, instruction) -> bool:
  """Whether a fusion that holds a collective starts it."""
  return instruction.op in KINDS and any(
    '"AsyncCollectiveStart"' in user.attributes
    for user in _users(computation, instruction.name)
  )


def _repeats(scope: execution.Scope, instruction, started) -> bool:
  """Whether this is a later part of a collective that a fusion starts."""
  return (
    'async_collective_fusion_config' in instruction.attributes
    and _identity(instruction) in started
    and not _starts(scope.computation, instruction)
  )


def _keeps_a_slice(scope: execution.Scope, instruction) -> bool:
  users = _users(scope.computation, instruction.name)
  fused = scope.caller is not None and scope.caller.op == 'fusion'
  return fused and bool(users) and all(user.op in _SLICES for user in users)


def _users(
  computation: module_lib.Computation, name: str
) -> list[module_lib.Instruction]:
  """Returns what uses a value, or an element of it."""
  users = []
  for user in computation.instructions.values():
    if name in user.operands:
      part = user.op == 'get-tuple-element'
      users += _users(computation, user.name) if part else [user]
  return users
