"""What a sweep varies: lists of values, and ranges to draw from.

A parameter is a config field, by its dotted name, with one of these kinds. A
point of the space has one value for each parameter.
"""

import collections
from collections.abc import Mapping
import dataclasses
import math
from typing import Any
from typing import ClassVar

import numpy as np

# A scalar of a config field, or one for each of several fields.
Value = Any
Point = Mapping[str, Value]


@dataclasses.dataclass(frozen=True)
class OneOf:
  """A list of values.

  Attributes:
    values: the values; for a parameter that names several fields ('a, b'), a
      tuple with one value for each of them.
  """

  kind: ClassVar[str] = 'one_of'
  values: tuple[Value, ...]

  def __post_init__(self) -> None:
    if not self.values:
      raise ValueError('a list of values is empty; give it at least one.')
    counts = collections.Counter(map(text, self.values))
    for value, count in counts.items():
      if count > 1:
        raise ValueError(f'{value} stands {count} times among the values.')

  def at(self, share: float) -> Value:
    """Returns the value at a share in [0, 1) of the list."""
    return self.values[int(share * len(self.values))]

  @property
  def ends(self) -> tuple[Value, ...]:
    """OneOf of which each is tried before a sweep begins: all of them."""
    return self.values


@dataclasses.dataclass(frozen=True)
class Uniform:
  """A number between two others, each as likely as any other.

  Attributes:
    low: least value.
    high: greatest value.
  """

  kind: ClassVar[str] = 'uniform'
  low: float
  high: float

  def __post_init__(self) -> None:
    _check_range(self.low, self.high)
    _make_float(self)

  def at(self, share: float) -> float:
    """Returns the value at a share in [0, 1) of the range."""
    return self.low + share * (self.high - self.low)

  @property
  def ends(self) -> tuple[float, float]:
    """The least and the greatest value."""
    return self.low, self.high


@dataclasses.dataclass(frozen=True)
class LogUniform:
  """A positive number whose logarithm is uniform: for rates and scales.

  Attributes:
    low: least value, above 0.
    high: greatest value.
  """

  kind: ClassVar[str] = 'log_uniform'
  low: float
  high: float

  def __post_init__(self) -> None:
    _check_range(self.low, self.high)
    _make_float(self)
    if self.low <= 0:
      raise ValueError(f'low={self.low}; a logarithm needs it above 0.')

  def at(self, share: float) -> float:
    """Returns the value at a share in [0, 1) of the range's logarithms."""
    return self.low * (self.high / self.low) ** share

  @property
  def ends(self) -> tuple[float, float]:
    """The least and the greatest value."""
    return self.low, self.high


@dataclasses.dataclass(frozen=True)
class Integers:
  """A whole number between two others, both of which may come.

  Attributes:
    low: least value.
    high: greatest value.
    step: distance between neighbours, counted from `low`.
  """

  kind: ClassVar[str] = 'integers'
  low: int
  high: int
  step: int = 1

  def __post_init__(self) -> None:
    _check_range(self.low, self.high)
    if any(n != int(n) for n in (self.low, self.high, self.step)):
      raise ValueError(f'{self}: low, high and step are whole numbers.')
    if self.step < 1:
      raise ValueError(f'step={self.step}; it is 1 or more.')
    for name in ('low', 'high', 'step'):
      object.__setattr__(self, name, int(getattr(self, name)))
    if len(self) < 2:
      raise ValueError(f'{self} has one number alone.')

  def at(self, share: float) -> int:
    """Returns the value at a share in [0, 1) of the numbers."""
    return self.low + self.step * int(share * len(self))

  def __len__(self) -> int:
    return (self.high - self.low) // self.step + 1

  @property
  def ends(self) -> tuple[int, int]:
    """The least and the greatest value."""
    return self.low, self.low + self.step * (len(self) - 1)


Parameter = OneOf | Uniform | LogUniform | Integers


def of(parameter: object) -> Parameter:
  """Returns a parameter; a list or tuple is a `OneOf` of its items.

  Raises:
    ValueError: it is nothing that a sweep can vary.
  """
  if isinstance(parameter, Parameter):
    return parameter
  if isinstance(parameter, np.ndarray):
    parameter = parameter.tolist()
  if isinstance(parameter, (list, tuple)):
    return OneOf(tuple(map(_plain, parameter)))
  raise ValueError(
    f'{parameter!r} is neither a list of values nor OneOf, Uniform, '
    'LogUniform or Integers.'
  )


def _plain(value: Value) -> Value:
  """Returns a value without NumPy's types: np.logspace(...) lists such."""
  if isinstance(value, (list, tuple)):
    return tuple(map(_plain, value))
  return value.item() if isinstance(value, np.generic) else value


def moved(parameter: Parameter, value: Value, factor: float) -> Value:
  """Returns a value times a factor, within its range; of a list, a neighbour.

  Args:
    parameter: the parameter.
    value: its value.
    factor: the factor; below 1 the neighbour before, else the one after.
  """
  if isinstance(parameter, OneOf):
    at = parameter.values.index(value) + (1 if factor > 1 else -1)
    return parameter.values[min(max(at, 0), len(parameter.values) - 1)]
  low, high = parameter.ends
  if isinstance(parameter, Integers):
    steps = round((value * factor - low) / parameter.step)
    return min(max(low + steps * parameter.step, low), high)
  return min(max(value * factor, low), high)


def log_spaced(low: float, high: float, num: int) -> tuple[float, ...]:
  """Returns `num` numbers from `low` to `high` with equal ratios.

  They are rounded to four digits, so that tables show them whole.
  """
  if num < 2:
    raise ValueError(f'num={num}; it is 2 or more.')
  span = LogUniform(low, high)
  return tuple(float(f'{span.at(i / (num - 1)):.4g}') for i in range(num))


def fields_of(name: str) -> tuple[str, ...]:
  """Returns the config fields of a parameter: 'a, b' stands for both."""
  return tuple(part.strip() for part in name.split(','))


def settings_of(point: Point) -> dict[str, str]:
  """Returns a point as dotted name -> text, as --set takes them.

  Raises:
    ValueError: a parameter of several fields has another number of values.
  """
  result = {}
  for name, value in point.items():
    fields = fields_of(name)
    values = value if len(fields) > 1 else (value,)
    if not isinstance(values, (list, tuple)) or len(values) != len(fields):
      raise ValueError(
        f'{name!r} stands for {len(fields)} fields, and {value!r} is not one '
        'value for each. Write a tuple, such as (64, 2).'
      )
    result |= {field: text(v) for field, v in zip(fields, values)}
  return result


def text(value: Value) -> str:
  """Returns a value as --set takes it.

  Raises:
    ValueError: no field takes such a value.
  """
  if value is None:
    return 'none'
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, (int, str)):
    return str(value)
  if isinstance(value, float):
    return repr(value)
  if isinstance(value, (list, tuple)):
    return '(' + ','.join(map(text, value)) + ')'
  raise ValueError(
    f'{value!r} is a {type(value).__name__}; a value is a number, text, true '
    'or false, none, or a tuple of these.'
  )


def to_json(parameter: Parameter) -> dict[str, Any]:
  """Returns a parameter as JSON values, with the name of its kind."""
  values = {
    name: [*value] if isinstance(value, tuple) else value
    for name, value in dataclasses.asdict(parameter).items()
  }
  return {'kind': parameter.kind, **values}


def from_json(data: Mapping[str, Any]) -> Parameter:
  """Inverse of `to_json`."""
  kinds = {c.kind: c for c in (OneOf, Uniform, LogUniform, Integers)}
  values = {n: _tupled(v) for n, v in data.items() if n != 'kind'}
  return kinds[data['kind']](**values)


def _tupled(value: Value) -> Value:
  return tuple(map(_tupled, value)) if isinstance(value, list) else value


def _make_float(given: Uniform | LogUniform) -> None:
  """Makes the ends floats, as what is drawn between them is."""
  for name in ('low', 'high'):
    object.__setattr__(given, name, float(getattr(given, name)))


def _check_range(low: float, high: float) -> None:
  if not all(isinstance(end, int | float) for end in (low, high)):
    raise ValueError(f'low={low!r}, high={high!r}; they are numbers.')
  if not (math.isfinite(low) and math.isfinite(high) and low < high):
    raise ValueError(
      f'low={low}, high={high}; low is below high, and both are finite.'
    )
