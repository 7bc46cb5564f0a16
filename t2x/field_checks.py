"""Ranges of the fields of configs, with one message for all."""

import math
import re
from typing import Any


def least(config: Any, prefix: str, **least: float) -> None:
  """Raises ValueError where a field is below its least value; None passes.

  Args:
    config: a dataclass.
    prefix: start of the fields' dotted names, as in 'train.'.
    **least: smallest value of each field.
  """
  for name, low in least.items():
    value = getattr(config, name)
    if value is not None and not isinstance(value, int | float):
      raise ValueError(f'{prefix}{name}={value!r}; it is a number.')
    if value is not None and not value >= low:  # NaN is refused too.
      raise ValueError(f'{prefix}{name}={value}; it is {low} or more.')


def positive(config: Any, prefix: str, *names: str) -> None:
  """Raises ValueError where a field is not above 0 and finite; None passes."""
  for name in names:
    value = getattr(config, name)
    if value is not None and not 0 < value < math.inf:
      raise ValueError(f'{prefix}{name}={value}; it is above 0, and finite.')


def matches(
  config: object, prefix: str, name: str, pattern: str, form: str
) -> None:
  """Raises ValueError where a field's text has another form; None passes.

  Args:
    config: a dataclass.
    prefix: start of the field's dotted name, as in 'train.'.
    name: name of the field.
    pattern: regular expression of the whole text.
    form: words for that form, in the message: 'a time, as 24:00:00'.
  """
  value = getattr(config, name)
  if value is not None and not re.fullmatch(pattern, value):
    raise ValueError(f'{prefix}{name}={value!r}; it is {form}.')


def share(config: Any, prefix: str, *names: str) -> None:
  """Raises ValueError where a field is outside [0, 1); None passes."""
  for name in names:
    value = getattr(config, name)
    if value is not None and not 0.0 <= value < 1.0:
      raise ValueError(f'{prefix}{name}={value}; it is in [0, 1).')
