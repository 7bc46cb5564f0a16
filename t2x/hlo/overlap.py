"""Whether a compiled program computes while it waits for an exchange.

A scheduled program starts an exchange, does other things, and ends it. What
lies between in its order runs beside it: an exchange with no product there is
waited for.
"""

from t2x.hlo import execution
from t2x.hlo import kernel_flops
from t2x.hlo import matmul_flops
from t2x.hlo import module

_WITHIN = ('async-start', 'call-start', 'custom-call-start')


def is_hidden(scope: execution.Scope, instruction: module.Instruction) -> bool:
  """Whether products run between the start and the end of a collective.

  Args:
    scope: where it stands.
    instruction: the collective, or what starts it.
  """
  if instruction.op.endswith('-start'):
    return _computes_until(scope, instruction.name, '-done')
  caller, parent = scope.caller, scope.parent
  if caller is None or parent is None:
    return False
  if caller.op in _WITHIN:  # An exchange by another core or another stream.
    return _computes_until(parent, caller.name, '-done')
  if caller.op == 'fusion':
    # A TPU's exchange in several fusions: the first may compute too.
    return _holds(scope.computation, 'AsyncCollectiveStart') and (
      _computes_until(parent, caller.name, 'fusion', itself=True)
    )
  return False


def _holds(computation: module.Computation, call: str) -> bool:
  """Whether one of the compiler's own calls is in a computation."""
  return any(
    f'"{call}"' in i.attributes for i in computation.instructions.values()
  )


def _computes_until(
  scope: execution.Scope, start: str, end: str, *, itself: bool = False
) -> bool:
  """Whether a product runs from an instruction to what ends it."""
  begun = False
  mine = {start}
  for name, instruction in scope.computation.instructions.items():
    if name == start:
      begun = True
      if itself and computes(scope, instruction):
        return True
      continue
    if not begun:
      continue
    if mine & {*instruction.operands}:
      if instruction.op in ('get-tuple-element', 'tuple', 'bitcast'):
        mine.add(name)
      elif end == 'fusion':
        if computes(scope, instruction):
          return True
        if _is_done(scope, instruction):
          return False
        mine.add(name)
        continue
      elif instruction.op.endswith(end):
        return False
    if computes(scope, instruction):
      return True
  return False


def _is_done(scope: execution.Scope, instruction: module.Instruction) -> bool:
  return any(
    _holds(inner.computation, 'AsyncCollectiveDone')
    for inner in execution.called(scope, instruction)
  )


def computes(scope: execution.Scope, instruction: module.Instruction) -> bool:
  """Whether an instruction holds a product, or a kernel of them."""
  if matmul_flops.flops_of(scope, instruction) or kernel_flops.flops_of(
    instruction
  ):
    return True
  return any(
    computes(inner, part)
    for inner in execution.called(scope, instruction)
    for part in inner.computation.instructions.values()
  )
