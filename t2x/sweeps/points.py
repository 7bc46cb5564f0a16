"""Points of a sweep as configs: what each sets, and whether it can run."""

from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
import itertools
import json
from typing import Any

from t2x.config import experiment
from t2x.config import layout_advice
from t2x.config import overrides
from t2x.hardware import pods
from t2x.sweeps import definition
from t2x.sweeps import search
from t2x.sweeps import space

MOST_POINTS = 100_000  # Of a sweep.
_MOST_SHOWN = 10  # Of points that cannot run, in one message.
_MOST_CHECKED = 512  # Of combinations of a space that is searched.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
  """The devices of one run.

  Attributes:
    number: number of devices.
    num_slices: number of slices that they lie in.
    chip: name of their chip in `machines.CHIPS`; None where it is not known.
  """

  number: int
  num_slices: int = 1
  chip: str | None = None

  @classmethod
  def of_pod(cls, pod: pods.Pod) -> 'Devices':
    """Returns the devices of slices of TPUs."""
    return cls(
      number=pod.num_devices,
      num_slices=pod.num_slices,
      chip=pod.topology.chip,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
  """One run of a point: the whole of what it computes.

  Attributes:
    key: hash of the config; runs with the same one are the same run.
    settings: dotted name -> text of what differs from the experiment.
    config: the experiment with these settings.
    parent: key of the run whose state it begins with; None for new weights.
    stop_after: step after which it ends; None for its last.
  """

  key: str
  settings: Mapping[str, str]
  config: experiment.Experiment
  parent: str | None = None
  stop_after: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
  """Where the runs of a trial begin and end, if they are parts of longer ones.

  Attributes:
    parents: key of the run that each begins with, one for each seed; () for new
      weights.
    stop_after: step after which they end; None for their last.
    member: name of the trial among others that begin and end alike.
    first_step: step of the parents after which they begin.
  """

  parents: tuple[str, ...] = ()
  stop_after: int | None = None
  member: str = ''
  first_step: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class PointRuns:
  """A point, and the runs that it asks for.

  Attributes:
    point: value of each parameter.
    key: hash of the runs; a point with the same one is the same trial.
    runs: one run for each seed.
    origin: beginning and end of its runs; None for whole runs.
  """

  point: space.Point
  key: str
  runs: tuple[RunConfig, ...]
  origin: Origin | None = None


def key_of(
  config: experiment.Experiment, settings: Mapping[str, str] | None = None
) -> str:
  """Returns the hash of a config: 12 hexadecimal digits.

  When a run is looked at and where its data lies (`OUTER_SETTINGS`) does not
  make it another run, unless that is what a sweep varies.

  Args:
    config: the config.
    settings: settings that a sweep varies.
  """
  flat = overrides.flatten(overrides.to_json(config))
  outer = experiment.OUTER_SETTINGS
  kept = {
    name: value
    for name, value in flat.items()
    if name in (settings or ()) or not name.startswith(outer)
  }
  return _hash(json.dumps(kept, sort_keys=True))


def _hash(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def candidate(
  base: experiment.Experiment,
  sweep: definition.Sweep,
  point: space.Point,
  origin: Origin | None = None,
) -> PointRuns:
  """Returns the runs of a point.

  Args:
    base: the experiment without the point.
    sweep: the sweep.
    point: value of each parameter.
    origin: beginning and end of its runs; None for whole runs.

  Raises:
    ValueError: a name is no field, a value does not fit it, or the config
      refuses it.
  """
  own_part = origin or Origin()
  settings = space.settings_of(point)
  runs = []
  for seed in sweep.seeds or (None,):
    own = settings if seed is None else {**settings, 'train.seed': str(seed)}
    config = overrides.override(base, own)
    key = key_of(config, own)
    parent = own_part.parents[len(runs)] if own_part.parents else None
    stop = own_part.stop_after
    if stop is not None:
      key = _hash(f'{key} {parent} {stop} {own_part.member}')
    runs.append(
      RunConfig(
        key=key,
        settings=own,
        config=config,
        parent=parent,
        stop_after=stop,
      )
    )
  key = runs[0].key
  if len(runs) > 1:
    key = _hash(' '.join(run.key for run in runs))
  return PointRuns(point=point, key=key, runs=tuple(runs), origin=origin)


class Checker:
  """Whether points can run on some devices; what it has seen, it remembers.

  Points that differ in numbers alone, such as rates, are laid out alike.
  """

  def __init__(self, devices: Devices):
    self._devices = devices
    self._errors: dict[str, str | None] = {}

  def error_of(self, found: PointRuns) -> str | None:
    """Returns why a point cannot run, or None."""
    config = found.runs[0].config
    key = structure_key(config)
    if key not in self._errors:
      try:
        layout_advice.check(
          config, self._devices.number, num_slices=self._devices.num_slices
        )
        self._errors[key] = None
      except ValueError as error:
        self._errors[key] = str(error)
    return self._errors[key]


def structure_key(config: experiment.Experiment) -> str:
  """Returns a hash that configs of the same shapes and layouts share.

  What is left out has no say in them: rates, seeds, and how long a run is.
  """
  optim = type(config.optim)(clip_norm=config.optim.clip_norm)
  train = dataclasses.replace(
    config.train, seed=0, num_steps=1, num_tokens=None, num_epochs=None
  )
  return key_of(dataclasses.replace(config, optim=optim, train=train))


def check_fields(base: experiment.Experiment, sweep: definition.Sweep) -> None:
  """Checks the names and the types of a sweep's parameters, one by one.

  Args:
    base: the experiment.
    sweep: the sweep.

  Raises:
    ValueError: a name is no field (the closest is suggested), or a value does
      not fit its type.
  """
  for name, parameter in sweep.parameters.items():
    for value in parameter.ends:
      settings = space.settings_of({name: value})
      try:
        overrides.override(base, settings)
      except ValueError as error:
        message = str(error)
        if isinstance(parameter, (space.Uniform, space.LogUniform)):
          if 'the type int' in message:
            message += ' Use space.Integers for whole numbers.'
        if 'does not fit the type' in message or 'has no ' in message:
          raise ValueError(f'parameters[{name!r}]: {message}') from error
        # Values that only fit together with others are seen as points.


def combinations(sweep: definition.Sweep) -> Iterator[space.Point]:
  """Yields the points of a search that knows them, or else some of its space.

  Those of a search by results are all combinations of listed values, with the
  ends of ranges, as far as there are not too many.
  """
  if isinstance(sweep.search, search.PopulationBased):
    yield from sweep.search.first(sweep.parameters)
  if isinstance(sweep.search, search.Planned):
    yield from sweep.search.points(sweep.parameters)
    return
  lists = [parameter.ends for parameter in sweep.parameters.values()]
  for values in itertools.islice(itertools.product(*lists), _MOST_CHECKED):
    yield dict(zip(sweep.parameters, values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckedPoints:
  """The points of a sweep that are known before it begins.

  Attributes:
    possible: points that can run, each once.
    wrong: points that cannot, with the reason.
    num_repeated: points that compute what others do.
  """

  possible: tuple[space.Point, ...]
  wrong: tuple[tuple[space.Point, str], ...]
  num_repeated: int


def check(
  base: experiment.Experiment,
  sweep: definition.Sweep,
  devices: Devices,
) -> CheckedPoints:
  """Builds all points, and looks which of them can run.

  Args:
    base: the experiment.
    sweep: the sweep.
    devices: the devices of each run.

  Raises:
    ValueError: a name or a value is wrong, whatever the point, or there are
      too many points.
  """
  if sweep.num_points > MOST_POINTS:
    raise ValueError(
      f'The sweep has {sweep.num_points:,} points, and a study holds up to '
      f'{MOST_POINTS:,}. List fewer values, or draw some of them by '
      'search.RandomSearch(num_trials=...).'
    )
  check_fields(base, sweep)
  checker = Checker(devices)
  possible, wrong, keys, repeated = [], [], set(), 0
  for point in combinations(sweep):
    try:
      found = candidate(base, sweep, point)
      if found.key in keys:
        repeated += 1
        continue
      keys.add(found.key)
      error = checker.error_of(found)
    except ValueError as refused:
      error = str(refused)
    if error is None:
      possible.append(point)
    else:
      wrong.append((point, error))
  return CheckedPoints(
    possible=tuple(possible), wrong=tuple(wrong), num_repeated=repeated
  )


def refusal(wrong: Sequence[tuple[space.Point, str]], total: int) -> str:
  """Returns a message on points that cannot run.

  Args:
    wrong: points with their errors, from `check`.
    total: number of points of the sweep.
  """
  errors = {error for _, error in wrong}
  if len(wrong) == total and len(errors) == 1:
    return f'None of the {total} points can run: {wrong[0][1]}'
  lines = [
    f'  {describe(point)}: {error}' for point, error in wrong[:_MOST_SHOWN]
  ]
  more = len(wrong) - _MOST_SHOWN
  lines += [f'  and {more} more'] if more > 0 else []
  remedy = 'Change the space.'
  if len(wrong) < total:
    remedy = (
      'Change the space, or leave these points out with --skip_impossible.'
    )
  return '\n'.join(
    [f'{len(wrong)} of {total} points cannot run:', *lines, remedy]
  )


def describe(point: space.Point) -> str:
  """Returns a point as text: 'optim.learning_rate=0.001 train.seed=1'."""
  settings: dict[str, Any] = space.settings_of(point)
  return ' '.join(f'{name}={value}' for name, value in settings.items())
