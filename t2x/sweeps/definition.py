"""A sweep as one value, and the Python file that returns it."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from importlib import machinery
import pathlib
import sys
import traceback
import types
import typing
from typing import Any
from typing import Literal

from t2x import field_checks
from t2x.config import overrides
from t2x.sweeps import search as search_lib
from t2x.sweeps import space


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
  """What is varied, how, and by which result trials are compared.

  Attributes:
    parameters: fields that are varied: dotted name -> list of values, or
      `space.Uniform`, `LogUniform` or `Integers`. A name such as
      'model.embed_dim, model.num_layers' sets both, from a list of pairs.
    search: the way through the space.
    pruning: the rule by which trials end early; None lets all end.
    metric: name in the rows of metrics.jsonl that trials are compared by.
    direction: `minimize` or `maximize`.
    result: row that counts for a trial: its `last` with the metric, or its
      `best`.
    seeds: values of `train.seed` at each point, whose results are averaged; ()
      runs each point once, with the seed of the experiment.
    max_retries: times that a run which failed is started again.
  """

  parameters: Mapping[str, Any]
  search: search_lib.Search = search_lib.Grid()
  pruning: search_lib.Pruning | None = None
  metric: str = 'eval/validation/loss'
  direction: Literal['minimize', 'maximize'] = 'minimize'
  result: Literal['last', 'best'] = 'last'
  seeds: tuple[int, ...] = ()
  max_retries: int = 2

  def __post_init__(self) -> None:
    _check_types(self)
    parameters = {}
    for name, given in self.parameters.items():
      try:
        parameters[name] = space.of(given)
        for value in parameters[name].ends:
          space.text(value)
      except ValueError as error:
        raise ValueError(f'parameters[{name!r}]: {error}') from None
    object.__setattr__(self, 'parameters', parameters)
    if not parameters:
      raise ValueError(
        'The sweep has no parameters. Give at least one, as in '
        "parameters={'optim.learning_rate': (1e-3, 3e-3)}."
      )
    _check_fields(parameters, self.fields, self.seeds)
    field_checks.least(self, '', max_retries=0)
    if not all(0 <= seed < 2**32 for seed in self.seeds):
      raise ValueError(f'seeds={self.seeds}: each is from 0 to 2**32 - 1.')
    if not self.metric:
      raise ValueError("metric='': name one, such as 'eval/validation/loss'.")
    if len({*self.seeds}) < len(self.seeds):
      raise ValueError(f'seeds={self.seeds}: one stands there twice.')
    # Points are counted here, so that a space that cannot be fails at once.
    self.search.num_points(parameters)

  @property
  def fields(self) -> list[str]:
    """Config fields that it varies, by their dotted names."""
    return [f for name in self.parameters for f in space.fields_of(name)]

  @property
  def num_points(self) -> int:
    """Number of points, each of which runs once for each seed."""
    return self.search.num_points(self.parameters)

  def to_json(self) -> dict[str, Any]:
    """Returns the sweep as JSON values."""
    fields = {
      f.name: overrides.to_json(getattr(self, f.name))
      for f in dataclasses.fields(self)
      if f.name != 'parameters'
    }
    parameters = {n: space.to_json(p) for n, p in self.parameters.items()}
    return {'parameters': parameters, **fields}


def _check_types(sweep: Sweep) -> None:
  """Raises ValueError if a field has a value of another type."""
  if not isinstance(sweep.parameters, Mapping) or not all(
    isinstance(name, str) for name in sweep.parameters
  ):
    raise ValueError(
      f'parameters={sweep.parameters!r}; it is a dict from field names to '
      "values, as in {'optim.learning_rate': (1e-3, 3e-3)}."
    )
  hints = typing.get_type_hints(Sweep)
  for name in (f.name for f in dataclasses.fields(sweep)):
    value = getattr(sweep, name)
    if isinstance(value, type):
      raise ValueError(
        f'{name}={value.__name__}: it is a class, and one of its values is '
        f'needed: {name}=search.{value.__name__}(...).'
      )
    if name != 'parameters':
      overrides.from_json(hints[name], overrides.to_json(value), name)


def from_json(data: Mapping[str, Any]) -> Sweep:
  """Inverse of `Sweep.to_json`."""
  rest = {name: value for name, value in data.items() if name != 'parameters'}
  hints = typing.get_type_hints(Sweep)
  values = {n: overrides.from_json(hints[n], v, n) for n, v in rest.items()}
  parameters = {n: space.from_json(p) for n, p in data['parameters'].items()}
  return Sweep(parameters=parameters, **values)


def _check_fields(
  parameters: Mapping[str, Any], fields: Sequence[str], seeds: Sequence[int]
) -> None:
  for i, field in enumerate(fields):
    if field in fields[:i]:
      raise ValueError(f'parameters: {field!r} stands there twice.')
  if seeds and 'train.seed' in fields:
    raise ValueError(
      "parameters has 'train.seed', and seeds is given too: results of seeds "
      'are averaged, those of a parameter compared. Keep one of them.'
    )
  for name, parameter in parameters.items():
    if len(space.fields_of(name)) > 1 and not isinstance(
      parameter, space.OneOf
    ):
      raise ValueError(
        f'parameters[{name!r}] sets several fields, which needs a list of '
        f'tuples, and it is {parameter}.'
      )


def load(file: str, settings: Sequence[str] = ()) -> Sweep:
  """Returns the sweep of a Python file.

  Args:
    file: the path of a file with a function `get_sweep()`.
    settings: settings of the sweep's own fields, as `name=value`:
      'search.num_trials=30'.

  Raises:
    ValueError: no such file, one without `get_sweep`, or a sweep that cannot
      be.
  """
  path = pathlib.Path(file).expanduser()
  if not path.is_file():
    raise ValueError(
      f'--sweep={file}: there is no such file. It is a Python file with a '
      'function get_sweep(), such as experiments/sweeps/learning_rate.py.'
    )
  name = f'sweep_{path.stem}'
  loader = machinery.SourceFileLoader(name, str(path))
  module = types.ModuleType(name)
  sys.path.insert(0, str(path.parent))
  try:
    loader.exec_module(module)
    if not hasattr(module, 'get_sweep'):
      raise ValueError('it has no function get_sweep()')
    sweep = module.get_sweep()
    if not isinstance(sweep, Sweep):
      raise ValueError(
        f'get_sweep() returns {type(sweep).__name__}, and it must return a '
        't2x.sweeps.definition.Sweep'
      )
    changes = overrides.parse_settings(
      settings, 'sweep_set', 'search.num_trials=50'
    )
    return overrides.override(sweep, changes)
  except (Exception, SystemExit) as error:
    raise ValueError(f'--sweep={file}: {_where(error, path)}') from error
  finally:
    sys.path.remove(str(path.parent))


def _where(error: BaseException, path: pathlib.Path) -> str:
  """Returns the line of a file that an error comes from, and its message."""
  kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
  if isinstance(error, SyntaxError):
    return f'line {error.lineno}: {kind}{error.msg}'
  frames = traceback.extract_tb(error.__traceback__)
  numbers = [f.lineno for f in frames if f.filename == str(path)]
  line = f'line {numbers[-1]}: ' if numbers else ''
  return f'{line}{kind}{error}'
