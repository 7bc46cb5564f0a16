"""Checks of single values in a checkpoint's JSON files."""

from collections.abc import Mapping
from typing import Any
from typing import TypeGuard

Hf = Mapping[str, Any]  # A parsed config.json of Hugging Face.

_SHOWN = 60  # Most characters of a value in a message.
_MOST = 2**63  # Above every meaningful number; NaN is not below it.


class Wrong(ValueError):
  """The error for an invalid value.

  Attributes:
    key: name of the value in its JSON object.
  """

  def __init__(self, key: str, value: object, needed: str):
    """Makes a message of one line.

    Args:
      key: name of the value in its JSON object.
      value: invalid value.
      needed: words for a valid value, which follow "it must be".
    """
    self.key = key
    needed = needed.rstrip('.')
    super().__init__(f'{key}={short_repr(value)}; it must be {needed}.')


def short_repr(value: object) -> str:
  """Returns a value as messages show it: one line, cut if it is long."""
  text = repr(value)
  return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + '...'


def token(key: str, value: object, *, vocab_size: int) -> int:
  """Returns a value that is a token id.

  Raises:
    Wrong: it is not an id of the vocabulary.
  """
  if not _is_whole(value) or not 0 <= value < vocab_size:
    needed = f'a token id, 0 to {vocab_size - 1}'
    raise Wrong(key, value, needed)
  return value


def number(key: str, value: object, *, whole: bool = False) -> Any:
  """Returns a value that is a finite number.

  Args:
    key: name of the value, for the error.
    value: value to check.
    whole: whether it must be an integer.

  Raises:
    Wrong: it is not such a number.
  """
  if whole and not _is_whole(value):
    raise Wrong(key, value, 'a whole number')
  if (
    isinstance(value, bool)
    or not isinstance(value, int | float)
    or not -_MOST < value < _MOST
  ):
    raise Wrong(key, value, 'a number')
  return value


def flag(key: str, value: object) -> bool | None:
  """Returns a value that is a boolean or None.

  Raises:
    Wrong: it is something else.
  """
  if value is not None and not isinstance(value, bool):
    raise Wrong(key, value, 'true or false')
  return value


def _is_whole(value: object) -> TypeGuard[int]:
  return isinstance(value, int) and not isinstance(value, bool)


def within(
  key: str,
  value: object,
  *,
  above: float,
  below: float = _MOST,
  whole: bool = False,
) -> Any:
  """Returns a value that is a number between two bounds, both excluded.

  Args:
    key: name of the value, for the error.
    value: value to check.
    above: lower bound; a negative one is shown as "0 or more" in the error.
    below: upper bound.
    whole: whether it must be an integer.

  Raises:
    Wrong: it is not such a number.
  """
  noun = 'a whole number' if whole else 'a number'
  low = 0 if above < 0 else above
  words = f'{noun}, {low} or more' if above < 0 else f'{noun} above {low}'
  words = f'{words} and below {below}' if below < _MOST else words
  is_type = _is_whole(value) if whole else not isinstance(value, bool)
  if not (isinstance(value, int | float) and is_type and above < value < below):
    raise Wrong(key, value, words)
  return value
