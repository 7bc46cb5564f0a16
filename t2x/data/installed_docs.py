"""A corpus of English prose from the documentation that Python installs.

It needs no download: docstrings, READMEs and package descriptions of the
standard library and of the packages that t2x needs at run time. Packages of
t2x's extras, and any others, are left out, so that installing them does not
change the corpus.
"""

import ast
from collections.abc import Iterator
import hashlib
from importlib import metadata
import inspect
import pathlib
import platform
import re
import sysconfig
import warnings

from packaging import requirements
from packaging import utils as packaging_utils

from t2x.data import documents as documents_lib

_ROOTS = (
  'absl-py',
  'array-record',
  'etils',
  'flax',
  'grain',
  'jax',
  'jaxlib',
  'numpy',
  'optax',
  'orbax-checkpoint',
  'rich',
  'scipy',
  'sentencepiece',
  'tensorboardx',
  'tensorflow-datasets',
)
_MIN_CHARS = 200
_SUFFIXES = ('.py', '.md', '.rst', '.txt')
_SKIPPED_DIRS = frozenset(
  ('test', 'tests', 'testing', 'site-packages', 'dist-packages', 'idlelib')
)
_LEGAL = re.compile(r'licen[cs]e|copying|notice|authors|third.?party', re.I)
# Matched in order, so that the end of a string is not taken for a start.
_STRING = re.compile(r'([rRuUbBfF]{0,2})("""|\'\'\')(.*?)(?<!\\)\2', re.DOTALL)
_STOP_WORDS = frozenset(
  'the of and to a in is for this that be with if are or as it by on an from '
  'not will can which at'.split()
)


def key() -> str:
  """Returns a hash of the Python version and the packages' versions."""
  names = [f'{n}=={d.version}' for n, d in sorted(_distributions().items())]
  facts = repr((platform.python_version(), names))
  return hashlib.sha256(facts.encode()).hexdigest()[:16]


def read() -> Iterator[documents_lib.Document]:
  """Yields one document for each file, in an order that is always the same.

  A passage that occurred before is left out (wrappers repeat the docstrings of
  the functions that they wrap).
  """
  seen = set()
  for name, path in dict(_files()).items():
    passages = []
    for passage in _passages(path):
      if passage not in seen and _is_prose(passage):
        seen.add(passage)
        passages.append(passage)
    if passages:
      yield documents_lib.Document(name, '\n\n'.join(passages) + '\n')


def _distributions() -> dict[str, metadata.Distribution]:
  """Returns the installed packages that `_ROOTS` need, by name."""
  distributions = {}
  todo: list[str] = list(_ROOTS)
  while todo:
    name = packaging_utils.canonicalize_name(todo.pop())
    if name in distributions:
      continue
    try:
      distributions[name] = metadata.distribution(name)
    except metadata.PackageNotFoundError:
      continue
    for line in distributions[name].requires or ():
      requirement = requirements.Requirement(line)
      if not requirement.marker or requirement.marker.evaluate({'extra': ''}):
        todo.append(requirement.name)
  return distributions


def _files() -> Iterator[tuple[str, pathlib.Path]]:
  """Yields the name (without machine paths) and path of each file."""
  stdlib = pathlib.Path(sysconfig.get_paths()['stdlib'])
  for path in sorted(stdlib.rglob('*.py')):
    parts = path.relative_to(stdlib).parts
    if not _SKIPPED_DIRS.intersection(parts):
      yield '/'.join(('python', *parts)), path
  for name, distribution in sorted(_distributions().items()):
    for file in sorted(distribution.files or ()):
      if file.name != 'METADATA' and file.suffix not in _SUFFIXES:
        continue
      if _SKIPPED_DIRS.intersection(file.parts) or '..' in file.parts:
        continue
      if file.name == 'METADATA':
        yield f'{name}/METADATA', pathlib.Path(str(file.locate()))
      elif not _LEGAL.search(str(file)):
        yield str(file), pathlib.Path(str(file.locate()))


def _passages(path: pathlib.Path) -> list[str]:
  """Returns the texts of a file that may be prose."""
  try:
    text = path.read_text(encoding='utf-8-sig')
  except (OSError, UnicodeDecodeError):
    return []  # Listed but removed, or old and not for us.
  if path.name == 'METADATA':
    return [text.partition('\n\n')[2].strip()]
  if path.name == 'topics.py' and path.parent.name == 'pydoc_data':
    return _python_reference(text)
  if path.suffix == '.py':
    return _docstrings(text)
  return [text.strip()]


def _docstrings(code: str) -> list[str]:
  """Returns the strings that stand alone as statements.

  Parsing the modules would take ten times as long as the rest of the build.
  """
  strings = []
  for match in _STRING.finditer(code):
    line = code[code.rfind('\n', 0, match.start()) + 1 : match.start()]
    if not line.strip() and len(match[3]) >= _MIN_CHARS:
      strings.append(_clean(match[0]))
  return strings


def _clean(literal: str) -> str:
  """Returns the text of a string literal, without its indentation."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore')  # Invalid escapes are not our business.
      text = ast.literal_eval(literal)
  except (SyntaxError, ValueError):
    return ''
  return inspect.cleandoc(text) if isinstance(text, str) else ''


def _python_reference(code: str) -> list[str]:
  """Returns the chapters of the language reference that pydoc carries."""
  for node in ast.parse(code).body:
    if isinstance(node, ast.Assign):
      return [t.strip() for t in ast.literal_eval(node.value).values()]
  return []


def _is_prose(text: str) -> bool:
  """Returns whether most of a text is English sentences."""
  if len(text) < _MIN_CHARS:
    return False
  words = re.findall(r'[a-z]+', text.lower())
  letters = sum(map(len, words))
  common = sum(w in _STOP_WORDS for w in words)
  return letters >= 0.55 * len(text) and common >= 0.12 * len(words)
