"""Values of a checkpoint's JSON files, checked one by one."""

from typing import Any

_SHOWN = 60  # Characters of a value in a message.
_MOST = 2**63  # Past every number that means something; NaN is not below.


class Wrong(ValueError):
  """A value that cannot be.

  Attributes:
    key: of the value.
  """

  def __init__(self, key: str, value: Any, needed: str):
    """Makes the message of one line; `needed` says what it must be."""
    self.key = key
    needed = needed.rstrip('.')
    super().__init__(f'{key}={shown(value)}; it must be {needed}.')


def shown(value: Any) -> str:
  """Returns a value as messages show it, in one line."""
  text = repr(value)
  return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + '...'


def token(key: str, value: Any, *, vocab_size: int) -> int:
  """Returns the id of a token.

  Raises:
    Wrong: it is none of the vocabulary.
  """
  if not _is_whole(value) or not 0 <= value < vocab_size:
    needed = f'a token id, 0 to {vocab_size - 1}'
    raise Wrong(key, value, needed)
  return value


def number(key: str, value: Any, *, whole: bool = False) -> Any:
  """Returns a finite number.

  Raises:
    Wrong: it is none.
  """
  if whole and not _is_whole(value):
    raise Wrong(key, value, 'a whole number')
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  if not is_number or not -_MOST < value < _MOST:
    raise Wrong(key, value, 'a number')
  return value


def flag(key: str, value: Any) -> bool | None:
  """Returns true, false or None.

  Raises:
    Wrong: it is something else.
  """
  if value is not None and not isinstance(value, bool):
    raise Wrong(key, value, 'true or false')
  return value


def _is_whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def within(
  key: str,
  value: Any,
  *,
  above: float,
  below: float = _MOST,
  whole: bool = False,
) -> Any:
  """Returns a number between two bounds, which it is not itself.

  Raises:
    Wrong: it is none.
  """
  kind = 'a whole number' if whole else 'a number'
  low = 0 if above < 0 else above
  words = f'{kind}, {low} or more' if above < 0 else f'{kind} above {low}'
  words = f'{words} and below {below}' if below < _MOST else words
  is_kind = _is_whole(value) if whole else not isinstance(value, bool)
  if not (isinstance(value, int | float) and is_kind and above < value < below):
    raise Wrong(key, value, words)
  return value
