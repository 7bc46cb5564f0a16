"""What a loop writes into the buffers that it carries."""

from t2x.plan import hlo

_SAME = ('bitcast', 'copy')


def writer(module: hlo.Module, loop: hlo.Instruction, index: int) -> str:
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
    if instruction.op in _SAME:
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
    inner = writer(module, source, place)
    if inner:
      return inner
    found = _element(body, source.operands[0], place)
  return ''


def _element(body: hlo.Computation, name: str, index: int) -> str | None:
  """Returns the instruction that is an element of a tuple, where it is told."""
  made = body.instructions[name]
  return made.operands[index] if made.op == 'tuple' else None
