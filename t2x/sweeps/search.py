"""How a sweep goes through its space, and which trials it ends early.

Some searches know all their points before the first trial (`Grid`, `Zipped`,
`RandomSearch`, `LatinHypercube`); `Tpe` suggests one at a time, from the
results so far. Suggestions and pruning are Optuna's.
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import itertools
import math
from typing import Any
from typing import ClassVar

import numpy as np

from t2x import field_checks
from t2x.sweeps import space

Parameters = Mapping[str, space.Parameter]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
  """Every combination of the values; the last parameter changes fastest."""

  kind: ClassVar[str] = 'grid'

  def num_points(self, parameters: Parameters) -> int:
    """Returns the number of points.

    Raises:
      ValueError: a parameter is a range, which has no list of values.
    """
    return math.prod(map(len, _lists(parameters, 'a grid')))

  def points(self, parameters: Parameters) -> Iterator[space.Point]:
    """Yields the points, in the order in which they are tried."""
    lists = _lists(parameters, 'a grid')
    for values in itertools.product(*lists):
      yield dict(zip(parameters, values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Zipped:
  """The first values of all parameters, then the second ones, and so on."""

  kind: ClassVar[str] = 'zipped'

  def num_points(self, parameters: Parameters) -> int:
    """Returns the number of points.

    Raises:
      ValueError: a parameter is a range, or has another number of values.
    """
    lengths = {
      name: len(values)
      for name, values in zip(parameters, _lists(parameters, 'zipped values'))
    }
    if len({*lengths.values()}) > 1:
      counts = ', '.join(f'{name} has {n}' for name, n in lengths.items())
      raise ValueError(
        f'zipped parameters have as many values as each other: {counts}. '
        'Use search.Grid() for every combination.'
      )
    return next(iter(lengths.values()))

  def points(self, parameters: Parameters) -> Iterator[space.Point]:
    """Yields the points, in the order in which they are tried."""
    self.num_points(parameters)
    for values in zip(*_lists(parameters, 'zipped values')):
      yield dict(zip(parameters, values))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Drawn:
  """Fields of searches that draw points.

  Attributes:
    num_trials: number of points.
    seed: seed of what is drawn; the same seed draws the same points.
  """

  num_trials: int = 20
  seed: int = 0

  def __post_init__(self) -> None:
    field_checks.least(self, 'search.', num_trials=1, seed=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomSearch(_Drawn):
  """Points drawn independently (Bergstra and Bengio, 2012)."""

  kind: ClassVar[str] = 'random'

  def num_points(self, parameters: Parameters) -> int:
    """Returns the number of points."""
    del parameters
    return self.num_trials

  def points(self, parameters: Parameters) -> Iterator[space.Point]:
    """Yields the points, in the order in which they are tried."""
    generator = np.random.default_rng(self.seed)
    for _ in range(self.num_trials):
      yield _at(parameters, generator.random(len(parameters)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatinHypercube(_Drawn):
  """Points of which each takes another slice of every parameter's range.

  McKay, Beckman and Conover, 1979, as in `scipy.stats.qmc`.
  """

  kind: ClassVar[str] = 'latin_hypercube'

  def num_points(self, parameters: Parameters) -> int:
    """Returns the number of points."""
    del parameters
    return self.num_trials

  def points(self, parameters: Parameters) -> Iterator[space.Point]:
    """Yields the points, in the order in which they are tried."""
    from scipy.stats import qmc

    sampler = qmc.LatinHypercube(len(parameters), rng=self.seed)
    for shares in sampler.random(self.num_trials):
      yield _at(parameters, shares)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tpe(_Drawn):
  """Tree-structured Parzen estimator (Bergstra et al., 2011), by Optuna.

  Attributes:
    num_random: points that are drawn before any is suggested by results.
  """

  kind: ClassVar[str] = 'tpe'
  num_random: int = 10

  def __post_init__(self) -> None:
    super().__post_init__()
    field_checks.least(self, 'search.', num_random=1)

  def num_points(self, parameters: Parameters) -> int:
    """Returns the number of trials."""
    del parameters
    return self.num_trials

  def sampler(self, number: int) -> Any:
    """Returns Optuna's sampler for a trial.

    Its seed goes by the trial, so that a sweep that was interrupted suggests
    what it would have suggested.

    Args:
      number: number of the trial, from 0.
    """
    import optuna

    return optuna.samplers.TPESampler(
      n_startup_trials=self.num_random,
      multivariate=True,
      constant_liar=True,
      seed=int(
        np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
      ),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PopulationBased:
  """Runs that copy better ones as they go (Jaderberg et al., 2017).

  The steps of a run are divided among generations. After each, the worst runs
  take over the state of one of the best, with its values multiplied by a factor
  (of a list, its neighbour); the others go on. Each run of a generation is a
  trial with a workdir of its own, so that nothing is overwritten.

  Attributes:
    population: number of runs of each generation.
    generations: number of parts of a run's steps.
    share: share of the runs that is replaced, and of those that are copied.
    factors: factors of which one is drawn for each value.
    seed: seed of the first values and of all draws.
  """

  kind: ClassVar[str] = 'population'
  population: int = 8
  generations: int = 5
  share: float = 0.25
  factors: tuple[float, ...] = (0.8, 1.25)
  seed: int = 0

  def __post_init__(self) -> None:
    field_checks.least(self, 'search.', population=2, generations=2, seed=0)
    if not 0 < self.share <= 0.5:
      raise ValueError(f'search.share={self.share}; it is in (0, 0.5].')
    if not self.factors or not all(0 < f < math.inf for f in self.factors):
      raise ValueError(
        f'search.factors={self.factors}; they are above 0, and finite.'
      )

  def num_points(self, parameters: Parameters) -> int:
    """Returns the number of trials."""
    del parameters
    return self.population * self.generations

  def first(self, parameters: Parameters) -> list[space.Point]:
    """Returns the points of the first generation."""
    drawn = RandomSearch(num_trials=self.population, seed=self.seed)
    return list(drawn.points(parameters))

  def next(
    self,
    parameters: Parameters,
    before: Sequence[tuple[space.Point, float]],
    generation: int,
  ) -> list[tuple[int, space.Point]]:
    """Returns the parent and the point of each run of a generation.

    Args:
      parameters: the space.
      before: point and loss of each run of the generation before, where the
        least loss is the best.
      generation: number of the generation, from 1.
    """
    generator = np.random.default_rng([self.seed, generation])
    order = sorted(range(len(before)), key=lambda i: (before[i][1], i))
    num = max(round(len(before) * self.share), 1)
    best, worst = order[:num], set(order[-num:])
    result = []
    for i, (point, _) in enumerate(before):
      if i not in worst:
        result.append((i, point))
        continue
      parent = best[generator.integers(len(best))]
      changed = {
        name: space.moved(
          parameter,
          before[parent][0][name],
          self.factors[generator.integers(len(self.factors))],
        )
        for name, parameter in parameters.items()
      }
      result.append((parent, changed))
    return result


Planned = Grid | Zipped | RandomSearch | LatinHypercube
Search = Planned | Tpe | PopulationBased


@dataclasses.dataclass(frozen=True, kw_only=True)
class Median:
  """Ends a trial that is worse than the median of others at the same step.

  Attributes:
    num_complete: trials that end undisturbed before any is pruned.
    min_step: step up to which no trial is pruned.
  """

  kind: ClassVar[str] = 'median'
  num_complete: int = 4
  min_step: int = 0

  def __post_init__(self) -> None:
    field_checks.least(self, 'pruning.', num_complete=0, min_step=0)

  @property
  def first_step(self) -> int:
    """The first step after which a trial may end."""
    return self.min_step

  def pruner(self, num_steps: int) -> Any:
    """Returns Optuna's pruner for runs of `num_steps` updates."""
    import optuna

    del num_steps
    return optuna.pruners.MedianPruner(self.num_complete, self.min_step)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Halving:
  """Fields of successive halving.

  Attributes:
    min_steps: updates after which a trial may be pruned for the first time.
    reduction: the factor by which trials become fewer at each rung.
  """

  min_steps: int
  reduction: int = 3

  def __post_init__(self) -> None:
    field_checks.least(self, 'pruning.', min_steps=1, reduction=2)

  @property
  def first_step(self) -> int:
    """The first step after which a trial may end."""
    return self.min_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asha(_Halving):
  """Asynchronous successive halving (Li et al., 2020), by stopping.

  A trial that reaches `min_steps * reduction ** k` updates goes on if it is
  among the best 1 / `reduction` of those that have reached them.
  """

  kind: ClassVar[str] = 'asha'

  def pruner(self, num_steps: int) -> Any:
    """Returns Optuna's pruner for runs of `num_steps` updates."""
    import optuna

    del num_steps
    return optuna.pruners.SuccessiveHalvingPruner(
      min_resource=self.min_steps, reduction_factor=self.reduction
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hyperband(_Halving):
  """Several brackets of successive halving (Li et al., 2018)."""

  kind: ClassVar[str] = 'hyperband'

  def pruner(self, num_steps: int) -> Any:
    """Returns Optuna's pruner for runs of `num_steps` updates."""
    import optuna

    return optuna.pruners.HyperbandPruner(
      min_resource=self.min_steps,
      max_resource=num_steps,
      reduction_factor=self.reduction,
    )


Pruning = Median | Asha | Hyperband


def to_optuna(parameters: Parameters) -> dict[str, Any]:
  """Returns Optuna's distribution of each parameter."""
  from optuna import distributions

  def of(parameter: space.Parameter) -> Any:
    if isinstance(parameter, space.OneOf):
      return distributions.CategoricalDistribution(
        [optuna_value(value) for value in parameter.values]
      )
    if isinstance(parameter, space.Integers):
      _, high = parameter.ends
      return distributions.IntDistribution(
        parameter.low, high, step=parameter.step
      )
    log = isinstance(parameter, space.LogUniform)
    return distributions.FloatDistribution(
      parameter.low, parameter.high, log=log
    )

  return {name: of(parameter) for name, parameter in parameters.items()}


def optuna_value(value: space.Value) -> Any:
  """Returns a value as Optuna keeps it: tuples as their text."""
  return space.text(value) if isinstance(value, (list, tuple)) else value


def from_optuna(
  parameters: Parameters, params: Mapping[str, Any]
) -> space.Point:
  """Returns the point of the values that Optuna keeps."""

  def of(name: str, parameter: space.Parameter) -> space.Value:
    if isinstance(parameter, space.OneOf):
      kept = [optuna_value(value) for value in parameter.values]
      return parameter.values[kept.index(params[name])]
    return params[name]

  return {name: of(name, parameter) for name, parameter in parameters.items()}


def _at(parameters: Parameters, shares: Iterable[float]) -> space.Point:
  return {
    name: parameter.at(float(share))
    for (name, parameter), share in zip(parameters.items(), shares)
  }


def _lists(parameters: Parameters, what: str) -> list[tuple[space.Value, ...]]:
  for name, parameter in parameters.items():
    if not isinstance(parameter, space.OneOf):
      raise ValueError(
        f'{name!r} is {parameter}, and {what} need a list of values. List '
        'them, as with space.log_spaced(1e-4, 1e-2, 5), or choose '
        'search.RandomSearch.'
      )
  return [p.values for p in parameters.values() if isinstance(p, space.OneOf)]
