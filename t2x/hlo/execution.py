"""Walks a compiled program and counts how often each instruction runs.

XLA notes the trip count of a loop in some programs (CPU, GPU) and not in others
(TPU); there it is read from the loop's condition.
"""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import fractions
import re
from typing import Any
from typing import NamedTuple

from t2x.hlo import module as module_lib

# Operations whose result is their operand; the first of a copy's results is
# the copy.
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
  """A computation at one place where it is called, with its arguments.

  Attributes:
    module: the program that it belongs to.
    computation: the instructions that run.
    parent: scope of the caller; None for the entry computation.
    operands: names of the caller's instructions that are its arguments.
    caller: the instruction that calls it; None for the entry computation.
  """

  module: module_lib.Module
  computation: module_lib.Computation
  parent: 'Scope | None' = None
  operands: tuple[str, ...] = ()
  caller: module_lib.Instruction | None = None

  def enter(
    self,
    name: str,
    caller: module_lib.Instruction,
    operands: Sequence[str],
  ) -> 'Scope':
    """Returns the scope of a computation that `caller` calls from here."""
    called = self.module.computations[name]
    return Scope(self.module, called, self, tuple(operands), caller)

  def type_of(self, name: str) -> str:
    """Returns the printed type of an instruction of this computation."""
    return self.computation.instructions[name].type

  @property
  def in_loop(self) -> bool:
    """Whether this is the body or the condition of a loop."""
    return self.caller is not None and self.caller.op == 'while'


# A number of runs. Of a loop whose trip count changes from one entry to the
# next, it is the mean.
Times = int | fractions.Fraction

# Returns the trip count of a loop whose text does not hold it; None if unknown.
# Of a conditional, the share of its runs in which the dearest branch runs; None
# is 1.
Trips = Callable[[module_lib.Instruction], Times | None]


class Executed(NamedTuple):
  """An item found in a program, run `times` times within `loops` loops."""

  found: Any
  times: Times
  loops: int


def executed(
  module: module_lib.Module,
  find: Callable[[Scope, module_lib.Instruction], Iterable[Any]],
  cost: Callable[[Any], float],
  trips: Trips | None = None,
) -> list[Executed]:
  """Lists the items that `find` returns, with how often each runs.

  Args:
    module: the program.
    find: a function from an instruction, and the scope that it is in, to the
      items of interest in it.
    cost: a function from an item to its cost. Of a conditional's branches only
      the dearest counts.
    trips: trip counts of the loops whose text does not hold them.

  Raises:
    ValueError: an item lies in a loop whose trip count is unknown.
  """
  scope = Scope(module, module.computations[module.entry])
  return _walk(scope, find, cost, trips)


def total(
  text: str,
  cost: Callable[[Scope, module_lib.Instruction], float | None],
  trips: Trips | None = None,
) -> int:
  """Returns the cost of a program, each instruction as often as it runs.

  Args:
    text: the program, as `compiled.as_text()` prints it.
    cost: a function from an instruction, and the scope that it is in, to its
      cost; None for an instruction that does not count.
    trips: trip counts of the loops whose text does not hold them.

  Raises:
    ValueError: an instruction that counts lies in a loop whose trip count is
      unknown.
  """

  def find(scope: Scope, instruction: module_lib.Instruction) -> list[float]:
    num = cost(scope, instruction)
    return [] if num is None else [num]

  costs = executed(module_lib.parse(text), find, lambda num: num, trips)
  return round(sum(num * times for num, times, _ in costs))


def callees(scope: Scope, instruction: module_lib.Instruction) -> list[Scope]:
  """Returns the computations that an instruction runs.

  Those of a loop are its body, then its condition; those of a conditional its
  branches.
  """
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


def _walk(
  scope: Scope,
  find: Callable[[Scope, module_lib.Instruction], Iterable[Any]],
  cost: Callable[[Any], float],
  trips: Trips | None,
) -> list[Executed]:
  result = []
  for instruction in scope.computation.instructions.values():
    result += [Executed(item, 1, 0) for item in find(scope, instruction)]
    parts = [
      _walk(inner, find, cost, trips) for inner in callees(scope, instruction)
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


def _times(items: list[Executed], num: Times, loops: int = 1) -> list[Executed]:
  """Returns items that run `num` times as often, within more loops."""
  return [Executed(item, num * n, inner + loops) for item, n, inner in items]


def _trips_of(
  scope: Scope, loop: module_lib.Instruction, trips: Trips | None
) -> Times:
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


# --- Values, followed to the instructions that compute them. ---


def resolve(
  scope: Scope, name: str, path: tuple[int, ...] = ()
) -> tuple[Scope, module_lib.Instruction, tuple[int, ...]]:
  """Follows a value through tuples, copies, fusions and calls.

  Args:
    scope: the scope that `name` is in.
    name: an instruction.
    path: indices of the element of its tuple that is meant, outermost first.

  Returns:
    The scope and the instruction that compute the value, and the rest of the
    path. A value that a loop carries is followed to the loop's parameter.
  """
  while True:
    source = scope.computation.instructions[name]
    if source.op == 'get-tuple-element':
      path = (int(source.named('index')), *path)
      name = source.operands[0]
    elif source.op == 'tuple' and path:
      name, path = source.operands[path[0]], path[1:]
    elif source.op in _PASSING and not path:
      name = source.operands[0]
    elif source.op in ('fusion', 'call'):
      scope = scope.enter(source.callees[0], source, source.operands)
      name = scope.computation.root
    elif source.op == 'parameter' and scope.parent and not scope.in_loop:
      name, scope = scope.operands[int(source.literal)], scope.parent
    else:
      return scope, source, path


def value(scope: Scope, name: str, path: tuple[int, ...] = ()) -> int | None:
  """Returns the value of an integer that is known before the program runs.

  None if it is not known. The arguments are those of `resolve`.
  """
  scope, source, path = resolve(scope, name, path)
  if source.op == 'constant' and not path:
    is_integer = re.fullmatch(r'-?\d+', source.literal)
    return int(source.literal) if is_integer else None
  if source.op in _ARITHMETIC:
    a, b = (value(scope, operand) for operand in source.operands)
    known = a is not None and b is not None
    return _ARITHMETIC[source.op](a, b) if known else None
  if source.op == 'parameter' and scope.in_loop and path:
    caller, parent = scope.caller, scope.parent
    assert caller and parent
    body = parent.enter(caller.named('body'), caller, caller.operands)
    _, carried, place = resolve(body, body.computation.root, path)
    if carried.op == 'parameter' and place == path:  # The loop keeps its value.
      return value(parent, caller.operands[0], path)
  return None


def trip_count(scope: Scope, loop: module_lib.Instruction) -> int | None:
  """Returns the number of times that a `while` runs its body; None if unknown.

  Either the compiler has noted it, or the condition compares a counter, to
  which the body adds a constant, with a constant.
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
  """Returns the place of the counter in the loop's tuple, and a constant.

  The constant is added to the counter before it is compared: XLA does so in a
  loop whose last trip it has taken out. The place is None if the compared value
  is no counter.
  """
  inner, source, path = resolve(scope, name)
  if source.op == 'add' and not path:
    for left, right in (source.operands, source.operands[::-1]):
      place, ahead = _carried(inner, left), value(inner, right)
      if place is not None and ahead is not None:
        return place, ahead
  return _carried(scope, name), 0


def _carried(scope: Scope, name: str) -> tuple[int, ...] | None:
  """Returns the place of a value in the loop's tuple; None if not there."""
  scope, source, path = resolve(scope, name)
  carried = source.op == 'parameter' and scope.in_loop
  return path if carried and path else None


def _step(body: Scope, place: tuple[int, ...]) -> int | None:
  """Returns the constant that one trip adds to the counter; None if none."""
  scope, source, path = resolve(body, body.computation.root, place)
  if source.op not in ('add', 'subtract') or path:
    return None
  first, second = source.operands
  if source.op == 'add' and _carried(scope, second) == place:
    first, second = second, first
  if _carried(scope, first) != place:
    return None
  step = value(scope, second)
  return -step if step and source.op == 'subtract' else step


def _trips(start: int, bound: int, step: int, direction: str) -> int | None:
  distance = bound - start
  if direction == 'NE':
    return distance // step if distance % step == 0 else None
  if (direction[0] == 'L') != (step > 0):
    return None  # It runs away from its bound.
  trips = distance // step + 1 if direction[1] == 'E' else -(-distance // step)
  return max(0, trips)
