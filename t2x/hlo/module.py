"""Parses the text of compiled programs, as XLA prints it on any platform."""

import dataclasses
import functools
import math
import re

# `/*index=5*/` stands before every fifth element of a tuple.
_COMMENT = re.compile(r'/\*.*?\*/')
_COMPUTATION = re.compile(r'(ENTRY )?%?([\w.\-]+) \(.*\{$')
_END = re.compile(r'\}(, execution_thread=.*)?$')
_INSTRUCTION = re.compile(r'\s+(ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r' ([a-z][a-z0-9\-]*)\(')
_SHAPE = re.compile(r'\b([a-z]\w*)\[([\d,<=]*)\]')
_CALLEES = re.compile(
  r'(?:calls|to_apply|(?:true|false)_computation)=%?([\w.\-]+)'
  r'|(?:branch|called)_computations=\{([^}]*)\}'
)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction of HLO: `name = type op(operands), attributes`.

  Attributes:
    name: name of its result, without `%`.
    type: type of its result, as printed: `f32[2,3]{1,0}`, or a tuple of such.
    op: opcode, such as `dot`.
    operands: names of the instructions whose results it uses.
    literal: text between the parentheses, as printed.
    attributes: text after the parentheses.
  """

  name: str
  type: str
  op: str
  operands: tuple[str, ...]
  literal: str
  attributes: str

  @property
  def op_name(self) -> str:
    """The path of the JAX operation that it came from, or ''."""
    match = re.search(r'op_name="([^"]*)"', self.attributes)
    return match[1] if match else ''

  @functools.cached_property
  def callees(self) -> tuple[str, ...]:
    """Names of the computations that it calls, except those of a loop."""
    names = []
    for one, many in _CALLEES.findall(self.attributes):
      names += [one] if one else re.findall(r'[\w.\-]+', many)
    return tuple(names)

  def named(self, attribute: str) -> str:
    """Returns the computation or number that an attribute holds."""
    match = re.search(rf'\b{attribute}=%?([\w.\-]+)', self.attributes)
    assert match, f'{self.name} has no {attribute}: {self.attributes}'
    return match[1]


@dataclasses.dataclass(frozen=True)
class Computation:
  """One computation of a program.

  Attributes:
    name: name of the computation, without `%`.
    instructions: instructions by name, in the order in which they are printed.
    root: name of the instruction whose result the computation returns.
  """

  name: str
  instructions: dict[str, Instruction]
  root: str


@dataclasses.dataclass(frozen=True)
class Module:
  """A program.

  Attributes:
    computations: computations by name.
    entry: name of the computation that runs first.
  """

  computations: dict[str, Computation]
  entry: str


def shapes(text: str) -> list[tuple[str, tuple[int, ...]]]:
  """Returns (dtype, dimensions) of every array in a printed type."""
  sizes = lambda dims: tuple(int(d.strip('<=')) for d in dims.split(',') if d)
  return [(dtype, sizes(dims)) for dtype, dims in _SHAPE.findall(text)]


def elements(type_: str) -> list[str]:
  """Returns the types in a printed tuple; a list of the type if it is none."""
  if not type_.startswith('('):
    return [type_]
  parts, depth, start = [], 0, 1
  for i, letter in enumerate(type_):
    depth += (letter in '({[') - (letter in ')}]')
    if (letter == ',' and depth == 1) or not depth:
      parts.append(type_[start:i].strip())
      start = i + 1
    if not depth:
      break
  return [part for part in parts if part]


def num_bytes(dtype: str, dims: tuple[int, ...]) -> int:
  """Returns the bytes of an array without padding.

  Args:
    dtype: type of an element as HLO writes it; `f8e4m3fn` takes one byte.
    dims: sizes of the dimensions.
  """
  width = re.match(r'[a-z]+(\d+)', dtype)
  bits = int(width[1]) if width else {'pred': 8}.get(dtype, 0)
  return -(-bits * math.prod(dims) // 8)


def parse(text: str) -> Module:
  """Parses a program.

  Args:
    text: the program, as `compiled.as_text()` prints it.

  Raises:
    ValueError: the text holds no ENTRY computation.
  """
  computations, entry, name = {}, None, None
  lines: list[str] = []
  for line in text.splitlines():
    if name is None:
      start = _COMPUTATION.match(line)
      if start:
        name, lines = start[2], []
        entry = name if start[1] else entry
    elif _END.match(line):
      computations[name] = _computation(name, lines)
      name = None
    elif _INSTRUCTION.match(line):
      lines.append(line)
    elif lines:  # A kernel's metadata has lines of its own.
      lines[-1] += line
  if entry is None:
    raise ValueError(
      'The text has no ENTRY computation; give what compiled.as_text() '
      f'returns. It starts with {text[:60]!r}.'
    )
  return Module(computations, entry)


def _computation(name: str, lines: list[str]) -> Computation:
  instructions, root = {}, ''
  for line in lines:
    start = _INSTRUCTION.match(line)
    assert start, line
    rest = _COMMENT.sub('', line[start.end() :])
    instructions[start[2]] = _instruction(start[2], rest)
    root = start[2] if start[1] else root
  return Computation(name, instructions, root)


def _instruction(name: str, rest: str) -> Instruction:
  # The type of a tuple holds spaces and parentheses.
  end = _closing(rest, 0) if rest.startswith('(') else rest.index(' ')
  op = _OPCODE.match(rest, end)
  assert op, rest
  close = _closing(rest, op.end() - 1)
  literal = rest[op.end() : close - 1]
  operands = tuple(re.findall(r'%([\w.\-]+)', literal))
  return Instruction(name, rest[:end], op[1], operands, literal, rest[close:])


def _closing(text: str, start: int) -> int:
  """Returns the index after the parenthesis that closes the one at `start`."""
  depth = 0
  for match in re.finditer(r'[()]', text[start:]):
    depth += 1 if match[0] == '(' else -1
    if not depth:
      return start + match.end()
  raise ValueError(f'A parenthesis stays open in {text[:200]!r}.')
