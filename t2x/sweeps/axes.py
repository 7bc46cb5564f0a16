"""How a sweep's parameters lie along the axes of charts."""

from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Literal

from t2x.sweeps import space

Scale = Literal['linear', 'log', 'category']

# Ratio of the ends from which a positive range is drawn by its logarithm.
_WIDE_RANGE = 100
_WIDE_LIST = 4  # Doubled values are as far from each other.
_MOST_TICKS = 8  # Values of a list that each get a tick.


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterAxis:
  """The axis of one parameter.

  Attributes:
    name: name of the parameter in the sweep.
    short: its name without the parts that tell it from no other.
    scale: `linear`, `log`, or `category`, on which a value lies at its place
      among the labels.
    low: least number on it.
    high: greatest number on it.
    whole: whether all numbers on it are whole.
    labels: texts of the values, of a category.
    ticks: numbers to label; () leaves the choice to the chart.
  """

  name: str
  short: str
  scale: Scale
  low: float
  high: float
  whole: bool = False
  labels: tuple[str, ...] = ()
  ticks: tuple[float, ...] = ()

  def place(self, value: space.Value) -> float:
    """Returns the number at which a value lies."""
    if self.scale == 'category':
      return self.labels.index(space.text(value))
    return value


def of(parameters: Mapping[str, space.Parameter]) -> list[ParameterAxis]:
  """Returns the axis of each parameter."""
  short = short_names(parameters)
  return [_axis(n, short[n], parameter) for n, parameter in parameters.items()]


def _axis(name: str, short: str, parameter: space.Parameter) -> ParameterAxis:
  if isinstance(parameter, space.OneOf):
    return _axis_of_list(name, short, parameter.values)
  low, high = parameter.ends
  is_log = isinstance(parameter, space.LogUniform)
  is_log = is_log or 0 < _WIDE_RANGE * low <= high
  scale = 'log' if is_log else 'linear'
  return ParameterAxis(
    name=name,
    short=short,
    scale=scale,
    low=low,
    high=high,
    whole=isinstance(parameter, space.Integers),
  )


def _axis_of_list(
  name: str, short: str, values: Sequence[space.Value]
) -> ParameterAxis:
  is_numeric = all(
    isinstance(v, (int, float)) and not isinstance(v, bool) for v in values
  )
  if not is_numeric or len(values) == 1:
    labels = tuple(map(space.text, values))
    return ParameterAxis(
      name=name,
      short=short,
      scale='category',
      low=0,
      high=len(labels) - 1,
      labels=labels,
    )
  low, high = min(values), max(values)
  return ParameterAxis(
    name=name,
    short=short,
    scale='log' if 0 < _WIDE_LIST * low <= high else 'linear',
    low=low,
    high=high,
    whole=all(isinstance(v, int) for v in values),
    ticks=tuple(sorted(values)) if len(values) <= _MOST_TICKS else (),
  )


def short_names(names: Iterable[str]) -> dict[str, str]:
  """Returns the shortest ends of parameters' names that tell them apart.

  >>> short_names(['model.mlp.hidden', 'optim.b1, optim.b2'])
  {'model.mlp.hidden': 'hidden', 'optim.b1, optim.b2': 'b1, b2'}
  """
  names = list(names)
  fields = [field for name in names for field in space.fields_of(name)]

  def short(field: str) -> str:
    parts = field.split('.')
    for i in range(len(parts) - 1, 0, -1):
      end = '.'.join(parts[i:])
      if sum(f == end or f.endswith(f'.{end}') for f in fields) == 1:
        return end
    return field

  return {name: ', '.join(map(short, space.fields_of(name))) for name in names}
