"""What fills a device's memory where a compiled program needs most of it.

The buffers of a scheduled program are followed from where they are made to
their last use, through tuples, loops and updates in place. The compiler does
more to share memory, so that its own figure stands beside the sum; what is
gained is the answer to what is there, by the operations that made it.
"""

import dataclasses
import re

from t2x.hlo import execution
from t2x.hlo import memory_traffic
from t2x.hlo import module as module_lib

# Their results are their operands.
_SAME = {
  'bitcast',
  'get-tuple-element',
  'opt-barrier',
  'tuple',
  'while',
}
# Which element of what starts an exchange or a copy is filled by it.
_FILLED = {'copy-start': 0}
_COPIES = ('bitcast', 'copy')  # Of what a loop writes, elsewhere.
_ENTERED = ('call', 'conditional', 'while')


@dataclasses.dataclass(frozen=True)
class Buffer:
  """Some memory that the program takes for a while.

  Attributes:
    bytes: unpadded.
    op_name: path of the JAX operation that filled or used it first, or ''; of
      a constant that a loop carries, what is written over it there.
    type: as printed, of all that made it.
  """

  bytes: int
  op_name: str
  type: str


@dataclasses.dataclass(frozen=True)
class _Value:
  """Buffers of an instruction's result: of each element of a tuple."""

  parts: tuple['_Value', ...] | None
  own: frozenset[int]

  @property
  def all(self) -> frozenset[int]:
    if self.parts is None:
      return self.own
    return self.own.union(*(part.all for part in self.parts))


_NONE = _Value(None, frozenset())


def at_peak(text: str) -> list[Buffer]:
  """Returns the temporary buffers that are there at the fullest moment.

  Arguments of the program are left out, and so are results that take their
  place.

  Args:
    text: of `compiled.as_text()`, of a scheduled program.
  """
  module = module_lib.parse(text)
  donated = _donated(text)
  scope = execution.Scope(module, module.computations[module.entry])
  return _Walk(scope, donated).peak()


def _donated(text: str) -> frozenset[int]:
  """Returns the places of results that lie where an argument was."""
  head = text.partition('\n')[0]
  start = head.find('input_output_alias={')
  if start < 0:
    return frozenset()
  found = re.findall(r'\{(\d+)\}: \(', head[start:])
  return frozenset(int(place) for place in found)


class _Walk:
  """One computation, from its first instruction to its last."""

  def __init__(
    self, scope: execution.Scope, donated: frozenset[int] = frozenset()
  ):
    self._scope = scope
    self._list = [*scope.computation.instructions.values()]
    self._values: dict[str, _Value] = {}
    self._buffers: dict[int, Buffer] = {}
    self._born: dict[int, int] = {}
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
    """Results stay; those in an argument's place take none."""
    root = self._values[self._scope.computation.root]
    parts = root.parts or (root,)
    for place, part in enumerate(parts):
      for buffer in part.all:
        self._last[buffer] = len(self._list)
        if place in donated and self._scope.parent is None:
          self._born.pop(buffer, None)

  def _name(self, buffer: int, user: module_lib.Instruction) -> None:
    """What the compiler made itself is named by what uses it first."""
    own = self._buffers[buffer]
    if '/' not in own.op_name and '/' in user.op_name:
      self._buffers[buffer] = dataclasses.replace(own, op_name=user.op_name)

  def _name_carried(self, loop: module_lib.Instruction) -> None:
    """Zeros are named by what a loop puts in their place."""
    parts = self._values[loop.operands[0]].parts or ()
    for index, part in enumerate(parts):
      for buffer in part.own & self._constant:
        op_name = _written_by(self._scope.module, loop, index)
        if op_name:
          own = self._buffers[buffer]
          self._buffers[buffer] = dataclasses.replace(own, op_name=op_name)

  def _new(self, instruction, place: int, type_: str) -> _Value:
    size = memory_traffic.main_bytes(type_)
    if not size:
      return _NONE
    number = len(self._buffers)
    self._buffers[number] = Buffer(size, instruction.op_name, type_)
    self._born[number] = self._last[number] = place
    if instruction.op == 'broadcast':
      self._constant.add(number)
    return _Value(None, frozenset([number]))

  def _value(self, instruction: module_lib.Instruction, place: int) -> _Value:
    op, operands = instruction.op, instruction.operands
    given = [self._values.get(name, _NONE) for name in operands]
    if op in ('parameter', 'constant'):
      return _NONE  # The caller's.
    if op == 'tuple':
      return _Value(tuple(given), frozenset())
    if op == 'get-tuple-element':
      index = int(instruction.named('index'))
      parts = given[0].parts
      return given[0] if parts is None else parts[index]
    if op in _SAME:
      return given[0] if given else _NONE
    if op.endswith('-start') and instruction.type.startswith('('):
      return self._started(instruction, place, given)
    if op.endswith('-done'):
      return self._ended(op, given)
    if op == 'dynamic-update-slice':
      return given[0]
    if op == 'fusion':
      return self._fused(instruction, place)
    return self._array(instruction, place, instruction.type)

  def _array(self, instruction, place: int, type_: str) -> _Value:
    """New memory for an array, or for each element of a tuple."""
    if not type_.strip().startswith('('):
      return self._new(instruction, place, type_)
    parts = [
      self._array(instruction, place, t)
      for t in module_lib.elements(type_.strip())
    ]
    return _Value(tuple(parts), frozenset())

  def _started(self, instruction, place: int, given: list[_Value]) -> _Value:
    """What starts something names what it is given, and what it fills."""
    if instruction.op == 'all-reduce-start':
      return self._array(instruction, place, instruction.type)
    types = module_lib.elements(instruction.type)
    filled = _FILLED.get(instruction.op, 1)
    kept = _Value(None, frozenset().union(*(value.all for value in given)))
    parts = [kept] * len(types)
    parts[filled] = self._array(instruction, place, types[filled])
    return _Value(tuple(parts), frozenset())

  def _ended(self, op: str, given: list[_Value]) -> _Value:
    parts = given[0].parts if given else None
    if parts is None or op == 'all-reduce-done':
      return given[0] if given else _NONE
    return parts[_FILLED.get(op.replace('-done', '-start'), 1)]

  def _fused(self, instruction: module_lib.Instruction, place: int) -> _Value:
    """Results that update an operand in place are that operand."""
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
    """Returns the buffers at the fullest moment, of those inside it too."""
    starts: dict[int, list[int]] = {}
    ends: dict[int, list[int]] = {}
    for buffer, born in self._born.items():
      starts.setdefault(born, []).append(buffer)
      ends.setdefault(self._last[buffer], []).append(buffer)
    live: dict[int, None] = {}
    size = best = 0
    found: list[Buffer] = []
    for place, instruction in enumerate(self._list):
      for buffer in starts.get(place, []):
        live[buffer] = None
        size += self._buffers[buffer].bytes
      inner = self._inner(instruction)
      now = size + sum(b.bytes for b in inner)
      if now > best:
        best = now
        found = [self._buffers[b] for b in live] + inner
      for buffer in ends.get(place, []):
        if buffer in live:
          del live[buffer]
          size -= self._buffers[buffer].bytes
    return found

  def _inner(self, instruction: module_lib.Instruction) -> list[Buffer]:
    if instruction.op not in _ENTERED:
      return []
    peaks = [
      _Walk(scope).peak()
      for scope in execution.called(self._scope, instruction)
    ]
    return max(peaks, key=lambda p: sum(b.bytes for b in p), default=[])


def _written_by(
  module: module_lib.Module, loop: module_lib.Instruction, index: int
) -> str:
  """Returns the op_name of what a loop puts into an element that it carries.

  Args:
    module: the program.
    loop: the `while`; what loops within it write is theirs.
    index: of the element. '' is returned for one that is left as it is.
  """
  body = module.computations[loop.named('body')]
  found = _element(body, body.root, index)
  while found is not None:
    instruction = body.instructions[found]
    if instruction.op in _COPIES:
      found = instruction.operands[0]
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
    found = _element(body, source.operands[0], place)
  return ''


def _element(body: module_lib.Computation, name: str, index: int) -> str | None:
  """Returns the instruction that is an element of a tuple, where it is told."""
  made = body.instructions[name]
  return made.operands[index] if made.op == 'tuple' else None
