"""Ranges of the fields of configs, with one message for all."""

import math
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
    if value is not None and not value >= low:  # NaN is refused too.
      raise ValueError(f'{prefix}{name}={value}; it is {low} or more.')


def positive(config: Any, prefix: str, *names: str) -> None:
  """Raises ValueError where a field is not above 0 and finite; None passes."""
  for name in names:
    value = getattr(config, name)
    if value is not None and not 0 < value < math.inf:
      raise ValueError(f'{prefix}{name}={value}; it is above 0, and finite.')


def share(config: Any, prefix: str, *names: str) -> None:
  """Raises ValueError where a field is outside [0, 1); None passes."""
  for name in names:
    value = getattr(config, name)
    if value is not None and not 0.0 <= value < 1.0:
      raise ValueError(f'{prefix}{name}={value}; it is in [0, 1).')
