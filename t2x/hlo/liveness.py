"""Lists the buffers that are live when a compiled program uses most memory.

The buffers of a scheduled program are followed from the instruction that
computes them to their last use, through tuples, loops and updates in place. The
compiler does more to share memory, so the sum can differ from its own figure.
The list says what the memory holds, by the operations that computed it.
"""

import dataclasses
import re

from t2x.hlo import execution
from t2x.hlo import memory_traffic
from t2x.hlo import module as module_lib

# Operations whose results are their operands.
_SAME = {
  'bitcast',
  'get-tuple-element',
  'opt-barrier',
  'tuple',
  'while',
}
# Index of the new buffer among the results of an asynchronous start; 1 unless
# it is listed here.
_FILLED = {'copy-start': 0}
# Operations to look through, from the result of a loop's body to its source.
_COPIES = ('bitcast', 'copy')
_ENTERED = ('call', 'conditional', 'while')


@dataclasses.dataclass(frozen=True)
class Buffer:
  """Memory that the program needs from one instruction to another.

  Attributes:
    bytes: size without padding.
    op_name: path of the JAX operation that filled it or, if the compiler added
      that operation, of the first that uses it; ''. For a constant that a loop
      carries, path of the operation that overwrites it there.
    type: type of the result that it holds, as HLO prints it.
  """

  bytes: int
  op_name: str
  type: str


@dataclasses.dataclass(frozen=True)
class _Value:
  """Buffers of an instruction's result.

  Attributes:
    parts: values of the elements of a tuple; None for a single array.
    buffers: numbers of the buffers of a single array.
  """

  parts: tuple['_Value', ...] | None
  buffers: frozenset[int]

  @property
  def all(self) -> frozenset[int]:
    if self.parts is None:
      return self.buffers
    return self.buffers.union(*(part.all for part in self.parts))


_NONE = _Value(None, frozenset())


def at_peak(text: str) -> list[Buffer]:
  """Returns the temporary buffers that are live at the peak of memory.

  Arguments of the program are left out, and so are results that are written
  into donated arguments.

  Args:
    text: a scheduled program, as `compiled.as_text()` prints it.
  """
  module = module_lib.parse(text)
  donated = _donated(text)
  scope = execution.Scope(module, module.computations[module.entry])
  return _Walk(scope, donated).peak()


def _donated(text: str) -> frozenset[int]:
  """Returns the indices of results that are written into an argument."""
  head = text.partition('\n')[0]
  start = head.find('input_output_alias={')
  if start < 0:
    return frozenset()
  indices = re.findall(r'\{(\d+)\}: \(', head[start:])
  return frozenset(int(index) for index in indices)


class _Walk:
  """Follows the buffers of one computation, instruction by instruction.

  A place is the index of an instruction in the order of the schedule.
  """

  def __init__(
    self, scope: execution.Scope, donated: frozenset[int] = frozenset()
  ):
    self._scope = scope
    self._list = [*scope.computation.instructions.values()]
    self._values: dict[str, _Value] = {}
    self._buffers: dict[int, Buffer] = {}
    self._first: dict[int, int] = {}
    self._last: dict[int, int] = {}
    self._constant: set[int] = set()
    for place, instruction in enumerate(self._list):
      self._values[instruction.name] = self._value(instruction, place)
      for name in instruction.operands:
        if name in self._values:
          for buffer in self._values[name].all:
            self._last[buffer] = place
            self._name(buffer, instruction)
      if instruction.op == 'while':
        self._name_carried(instruction)
    self._keep(donated)

  def _keep(self, donated: frozenset[int]) -> None:
    """Keeps results to the end, and drops those in donated arguments."""
    root = self._values[self._scope.computation.root]
    parts = root.parts or (root,)
    for index, part in enumerate(parts):
      for buffer in part.all:
        self._last[buffer] = len(self._list)
        if index in donated and self._scope.parent is None:
          self._first.pop(buffer, None)

  def _name(self, buffer: int, user: module_lib.Instruction) -> None:
    """Names a buffer of the compiler's own after the operation that uses it."""
    unnamed = self._buffers[buffer]
    if '/' not in unnamed.op_name and '/' in user.op_name:
      self._buffers[buffer] = dataclasses.replace(unnamed, op_name=user.op_name)

  def _name_carried(self, loop: module_lib.Instruction) -> None:
    """Names constants that a loop carries after what the loop writes there."""
    parts = self._values[loop.operands[0]].parts or ()
    for index, part in enumerate(parts):
      for buffer in part.buffers & self._constant:
        op_name = _written_by(self._scope.module, loop, index)
        if op_name:
          self._buffers[buffer] = dataclasses.replace(
            self._buffers[buffer], op_name=op_name
          )

  def _new(
    self, instruction: module_lib.Instruction, place: int, type_: str
  ) -> _Value:
    size = memory_traffic.main_bytes(type_)
    if not size:
      return _NONE
    number = len(self._buffers)
    self._buffers[number] = Buffer(size, instruction.op_name, type_)
    self._first[number] = self._last[number] = place
    if instruction.op == 'broadcast':
      self._constant.add(number)
    return _Value(None, frozenset([number]))

  def _value(self, instruction: module_lib.Instruction, place: int) -> _Value:
    op, operands = instruction.op, instruction.operands
    values = [self._values.get(name, _NONE) for name in operands]
    if op in ('parameter', 'constant'):
      return _NONE  # The caller's.
    if op == 'tuple':
      return _Value(tuple(values), frozenset())
    if op == 'get-tuple-element':
      index = int(instruction.named('index'))
      parts = values[0].parts
      return values[0] if parts is None else parts[index]
    if op in _SAME:
      return values[0] if values else _NONE
    if op.endswith('-start') and instruction.type.startswith('('):
      return self._started(instruction, place, values)
    if op.endswith('-done'):
      return self._ended(op, values)
    if op == 'dynamic-update-slice':
      return values[0]
    if op == 'fusion':
      return self._fused(instruction, place)
    return self._array(instruction, place, instruction.type)

  def _array(
    self, instruction: module_lib.Instruction, place: int, type_: str
  ) -> _Value:
    """Returns new memory for an array, or for each element of a tuple."""
    if not type_.strip().startswith('('):
      return self._new(instruction, place, type_)
    parts = [
      self._array(instruction, place, t)
      for t in module_lib.elements(type_.strip())
    ]
    return _Value(tuple(parts), frozenset())

  def _started(
    self,
    instruction: module_lib.Instruction,
    place: int,
    operands: list[_Value],
  ) -> _Value:
    """Returns the value of an asynchronous start: operands and new memory."""
    if instruction.op == 'all-reduce-start':
      return self._array(instruction, place, instruction.type)
    types = module_lib.elements(instruction.type)
    filled = _FILLED.get(instruction.op, 1)
    kept = _Value(None, frozenset().union(*(value.all for value in operands)))
    parts = [kept] * len(types)
    parts[filled] = self._array(instruction, place, types[filled])
    return _Value(tuple(parts), frozenset())

  def _ended(self, op: str, operands: list[_Value]) -> _Value:
    """Returns the value of the end of an asynchronous operation."""
    parts = operands[0].parts if operands else None
    if parts is None or op == 'all-reduce-done':
      return operands[0] if operands else _NONE
    return parts[_FILLED.get(op.replace('-done', '-start'), 1)]

  def _fused(self, instruction: module_lib.Instruction, place: int) -> _Value:
    """Returns a fusion's value; an operand updated in place is its result."""
    inner = self._scope.enter(
      instruction.callees[0], instruction, instruction.operands
    )
    parameters = inner.computation.instructions
    parts = []
    updated, _ = memory_traffic.updates(inner)
    for type_, name in zip(
      module_lib.elements(instruction.type), updated, strict=True
    ):
      if name is None:
        parts.append(self._array(instruction, place, type_))
      else:
        operand = instruction.operands[int(parameters[name].literal)]
        parts.append(self._values.get(operand, _NONE))
    whole = not instruction.type.startswith('(')
    return parts[0] if whole else _Value(tuple(parts), frozenset())

  def peak(self) -> list[Buffer]:
    """Returns the buffers live at the peak, inside its loops and calls too."""
    starts: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for buffer, first in self._first.items():
      starts.setdefault(first, []).append(buffer)
      ends.setdefault(self._last[buffer], []).append(buffer)
    live: dict[int, None] = {}
    size = largest = 0
    at_largest: list[Buffer] = []
    for place, instruction in enumerate(self._list):
      for buffer in starts.get(place, []):
        live[buffer] = None
        size += self._buffers[buffer].bytes
      inner = self._inner(instruction)
      now = size + sum(b.bytes for b in inner)
      if now > largest:
        largest = now
        at_largest = [self._buffers[b] for b in live] + inner
      for buffer in ends.get(place, []):
        if buffer in live:
          del live[buffer]
          size -= self._buffers[buffer].bytes
    return at_largest

  def _inner(self, instruction: module_lib.Instruction) -> list[Buffer]:
    if instruction.op not in _ENTERED:
      return []
    peaks = [
      _Walk(scope).peak()
      for scope in execution.callees(self._scope, instruction)
    ]
    return max(peaks, key=lambda p: sum(b.bytes for b in p), default=[])


def _written_by(
  module: module_lib.Module, loop: module_lib.Instruction, index: int
) -> str:
  """Returns the op_name of the operation that writes to a carried element.

  Args:
    module: the program.
    loop: the `while`. The operation may lie in a loop within it.
    index: place of the element in the tuple that the loop carries.

  Returns:
    The op_name, or '' if the loop leaves the element as it is.
  """
  body = module.computations[loop.named('body')]
  name = _element(body, body.root, index)
  while name is not None:
    instruction = body.instructions[name]
    if instruction.op in _COPIES:
      name = instruction.operands[0]
      continue
    if instruction.op != 'get-tuple-element':
      return '' if instruction.op == 'parameter' else instruction.op_name
    source = body.instructions[instruction.operands[0]]
    place = int(instruction.named('index'))
    if source.op == 'parameter':
      return ''
    if source.op != 'while':
      return source.op_name
    inner = _written_by(module, source, place)
    if inner:
      return inner
    name = _element(body, source.operands[0], place)
  return ''


def _element(body: module_lib.Computation, name: str, index: int) -> str | None:
  """Returns the name of a tuple's element; None if `name` is no `tuple`."""
  source = body.instructions[name]
  return source.operands[index] if source.op == 'tuple' else None
