"""Docstrings as Markdown, for the documentation site.

t2x's docstrings are text to read in an editor: Google's sections, backticks,
and indented lines that are laid out by hand. mkdocstrings takes all but the
sections for Markdown. As an extension of griffe (`AsMarkdown`), this module

- makes code blocks of doctests and of indented lines outside of sections;
- escapes brackets, which are no links here;
- splits entries of several names (`q, k, v: arrays of shape (B, T, H).`).
"""

from collections.abc import Iterator
import re
from typing import Any

import griffe  # pyright: ignore[reportMissingImports]

_SECTION = re.compile(
  r'(Args|Attributes|Raises|Returns|Yields|Examples?|Note|Notes):'
)
_JOINT = re.compile(r'  (\*{0,2}\w+(?:, \*{0,2}\w+)+): ?(.*)')
_CODE = re.compile(r'(`[^`]*`)')


class AsMarkdown(griffe.Extension):
  """Changes docstrings as griffe has read them."""

  def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
    """Changes the docstring of one object, if it has one."""
    del kwargs
    if obj.docstring is not None:
      obj.docstring.value = markdown(obj.docstring.value)


def markdown(doc: str) -> str:
  """Returns a docstring, cleaned of indentation, as Markdown with sections."""
  lines = []
  for is_text, block in _blocks(doc.split('\n')):
    if is_text:
      lines += escaped(block)
    elif _SECTION.fullmatch(block[0]):
      lines += escaped(_split_entries(block))
    else:
      lines += ['', '```python', *_dedented(block), '```', '']
  return '\n'.join(lines).strip('\n')


def _blocks(lines: list[str]) -> Iterator[tuple[bool, list[str]]]:
  """Yields whether lines are plain text, and the lines; in order.

  What is not plain text is a section with its heading, a doctest, or lines that
  are indented after an empty line or a colon.
  """
  i = start = 0
  while i < len(lines):
    before = lines[i - 1] if i else ''
    if _SECTION.fullmatch(lines[i]):
      end = _end(lines, i + 1, lambda line: not line or line.startswith(' '))
    elif lines[i].startswith('>>>'):
      end = _end(lines, i + 1, bool)
    elif lines[i].startswith('  ') and (not before or before.endswith(':')):
      end = _end(lines, i + 1, lambda line: not line or line.startswith('  '))
    else:
      i += 1
      continue
    while not lines[end - 1]:
      end -= 1
    yield True, lines[start:i]
    yield False, lines[i:end]
    i = start = end
  yield True, lines[start:]


def _end(lines: list[str], i: int, goes_on: Any) -> int:
  while i < len(lines) and goes_on(lines[i]):
    i += 1
  return i


def _dedented(lines: list[str]) -> list[str]:
  least = min(len(s) - len(s.lstrip()) for s in lines if s)
  return [line[least:] for line in lines]


def escaped(lines: list[str]) -> list[str]:
  """Escapes brackets outside of code spans, which may go past a line's end."""
  parts = _CODE.split('\n'.join(lines))
  parts[::2] = [
    part.replace('[', '\\[').replace('<', '&lt;') for part in parts[::2]
  ]
  return ''.join(parts).split('\n')


def _split_entries(lines: list[str]) -> list[str]:
  """Returns a section with one name an entry."""
  found: list[str] = []
  names: list[str] = []
  text: list[str] = []

  def flush():
    for name in names:
      found.extend([f'  {name}: {text[0]}', *text[1:]])
    names.clear()

  for line in lines:
    if match := _JOINT.fullmatch(line):
      flush()
      names, text = match[1].split(', '), [match[2]]
    elif names and line.startswith('   '):
      text.append(line)
    else:
      flush()
      found.append(line)
  flush()
  return found
