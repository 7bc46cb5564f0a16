"""A corpus from .txt and .jsonl files, each also as .gz."""

from collections.abc import Iterator
import glob
import gzip
import hashlib
import json
import math
import os
import re
from typing import Any
import zlib

from t2x import reading
from t2x.data import documents as documents_lib

_SUFFIXES = ('.txt', '.jsonl', '.txt.gz', '.jsonl.gz')
# A long .txt file (a book, or a whole corpus) becomes several documents, so
# that a part of it can be held out.
_MAX_CHARS = 20_000


def find(files: str) -> list[str]:
  """Returns the sorted paths that comma-separated globs match.

  Raises:
    ValueError: if there are no globs, a glob matches nothing, a file is of
      another type, or its name is not UTF-8.
  """
  patterns = [p.strip() for p in files.split(',') if p.strip()]
  if not patterns:
    raise ValueError(
      f'data.files={files!r} is empty; source text_files needs '
      "comma-separated globs. Set for example data.files='DIR/*.txt'."
    )
  paths = set()
  for pattern in patterns:
    matches = glob.glob(os.path.expanduser(pattern), recursive=True)
    matches = [m for m in matches if os.path.isfile(m)]
    if not matches:
      raise ValueError(
        f'data.files: {pattern!r} matches no file (working directory '
        f'{os.getcwd()!r}). Correct the path, or quote the glob so that the '
        'shell leaves it alone.'
      )
    paths.update(matches)
  for path in sorted(paths):
    try:
      path.encode()
    except UnicodeEncodeError as error:
      raise ValueError(
        f'data.files: the name {path!r} is not UTF-8. Rename the file.'
      ) from error
    if not path.endswith(_SUFFIXES):
      raise ValueError(
        f'data.files: cannot read {path!r}; expected one of '
        f'{", ".join(_SUFFIXES)}. Narrow the glob or convert the file.'
      )
  return sorted(paths)


def key(paths: list[str], text_field: str, target_field: str | None) -> str:
  """Returns a hash of the files' sizes and times, and of the fields' names.

  Args:
    paths: paths of the files.
    text_field: name of the field with the text.
    target_field: name of the field with the target text; None without pairs.
  """
  stats = [(os.path.abspath(p), os.stat(p)) for p in paths]
  facts = [(p, s.st_size, s.st_mtime_ns) for p, s in stats]
  facts = repr((facts, text_field, target_field))
  return hashlib.sha256(facts.encode('utf-8', 'surrogatepass')).hexdigest()[:16]


def read(
  paths: list[str], text_field: str, target_field: str | None
) -> Iterator[documents_lib.Document]:
  """Yields the documents of all files.

  Args:
    paths: paths of the files.
    text_field: name of the field with the text in .jsonl files.
    target_field: name of the field with the target text; None without pairs.

  Raises:
    ValueError: if a file is damaged, or a line has no such field.
  """
  root = os.path.commonpath(
    [os.path.dirname(os.path.abspath(p)) for p in paths]
  )
  for path in paths:
    name = os.path.relpath(os.path.abspath(path), root).replace(os.sep, '/')
    if path.endswith(('.jsonl', '.jsonl.gz')):
      yield from _read_jsonl(path, name, text_field, target_field)
    else:
      yield from _read_txt(path, name, target_field)


def _read_txt(
  path: str, name: str, target_field: str | None
) -> Iterator[documents_lib.Document]:
  if target_field is not None:
    raise ValueError(
      f'target_field={target_field!r} needs files with fields, but {path!r} '
      'holds nothing but text. Give .jsonl files for supervised pairs.'
    )
  text = reading.decode(_read_bytes(path), path)
  for i, part in enumerate(_parts(text)):
    yield documents_lib.Document(f'{name}#{i}' if i else name, part)


def _parts(text: str) -> Iterator[str]:
  """Yields parts of a long text, cut at blank lines or else at line ends."""
  for separator in ('\n\n', '\n'):
    if len(text) > _MAX_CHARS and separator in text:
      break
  else:
    yield text
    return
  part = ''
  for piece in re.findall(f'.*?{separator}+|.+$', text, flags=re.DOTALL):
    if part and len(part) + len(piece) > _MAX_CHARS:
      yield part
      part = ''
    part += piece
  yield part


def _read_jsonl(
  path: str, name: str, text_field: str, target_field: str | None
) -> Iterator[documents_lib.Document]:
  for i, line in reading.lines(_read_bytes(path), path):
    line = line.removeprefix('\ufeff')  # Concatenated files have it.
    if not line.strip():
      continue
    place = f'{path}:{i}'
    record, names = _record(line, place)
    fields = [_field(record, names, text_field, 'text_field', place)]
    if target_field is not None:
      fields.append(_field(record, names, target_field, 'target_field', place))
    yield documents_lib.Document(f'{name}:{i}', *fields)


def _record(line: str, place: str) -> tuple[dict[str, Any], list[str]]:
  """Returns the object of a line, and its field names with repetitions."""
  pairs: list[tuple[str, Any]] = []

  def keep(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    pairs[:] = fields  # The outermost object comes last.
    return dict(fields)

  remedy = 'A .jsonl file holds one object a line; correct or remove this line.'
  record = reading.parse_json(line, place, remedy, object_pairs_hook=keep)
  if not isinstance(record, dict):
    raise ValueError(
      f'{place}: expected a JSON object with fields, found '
      f'{type(record).__name__}. Write one object a line.'
    )
  return record, [name for name, _ in pairs]


def _field(
  record: dict[str, Any], names: list[str], field: str, setting: str, place: str
) -> str:
  if field not in record:
    raise ValueError(
      f'{place}: no field {field!r}; it has {sorted(record)}. Set '
      f'data.{setting} to one of these.'
    )
  if names.count(field) > 1:
    raise ValueError(
      f'{place}: field {field!r} stands there {names.count(field)} times. '
      'Correct or remove this line.'
    )
  value = record[field]
  if setting == 'target_field':
    value = label_text(value, f'{place}: field {field!r}')
  if not isinstance(value, str):
    raise ValueError(
      f'{place}: field {field!r} must be text, found '
      f'{type(value).__name__}. Set data.{setting} to a text field.'
    )
  try:
    value.encode('utf-8')
  except UnicodeEncodeError as error:
    raise ValueError(
      f'{place}: field {field!r} holds half of a surrogate pair at character '
      f'{error.start}, which is not text. Correct or remove this line.'
    ) from error
  return value


def label_text(value: object, place: str) -> str:
  """Returns a target or label as text; numbers and booleans as JSON writes.

  >>> [label_text(x, 'a.jsonl:1') for x in ('yes', True, 3, 0.50)]
  ['yes', 'true', '3', '0.5']

  Raises:
    ValueError: if it is of another type, or a number that is not finite.
  """
  if isinstance(value, str):
    return value
  is_number = isinstance(value, int) or (
    isinstance(value, float) and math.isfinite(value)
  )
  if not is_number:
    names = {type(None): 'null', list: 'a list', dict: 'an object'}
    raise ValueError(
      f'{place} is {names.get(type(value), value)}; a target or label is text, '
      'a finite number, true or false. Correct or remove this line, or set '
      'data.target_field to another field.'
    )
  return json.dumps(value)


def _read_bytes(path: str) -> bytes:
  try:
    if path.endswith('.gz'):
      with gzip.open(path) as file:
        return file.read()
    with open(path, 'rb') as file:
      return file.read()
  except (EOFError, zlib.error, gzip.BadGzipFile) as error:
    raise ValueError(
      f'{path}: damaged gzip file ({error}). Fetch or compress it again, or '
      'leave it out of data.files.'
    ) from error
