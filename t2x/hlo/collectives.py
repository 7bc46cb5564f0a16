"""The collectives of a compiled program: kind, mesh axes, bytes, how often.

listed = collectives(compiled.as_text(), mesh)
print(table(listed))
total(listed, kind='all-gather', axis='fsdp')  # Bytes, into each device.
"""

from collections.abc import Iterable
import dataclasses
import math
import re

import jax
import numpy as np

from t2x.hlo import cross_slice
from t2x.hlo import execution
from t2x.hlo import module as module_lib
from t2x.hlo import overlap
from t2x.hlo import replica_groups
from t2x.parallel import sharding

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
  """One collective of a program; one of several dtypes is listed once for each.

  Attributes:
    kind: one of `KINDS`. An all-reduce of which the same kernel keeps a slice
      is a reduce-scatter, whatever the compiler calls it.
    axes: mesh axes along which its data moves, in the mesh's order.
    bytes: size of the result of an all-gather, and of the operands of the other
      kinds, on one device, each time that it runs.
    times: number of times that it runs in one run of the program, those of the
      loops around it included.
    loops: number of loops around it.
    dtype: type of the elements as HLO writes it: `bf16`, `f32`, `s32`.
    op_name: path of the JAX operation that it came from, or ''.
    hidden: True if matrix products run while it is under way, see `overlap`.
    between: True if it goes from one slice of TPUs to others, False if it stays
      within one. None in a program that all devices share.
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
  text: str, mesh: sharding.AnyMesh, trips: execution.Trips | None = None
) -> list[Collective]:
  """Lists the collectives of a program, asynchronous ones once.

  Args:
    text: the program, as `compiled.as_text()` prints it.
    mesh: the mesh that it was compiled for.
    trips: trip counts of the loops whose text does not hold them.

  Raises:
    ValueError: the mesh has another number of devices, or a loop with
      collectives in it has an unknown number of trips.
  """
  module = module_lib.parse(text)
  sizes, places = dict(mesh.shape), _places(text, mesh)
  started = _started(module)
  is_slice = len(places) < math.prod(sizes.values())

  def find(
    scope: execution.Scope, instruction: module_lib.Instruction
  ) -> list[Collective]:
    kind = cross_slice.kind(instruction)
    if kind:
      # Only a mesh of real or described devices has slices.
      assert isinstance(mesh, jax.sharding.Mesh)
      axes, num = cross_slice.axes_and_slices(instruction, mesh)
      # The bytes sent; an all-gather returns as many of each slice.
      sent = _sizes(scope.type_of(instruction.operands[0]))
      parts = num if kind == 'all-gather' else 1
      payload = {dtype: parts * size for dtype, size in sent.items()}
      hidden = cross_slice.is_hidden(scope, instruction)
      return entries(kind, axes, instruction, payload, hidden, True)
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
    payload = _payload(kind, scope, instruction)
    return entries(kind, axes, instruction, payload, hidden, between)

  def entries(
    kind: str,
    axes: tuple[str, ...],
    instruction: module_lib.Instruction,
    payload: dict[str, int],
    hidden: bool,
    between: bool | None,
  ) -> list[Collective]:
    return [
      Collective(
        *(kind, axes, size, 1, 0, dtype, instruction.op_name, hidden, between)
      )
      for dtype, size in payload.items()
    ]

  executed = execution.executed(module, find, lambda c: c.bytes, trips)
  return [
    dataclasses.replace(c, times=times, loops=depth)
    for c, times, depth in executed
  ]


def total(
  listed: Iterable[Collective],
  kind: str | None = None,
  axis: str | None = None,
) -> int:
  """Returns the bytes of the collectives of a kind, or along a mesh axis.

  Args:
    listed: the collectives to choose from.
    kind: one of `KINDS`; None counts all.
    axis: a mesh axis along which they move data; None counts all.

  Raises:
    ValueError: there is no such kind.
  """
  if kind is not None and kind not in KINDS:
    raise ValueError(f'kind={kind!r}; it is one of {", ".join(KINDS)}.')
  return round(
    sum(
      c.bytes * c.times
      for c in listed
      if kind in (None, c.kind) and (axis is None or axis in c.axes)
    )
  )


def summary(
  listed: Iterable[Collective],
) -> dict[tuple[str, tuple[str, ...]], tuple[int, int]]:
  """Returns (kind, axes) -> (times run, bytes), the most bytes first."""
  sums: dict = {}
  for c in listed:
    times, size = sums.get((c.kind, c.axes), (0, 0))
    sums[c.kind, c.axes] = times + c.times, size + c.bytes * c.times
  sums = {
    key: (round(times), round(size)) for key, (times, size) in sums.items()
  }
  return dict(sorted(sums.items(), key=lambda item: -item[1][1]))


def table(listed: Iterable[Collective]) -> str:
  """Returns `summary` as a table of text."""
  rows = [('collective', 'axes', 'times', 'MB')]
  rows += [
    (kind, ','.join(axes), f'{times}', f'{size / 1e6:.3f}')
    for (kind, axes), (times, size) in summary(listed).items()
  ]
  widths = [max(len(row[i]) for row in rows) for i in range(4)]
  return '\n'.join(
    f'{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}'
    for a, b, c, d in rows
  )


def _places(text: str, mesh: sharding.AnyMesh) -> np.ndarray:
  """Returns the mesh coordinates of the program's devices, (devices, axes)."""
  match = re.search(r'\bnum_partitions=(\d+)', text.partition('\n')[0])
  num = int(match[1]) if match else 1
  shape = tuple(mesh.shape.values())
  if num == math.prod(shape):
    return np.array(list(np.ndindex(shape)))
  return cross_slice.places(mesh, num)


def _payload(
  kind: str, scope: execution.Scope, instruction: module_lib.Instruction
) -> dict[str, int]:
  """Returns dtype -> `Collective.bytes`."""
  operands = instruction.operands
  if kind == 'ragged-all-to-all':
    operands = operands[:1]  # The others are its result and its offsets.
  sent = _sizes(','.join(scope.type_of(name) for name in operands))
  if kind != 'all-gather':
    return sent
  results = _sizes(instruction.type)
  if instruction.op.endswith('-start'):  # It returns its operands too.
    return {dtype: results[dtype] - size for dtype, size in sent.items()}
  return results


def _sizes(type_: str) -> dict[str, int]:
  sums: dict[str, int] = {}
  for dtype, dims in module_lib.shapes(type_):
    sums[dtype] = sums.get(dtype, 0) + module_lib.num_bytes(dtype, dims)
  return sums


# --- Collectives in fusions, as the TPU compiler writes them. ---


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
  """Returns the opcode, the channel and the shapes of a collective."""
  channel = re.search(r'channel_id=(\d+)', instruction.attributes)
  shape = tuple(module_lib.shapes(instruction.type))
  return instruction.op, channel and channel[1], shape


def _starts(
  computation: module_lib.Computation, instruction: module_lib.Instruction
) -> bool:
  """Whether a fusion that holds a collective starts it."""
  return instruction.op in KINDS and any(
    '"AsyncCollectiveStart"' in user.attributes
    for user in _users(computation, instruction.name)
  )


def _repeats(
  scope: execution.Scope,
  instruction: module_lib.Instruction,
  started: set[tuple],
) -> bool:
  """Whether this is a later part of a collective that a fusion starts."""
  return (
    'async_collective_fusion_config' in instruction.attributes
    and _identity(instruction) in started
    and not _starts(scope.computation, instruction)
  )


def _keeps_a_slice(
  scope: execution.Scope, instruction: module_lib.Instruction
) -> bool:
  """Whether the fusion of an all-reduce uses only a slice of its result."""
  users = _users(scope.computation, instruction.name)
  fused = scope.caller is not None and scope.caller.op == 'fusion'
  return fused and bool(users) and all(user.op in _SLICES for user in users)


def _users(
  computation: module_lib.Computation, name: str
) -> list[module_lib.Instruction]:
  """Returns the instructions that use a value, or an element of it."""
  users = []
  for user in computation.instructions.values():
    if name in user.operands:
      part = user.op == 'get-tuple-element'
      users += _users(computation, user.name) if part else [user]
  return users
