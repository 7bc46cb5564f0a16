"""What docstrings and annotations lack, by file and line.

python tests/docstrings.py [PATH ...]

prints every finding in the files of PATH (default t2x/), and counts by kind:

- `vague`: an entry of Args or Attributes that does not begin with a noun, but
  with a preposition or a question word ("of the rows.", "what to add."), or a
  summary that begins "Returns what";
- `undocumented`: a module, or a public class, function, method or property,
  without a docstring (a method that a documented base class defines needs none
  of its own);
- `parameters`, `results`: a parameter or result without an annotation;
- `any`: an annotation that is `Any` and nothing else.
"""

import ast
import collections
from collections.abc import Iterator
from collections.abc import Sequence
import functools
import pathlib
import re
import sys
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
KINDS = ('vague', 'undocumented', 'parameters', 'results', 'any')

# A noun stands before any of these.
_VAGUE = frozenset(
  'about above after along among around as at before beside between beyond by '
  'during except for from how if in inside into like near of off on onto out '
  'outside over past per so than that through to toward under until up upon '
  'what when where which who whose why with within without'.split()
)
_SECTION = re.compile(r'^(Args|Attributes|Returns|Yields|Raises):$')
_ENTRY = re.compile(r'^  (\*{0,2}\w+(?:, \*{0,2}\w+)*): ?(.*)$')
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


class Finding(NamedTuple):
  """One thing that is missing.

  Attributes:
    kind: one of `KINDS`.
    file: path from the root of the repository.
    line: number of the line, from 1.
    text: name and words in question.
  """

  kind: str
  file: str
  line: int
  text: str


def files(paths: Sequence[str] = ('t2x',)) -> list[pathlib.Path]:
  """Returns the Python files of some files and folders of the repository."""
  found = []
  for name in paths:
    path = ROOT / name
    found += sorted(path.rglob('*.py')) if path.is_dir() else [path]
  return found


def findings(path: pathlib.Path) -> Iterator[Finding]:
  """Yields what a file lacks."""
  tree = ast.parse(path.read_text())
  file = str(path.relative_to(ROOT))
  if not ast.get_docstring(tree):
    yield Finding('undocumented', file, 1, path.stem)
  for node, owner in _definitions(tree):
    for kind, line, text in _of_definition(node, owner):
      yield Finding(kind, file, line, text)


def _definitions(
  tree: ast.AST, owner: ast.AST | None = None
) -> Iterator[tuple[ast.AST, ast.AST | None]]:
  for node in ast.iter_child_nodes(tree):
    if isinstance(node, (ast.ClassDef, *_FUNCTIONS)):
      yield node, owner
      yield from _definitions(node, node)
    else:
      yield from _definitions(node, owner)


def _of_definition(node, owner) -> Iterator[tuple[str, int, str]]:
  text = ast.get_docstring(node)
  name = f'{owner.name}.{node.name}' if owner else node.name
  if text:
    for line, words in _vague(text):
      yield 'vague', node.body[0].lineno + line, f'{name}: {words}'
  elif _is_public(node, owner) and not _is_inherited(node, owner):
    yield 'undocumented', node.lineno, name
  if isinstance(node, _FUNCTIONS):
    yield from _annotations(node, name)


def _vague(text: str) -> Iterator[tuple[int, str]]:
  lines = text.splitlines()
  if re.match(r'(Returns|Yields) what\b', lines[0]):
    yield 0, lines[0]
  section = ''
  for number, line in enumerate(lines):
    if match := _SECTION.match(line):
      section = match[1]
    elif line and not line.startswith(' '):
      section = ''
    elif section in ('Args', 'Attributes') and (match := _ENTRY.match(line)):
      words = re.findall(r"[\w'-]+", match[2].lower())
      if words and words[0] in _VAGUE:
        yield number, line.strip()


def _is_public(node, owner) -> bool:
  names = (node.name, owner.name if owner else '')
  if any(name.startswith('_') for name in names):
    return False
  return owner is None or isinstance(owner, ast.ClassDef)


def _is_inherited(node, owner) -> bool:
  """Whether a base class, by its name, documents the same method."""
  if not isinstance(owner, ast.ClassDef):
    return False
  bases = [ast.unparse(b).split('[')[0].split('.')[-1] for b in owner.bases]
  seen = set()
  while bases:
    base = bases.pop()
    if base in seen or base not in _classes():
      continue
    seen.add(base)
    for methods, above in _classes()[base]:
      if node.name in methods:
        return True
      bases += above
  return False


@functools.cache
def _classes() -> dict[str, list[tuple[set[str], list[str]]]]:
  """Returns documented methods and bases of the classes of each name."""
  found = collections.defaultdict(list)
  for path in files():
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.ClassDef):
        methods = {
          part.name
          for part in node.body
          if isinstance(part, _FUNCTIONS) and ast.get_docstring(part)
        }
        bases = [
          ast.unparse(b).split('[')[0].split('.')[-1] for b in node.bases
        ]
        found[node.name].append((methods, bases))
  return dict(found)


def parameters(node: ast.AST) -> list[ast.arg]:
  """Returns the parameters of a function that are to be annotated."""
  assert isinstance(node, _FUNCTIONS)
  args = node.args
  named = [*args.posonlyargs, *args.args]
  if named and named[0].arg in ('self', 'cls'):
    named = named[1:]
  return [*named, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]


def _annotations(node, name: str) -> Iterator[tuple[str, int, str]]:
  for arg in parameters(node):
    if arg.annotation is None:
      yield 'parameters', arg.lineno, f'{name}: {arg.arg}'
    elif ast.unparse(arg.annotation) == 'Any':
      yield 'any', arg.lineno, f'{name}: {arg.arg}'
  if node.returns is None and node.name != '__init__':
    yield 'results', node.lineno, name


def main(paths: Sequence[str]) -> None:
  counts = collections.Counter()
  for path in files(paths or ('t2x',)):
    for found in findings(path):
      counts[found.kind] += 1
      print(f'{found.file}:{found.line}: {found.kind}: {found.text}')
  print(', '.join(f'{counts[kind]} {kind}' for kind in KINDS))


if __name__ == '__main__':
  main(sys.argv[1:])
