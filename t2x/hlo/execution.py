"""A compiled program as it runs: what is in it, and how often that runs.

XLA notes the trips of a loop in some programs (CPU, GPU) and not in others
(TPU); there they are read from the loop's condition.
"""

from collections.abc import Callable
from collections.abc import Iterable
import dataclasses
import fractions
import re
from typing import Any
from typing import NamedTuple

from t2x.hlo import module as module_lib

# They pass a value on; the first of a copy's results is the copy.
_PASSING = ('bitcast', 'convert', 'copy', 'copy-done', 'copy-start', 'reshape')
_ENTERED = ('async-start', 'call', 'custom-call', 'fusion')
# On another core, beside this one (libtpu 0.0.42, 0.0.52).
_ENTERED += ('call-start', 'custom-call-start')
_ARITHMETIC = {
  'add': lambda a, b: a + b,
  'subtract': lambda a, b: a - b,
  'multiply': lambda a, b: a * b,
}


@dataclasses.dataclass(frozen=True)
class Scope:
  """A computation where it is called: what its parameters stand for.

  Attributes:
    parent: the caller's scope; None for the entry.
    operands: the caller's instructions that are the parameters.
    caller: the instruction that calls it.
  """

  module: module_lib.Module
  computation: module_lib.Computation
  parent: 'Scope | None' = None
  operands: tuple[str, ...] = ()
  caller: module_lib.Instruction | None = None

  def enter(
    self, name: str, caller: module_lib.Instruction, operands
  ) -> 'Scope':
    called = self.module.computations[name]
    return Scope(self.module, called, self, tuple(operands), caller)

  def type_of(self, name: str) -> str:
    return self.computation.instructions[name].type

  @property
  def in_loop(self) -> bool:
    return self.caller is not None and self.caller.op == 'while'


# How often a loop runs, where it may run another number of times each time it
# is entered: the mean.
Times = int | fractions.Fraction

# The trips of a loop of which the program's text does not tell them, or None.
# Of a conditional, how often its dearest branch runs each time; None is 1.
Trips = Callable[[module_lib.Instruction], Times | None]


class Executed(NamedTuple):
  """Something found in a program, run `times` times within `loops` loops."""

  found: Any
  times: Times
  loops: int


def executed(
  module: module_lib.Module,
  find: Callable[[Scope, module_lib.Instruction], Iterable[Any]],
  cost: Callable[[Any], float],
  trips: Trips | None = None,
) -> list[Executed]:
  """Lists what `find` sees in a program, with how often it runs.

  Args:
    module: the program.
    find: returns what is of interest in an instruction.
    cost: of what was found; of a conditional's branches the dearest counts.
    trips: of loops of which the text does not tell them.

  Raises:
    ValueError: something of interest lies in a loop whose trips are unknown.
  """
  scope = Scope(module, module.computations[module.entry])
  return _walk(scope, find, cost, trips)


def called(scope: Scope, instruction: module_lib.Instruction) -> list[Scope]:
  """Returns the computations that an instruction runs: of a loop its body,
  then its condition; of a conditional its branches."""
  operands = instruction.operands
  if instruction.op == 'while':
    names = instruction.named('body'), instruction.named('condition')
    return [scope.enter(name, instruction, operands) for name in names]
  if instruction.op == 'conditional':
    return [
      scope.enter(name, instruction, operands[i + 1 : i + 2])
      for i, name in enumerate(instruction.callees)
    ]
  if instruction.op not in _ENTERED:
    return []
  enter = lambda name: scope.enter(name, instruction, operands)
  return [*map(enter, instruction.callees)]


def _walk(scope, find, cost, trips) -> list[Executed]:
  result = []
  for instruction in scope.computation.instructions.values():
    result += [Executed(item, 1, 0) for item in find(scope, instruction)]
    parts = [
      _walk(inner, find, cost, trips) for inner in called(scope, instruction)
    ]
    if not any(parts):
      continue
    if instruction.op == 'while':
      num = _trips_of(scope, instruction, trips)
      result += _times(parts[0], num) + _times(parts[1], num + 1)
    elif instruction.op == 'conditional':
      dearest = max(parts, key=lambda b: sum(cost(e[0]) * e[1] for e in b))
      share = trips(instruction) if trips else None
      result += _times(dearest, 1 if share is None else share, loops=0)
    else:
      result += sum(parts, [])
  return result


def _times(found: list[Executed], num: Times, loops: int = 1):
  """Returns what was found, so many times, within more loops."""
  return [Executed(item, num * n, inner + loops) for item, n, inner in found]


def _trips_of(scope, loop, trips: Trips | None) -> Times:
  known = trip_count(scope, loop)
  if known is None and trips:
    known = trips(loop)
  if known is None:
    raise ValueError(
      f'The loop {loop.name} in {scope.computation.name} '
      f'({loop.op_name or "no op_name"}) runs until its condition fails, and '
      'the text does not tell when, so what is in it cannot be counted. Give '
      'the loop a constant number of trips.'
    )
  return known


# --- Values, followed to where they are made. ---


def resolve(scope: Scope, name: str, path: tuple[int, ...] = ()):
  """Follows a value through tuples, copies, fusions and calls.

  Args:
    scope: where `name` stands.
    name: an instruction.
    path: the element of its tuple that is meant, outermost index first.

  Returns:
    The scope and the instruction that make the value, and the rest of the
    path: what a loop carries ends at the loop's parameter.
  """
  while True:
    found = scope.computation.instructions[name]
    if found.op == 'get-tuple-element':
      path = (int(found.named('index')), *path)
      name = found.operands[0]
    elif found.op == 'tuple' and path:
      name, path = found.operands[path[0]], path[1:]
    elif found.op in _PASSING and not path:
      name = found.operands[0]
    elif found.op in ('fusion', 'call'):
      scope = scope.enter(found.callees[0], found, found.operands)
      name = scope.computation.root
    elif found.op == 'parameter' and scope.parent and not scope.in_loop:
      name, scope = scope.operands[int(found.literal)], scope.parent
    else:
      return scope, found, path


def value(scope: Scope, name: str, path: tuple[int, ...] = ()) -> int | None:
  """Returns an integer that is known before the program runs, or None."""
  scope, found, path = resolve(scope, name, path)
  if found.op == 'constant' and not path:
    return int(found.literal) if re.fullmatch(r'-?\d+', found.literal) else None
  if found.op in _ARITHMETIC:
    a, b = (value(scope, operand) for operand in found.operands)
    known = a is not None and b is not None
    return _ARITHMETIC[found.op](a, b) if known else None
  if found.op == 'parameter' and scope.in_loop and path:
    caller, parent = scope.caller, scope.parent
    assert caller and parent
    body = parent.enter(caller.named('body'), caller, caller.operands)
    _, kept, where = resolve(body, body.computation.root, path)
    if kept.op == 'parameter' and where == path:  # The loop leaves it alone.
      return value(parent, caller.operands[0], path)
  return None


def trip_count(scope: Scope, loop: module_lib.Instruction) -> int | None:
  """Returns how often a `while` runs its body, or None where unknown.

  Either the compiler has noted it, or the condition compares a counter, that
  the body moves by a constant, with a constant.
  """
  noted = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if noted:
    return int(noted[1])
  enter = lambda part: scope.enter(loop.named(part), loop, loop.operands)
  condition, body = enter('condition'), enter('body')
  inner, compare, _ = resolve(condition, condition.computation.root)
  if compare.op != 'compare':
    return None
  direction = compare.named('direction')
  left, right = compare.operands
  place, ahead = _counter(inner, left)
  if place is None:
    left, right, (place, ahead) = right, left, _counter(inner, right)
    direction = {'L': 'G', 'G': 'L'}.get(direction[0], 'N') + direction[1]
  if place is None:
    return None
  start = value(scope, loop.operands[0], place)
  bound = value(inner, right)
  step = _step(body, place)
  if start is None or bound is None or not step:
    return None
  return _trips(start + ahead, bound, step, direction)


def _counter(scope: Scope, name: str) -> tuple[tuple[int, ...] | None, int]:
  """Returns the element of the loop's tuple that is compared, and how far on.

  Of a loop whose last trip was taken out of it, what it will be is compared.
  """
  inner, made, path = resolve(scope, name)
  if made.op == 'add' and not path:
    for own, other in (made.operands, made.operands[::-1]):
      place, ahead = _carried(inner, own), value(inner, other)
      if place is not None and ahead is not None:
        return place, ahead
  return _carried(scope, name), 0


def _carried(scope: Scope, name: str) -> tuple[int, ...] | None:
  """Returns which element of the loop's tuple a value is, if it is one."""
  scope, found, path = resolve(scope, name)
  carried = found.op == 'parameter' and scope.in_loop
  return path if carried and path else None


def _step(body: Scope, place: tuple[int, ...]) -> int | None:
  """Returns what one trip adds to the counter."""
  scope, made, path = resolve(body, body.computation.root, place)
  if made.op not in ('add', 'subtract') or path:
    return None
  first, second = made.operands
  if made.op == 'add' and _carried(scope, second) == place:
    first, second = second, first
  if _carried(scope, first) != place:
    return None
  step = value(scope, second)
  return -step if step and made.op == 'subtract' else step


def _trips(start: int, bound: int, step: int, direction: str) -> int | None:
  distance = bound - start
  if direction == 'NE':
    return distance // step if distance % step == 0 else None
  if (direction[0] == 'L') != (step > 0):
    return None  # It runs away from its bound.
  trips = distance // step + 1 if direction[1] == 'E' else -(-distance // step)
  return max(0, trips)
