"""Counts the bytes that a compiled program moves from and to device memory."""

import re

from t2x.hlo import execution
from t2x.hlo import module

# Operations that move nothing: they pass on what is in memory already, or other
# operations, such as those that they run, are counted for them.
_FREE = {
  'after-all',
  'async-start',
  'async-update',
  'bitcast',
  'call',
  'call-start',
  'conditional',
  'constant',
  'custom-call-start',
  'get-tuple-element',
  'iota',
  'opt-barrier',
  'parameter',
  'partition-id',
  'tuple',
  'while',
}
_ELSEWHERE = re.compile(r':[^}]*S\([1-9]\d*\)')
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?')
_SLICES = ('dynamic-slice', 'slice', 'gather')


def memory_bytes(text: str, trips: execution.Trips | None = None) -> int:
  """Returns the bytes that one device reads from its memory and writes to it.

  A fusion reads its operands and writes its results once. Of an operand that
  the fusion slices, or a fusion within it, only the slice counts; of an operand
  that it updates in place, only the update. Arrays in a TPU's vector memory do
  not count. An upper bound: an array that another operation has just brought
  into a cache counts again.

  Args:
    text: the program, as `compiled.as_text()` prints it.
    trips: trip counts of the loops whose text does not hold them.

  Raises:
    ValueError: a loop has an unknown number of trips.
  """
  return execution.total(text, _moved, trips)


def main_bytes(type_: str) -> int:
  """Returns the bytes of a printed type that lie in the device's memory."""
  total = 0
  for dtype, dims, layout in _ARRAY.findall(type_):
    if not _ELSEWHERE.search(layout):
      sizes = tuple(int(d.strip('<=')) for d in dims.split(',') if d)
      total += module.num_bytes(dtype, sizes)
  return total


def _moved(
  scope: execution.Scope, instruction: module.Instruction
) -> int | None:
  """Returns the bytes that an instruction moves; None if it is free."""
  op = instruction.op
  if op in _FREE or op.endswith('-done') or _in_fusion(scope):
    return None
  size = _of_fusion if op == 'fusion' else _of_operation
  return size(scope, instruction)


def _in_fusion(scope: execution.Scope | None) -> bool:
  while scope is not None:
    if scope.caller is not None and scope.caller.op == 'fusion':
      return True
    scope = scope.parent
  return False


def _of_operation(
  scope: execution.Scope, instruction: module.Instruction
) -> int:
  op, operands = instruction.op, instruction.operands
  if op in _SLICES:
    return 2 * main_bytes(instruction.type)
  if op == 'dynamic-update-slice':
    return 2 * main_bytes(scope.type_of(operands[1]))
  read = sum(main_bytes(scope.type_of(name)) for name in operands)
  if op.endswith('-start'):  # Its type names its operands again.
    return max(read, main_bytes(instruction.type))
  return read + main_bytes(instruction.type)


def _of_fusion(scope: execution.Scope, instruction: module.Instruction) -> int:
  inner = scope.enter(instruction.callees[0], instruction, instruction.operands)
  body = inner.computation.instructions
  updated, total = updates(inner)
  for type_, name in zip(
    module.elements(instruction.type), updated, strict=True
  ):
    total += 0 if name else main_bytes(type_)
  for name, parameter in body.items():
    if parameter.op != 'parameter' or name in updated:
      continue
    whole = main_bytes(
      scope.type_of(instruction.operands[int(parameter.literal)])
    )
    total += min(whole, _read(inner, name, whole))
  return total


def _read(inner: execution.Scope, name: str, whole: int) -> int:
  """Returns the bytes that a fusion, and those within it, read of an array."""
  total = 0
  users = [
    user
    for user in inner.computation.instructions.values()
    if name in user.operands
  ]
  for user in users:
    if user.op in _SLICES:
      total += main_bytes(user.type)
    elif user.op == 'bitcast':
      total += _read(inner, user.name, whole)
    elif user.op == 'fusion':
      within = inner.enter(user.callees[0], user, user.operands)
      total += sum(
        _read(within, parameter.name, whole)
        for parameter in within.computation.instructions.values()
        if parameter.op == 'parameter'
        and user.operands[int(parameter.literal)] == name
      )
    else:
      return whole
  return total if users else whole


def updates(inner: execution.Scope) -> tuple[list[str | None], int]:
  """Returns the arrays that a fusion updates in place, and the bytes moved.

  Args:
    inner: scope of the fusion's computation.

  Returns:
    For each result the name of the parameter that it updates, or None if it is
    new memory; and the bytes read and written by the updates.
  """
  body = inner.computation.instructions
  root = body[inner.computation.root]
  if root.op != 'tuple' and root.type.startswith('('):
    return [None] * len(module.elements(root.type)), 0
  names = root.operands if root.op == 'tuple' else [root.name]
  updated, moved = [], 0
  for name in names:
    update = _update(inner, name)
    updated.append(update and _target(body, update))
    if update and updated[-1]:
      moved += 2 * main_bytes(body[update.operands[1]].type)
  return updated, moved


def _update(inner: execution.Scope, name: str) -> module.Instruction | None:
  """Returns the `dynamic-update-slice` that computes a value, or None."""
  _, source, _ = execution.resolve(inner, name)
  inside = source.name in inner.computation.instructions
  return source if inside and source.op == 'dynamic-update-slice' else None


def _target(
  body: dict[str, module.Instruction], update: module.Instruction
) -> str | None:
  """Returns the parameter that an update writes to; None if it is not one."""
  target = body[update.operands[0]]
  while target.op in ('bitcast', 'copy', 'convert') and target.operands:
    target = body[target.operands[0]]
  return target.name if target.op == 'parameter' else None
