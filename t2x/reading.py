r"""Text and JSON that a user gives: what is wrong names the file and the line.

Files are UTF-8, local or remote; a byte order mark at their start is no text. A
line ends at \n or \r\n. What others end lines at as well (a form feed, U+0085,
U+2028, \r alone) stays in it.
"""

from collections.abc import Iterator
import json
import sys
from typing import Any

from etils import epath

from t2x import files

_MARK = '\ufeff'


def text(file: epath.PathLike) -> str:
  """Returns the text of a file as it stands there.

  Raises:
    ValueError: it is not UTF-8.
    OSError: it cannot be read.
  """
  return decode(files.path(file).read_bytes(), str(file))


def decode(data: bytes, file: str) -> str:
  """Returns the text of a file's bytes; ValueError if they are not UTF-8."""
  try:
    return data.decode('utf-8').removeprefix(_MARK)
  except UnicodeDecodeError as error:
    line = data.count(b'\n', 0, error.start) + 1
    raise _not_utf8(data[error.start], file, line, error.start) from error


def lines(data: bytes, file: str) -> Iterator[tuple[int, str]]:
  """Yields the number of each line, from 1, and the line without its end.

  Raises:
    ValueError: a line is not UTF-8.
  """
  offset = 0
  for number, line in enumerate(data.split(b'\n'), 1):
    try:
      decoded = line.decode('utf-8')
    except UnicodeDecodeError as error:
      place = error.start
      raise _not_utf8(line[place], file, number, offset + place) from error
    offset += len(line) + 1
    if offset <= len(data):  # Of the last line \r is no end.
      decoded = decoded.removesuffix('\r')
    yield number, decoded.removeprefix(_MARK) if number == 1 else decoded


def parse_json(data: str, place: str, remedy: str, **options: Any) -> Any:
  """Returns the value of JSON text.

  Args:
    data: the text.
    place: file, or file and line, that messages name.
    remedy: a sentence on what to do if it cannot be read.
    **options: options of `json.loads`.

  Raises:
    ValueError: it is not JSON, or more than Python reads.
  """
  try:
    return json.loads(data, **options)
  except RecursionError:
    problem, cause = 'it is nested too deeply to be read', None
  except json.JSONDecodeError as error:
    problem, cause = str(error), error
  except ValueError as error:
    digits = sys.get_int_max_str_digits()
    problem, cause = f'a number has more than {digits} digits', error
  raise ValueError(f'{place} is not JSON ({problem}). {remedy}') from cause


def json_object(file: epath.PathLike, remedy: str) -> dict[str, Any]:
  """Returns the object that a JSON file holds.

  Args:
    file: a path, local or remote.
    remedy: a sentence on what to do if it holds none.

  Raises:
    ValueError: it is not UTF-8, not JSON, or something else than an object.
    OSError: it cannot be read.
  """
  data = parse_json(text(file), str(file), remedy)
  if not isinstance(data, dict):
    raise ValueError(f'{file} holds no JSON object. {remedy}')
  return data


def _not_utf8(byte: int, file: str, line: int, offset: int) -> ValueError:
  return ValueError(
    f'{file}:{line}: not UTF-8: byte 0x{byte:02x} at offset {offset}. '
    "Convert it, for example with 'iconv -f LATIN1 -t UTF-8', or leave "
    'it out.'
  )
