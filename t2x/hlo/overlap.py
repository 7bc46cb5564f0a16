"""Tells whether a collective is hidden behind computation.

A scheduled program starts a collective, does other things, and ends it. The
instructions between the start and the end run beside it. If there is no matrix
product among them, the device waits for the collective.
"""

from t2x.hlo import execution
from t2x.hlo import kernel_flops
from t2x.hlo import matmul_flops
from t2x.hlo import module

# Instructions that run a computation with a collective in it asynchronously.
_WITHIN = ('async-start', 'call-start', 'custom-call-start')


def is_hidden(scope: execution.Scope, instruction: module.Instruction) -> bool:
  """Whether products run between the start and the end of a collective.

  Args:
    scope: scope that the instruction is in.
    instruction: the collective, or its asynchronous start.
  """
  if instruction.op.endswith('-start'):
    return _computes_until(scope, instruction.name, '-done')
  caller, parent = scope.caller, scope.parent
  if caller is None or parent is None:
    return False
  if caller.op in _WITHIN:  # By another core or another stream.
    return _computes_until(parent, caller.name, '-done')
  if caller.op == 'fusion':
    # A TPU's collective in several fusions: the first may compute too.
    return _holds(scope.computation, 'AsyncCollectiveStart') and (
      _computes_until(parent, caller.name, 'fusion', itself=True)
    )
  return False


def _holds(computation: module.Computation, call: str) -> bool:
  """Whether a computation has a custom call of the compiler's own."""
  return any(
    f'"{call}"' in i.attributes for i in computation.instructions.values()
  )


def _computes_until(
  scope: execution.Scope, start: str, end: str, *, itself: bool = False
) -> bool:
  """Whether a product runs between an asynchronous start and its end.

  Args:
    scope: scope that the start is in.
    start: name of the instruction that starts the collective.
    end: suffix of the opcode that ends it; 'fusion' if a fusion does, after
      others that carry it on.
    itself: True if a product in the start counts too.
  """
  begun = False
  in_flight = {start}
  for name, instruction in scope.computation.instructions.items():
    if name == start:
      begun = True
      if itself and computes(scope, instruction):
        return True
      continue
    if not begun:
      continue
    if in_flight & {*instruction.operands}:
      if instruction.op in ('get-tuple-element', 'tuple', 'bitcast'):
        in_flight.add(name)
      elif end == 'fusion':
        if computes(scope, instruction):
          return True
        if _is_done(scope, instruction):
          return False
        in_flight.add(name)
        continue
      elif instruction.op.endswith(end):
        return False
    if computes(scope, instruction):
      return True
  return False


def _is_done(scope: execution.Scope, instruction: module.Instruction) -> bool:
  return any(
    _holds(inner.computation, 'AsyncCollectiveDone')
    for inner in execution.callees(scope, instruction)
  )


def computes(scope: execution.Scope, instruction: module.Instruction) -> bool:
  """Whether an instruction runs a matrix product, or a kernel of products."""
  if matmul_flops.flops_of(scope, instruction) or kernel_flops.flops_of(
    instruction
  ):
    return True
  return any(
    computes(inner, part)
    for inner in execution.callees(scope, instruction)
    for part in inner.computation.instructions.values()
  )
