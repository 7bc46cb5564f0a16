"""Scaling studies: sizes and tokens under budgets, and what they predict.

A study has runs to which a law is fitted (`scaling_law`), and larger ones that
are held out: their losses are predicted, and written down, before they begin.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import logging
import math
import re
from typing import Any

from t2x.config import experiment
from t2x.config import overrides
from t2x.data import input_pipeline
from t2x.models import flops
from t2x.models import sizes
from t2x.sweeps import definition
from t2x.sweeps import scaling_law
from t2x.sweeps import search
from t2x.sweeps import study as study_lib

_log = logging.getLogger(__name__)

FILE = 'scaling.json'
PREDICTION = 'prediction.json'
_MIN_STEPS = 20  # Fewer say little of the size.
_MAX_STEPS = 10**9


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScaledRun:
  """One run of a scaling study.

  Attributes:
    width: embed_dim.
    layers: number of layers.
    steps: updates.
    parameters: N, a sixth of the training FLOPs of each token.
    tokens: D, tokens of training.
    budget: FLOPs that it was planned for.
    settings: config fields that make it, with their values.
  """

  width: int
  layers: int
  steps: int
  parameters: float
  tokens: float
  budget: float
  settings: Mapping[str, Any]

  @property
  def flops(self) -> float:
    """FLOPs of training."""
    return 6 * self.parameters * self.tokens


def parse_size(text: str) -> tuple[int, int]:
  """Returns width and layers of '128x4'.

  Raises:
    ValueError: it is not of that form.
  """
  match = re.fullmatch(r'(\d+)x(\d+)', text.strip())
  if not match or not int(match[1]) or not int(match[2]):
    raise ValueError(f'{text!r} is no size; write WIDTHxLAYERS, such as 128x4.')
  return int(match[1]), int(match[2])


def run_of(
  config: experiment.Experiment, size: tuple[int, int], budget: float
) -> ScaledRun:
  """Returns the run of a size that spends a budget.

  Args:
    config: the experiment.
    size: width and number of layers.
    budget: FLOPs of training.

  Raises:
    ValueError: the size cannot be, or the budget is too small for it.
  """
  width, layers = size
  model = sizes.with_width(config.model, width)
  model = dataclasses.replace(model, num_layers=layers)
  spec = input_pipeline.batch_spec(config.data)
  shapes = {name: shape for name, (shape, _) in spec.items()}
  of_step = flops.train_flops(*flops.arguments(model, shapes))
  tokens = shapes['targets'][0] * shapes['targets'][1]
  steps = round(budget / of_step)
  if steps < _MIN_STEPS:
    raise ValueError(
      f'{budget:.3g} FLOPs are {steps} steps of {width}x{layers}, of '
      f'{of_step:.3g} each; it needs {_MIN_STEPS} or more. Give larger '
      '--budgets, smaller --sizes, or a smaller data.batch_size.'
    )
  if steps > _MAX_STEPS:
    raise ValueError(
      f'{budget:.3g} FLOPs are {steps:.3g} steps of {width}x{layers}. Give '
      'smaller --budgets.'
    )
  train = dataclasses.replace(
    config.train, num_steps=steps, num_tokens=None, num_epochs=None
  )
  scaled = dataclasses.replace(config, model=model, train=train)
  changed = overrides.differences(
    overrides.to_json(config), overrides.to_json(scaled)
  )
  return ScaledRun(
    width=width,
    layers=layers,
    steps=steps,
    parameters=of_step / tokens / 6,
    tokens=float(steps * tokens),
    budget=budget,
    settings={name: new for name, (_, new) in changed.items()},
  )


def plan(
  config: experiment.Experiment,
  wanted: Sequence[tuple[int, int]],
  budgets: Sequence[float],
  *,
  max_tokens: float | None = None,
) -> tuple[list[ScaledRun], list[str]]:
  """Returns the runs of all sizes at all budgets, and what is left out.

  Args:
    config: the experiment.
    wanted: width and layers of each size.
    budgets: FLOPs of training.
    max_tokens: most tokens of a run, as many as the text has, say; None does
      not limit them.

  Raises:
    ValueError: a size cannot be.
  """
  runs, left_out = [], []
  for budget in budgets:
    for size in wanted:
      sizes.with_width(config.model, size[0])
      try:
        run = run_of(config, size, budget)
      except ValueError as error:
        left_out.append(str(error))
        continue
      if max_tokens is not None and run.tokens > max_tokens:
        left_out.append(
          f'{budget:.3g} FLOPs are {run.tokens:,.0f} tokens of '
          f'{size[0]}x{size[1]}, and --max_tokens={max_tokens:,.0f}.'
        )
        continue
      runs.append(run)
  return runs, left_out


def sweep_of(
  config: experiment.Experiment, runs: Sequence[ScaledRun], metric: str
) -> definition.Sweep:
  """Returns the sweep whose points are the runs.

  Args:
    config: the experiment.
    runs: the runs.
    metric: name of the final loss in the rows of a run.
  """
  names = list(dict.fromkeys(name for run in runs for name in run.settings))
  own = overrides.flatten(overrides.to_json(config))
  values = [
    tuple(run.settings.get(name, own.get(name)) for name in names)
    for run in runs
  ]
  if len(names) == 1:  # A name alone takes plain values.
    values = [value for (value,) in values]
  return definition.Sweep(
    parameters={', '.join(names): tuple(values)},
    search=search.Grid(),
    metric=metric,
  )


def points_of(
  study: study_lib.Study, runs: Sequence[ScaledRun]
) -> dict[int, scaling_law.Point]:
  """Returns the finished runs as points of a law, by their place in `runs`.

  Those that have failed or diverged are left out, with a warning.

  Args:
    study: the study of `sweep_of(runs)`.
    runs: the runs.
  """
  ((_, parameter),) = study.sweep.parameters.items()
  found = {}
  for trial in study.trials():
    (value,) = trial.point.values()
    i = parameter.values.index(value)
    if trial.value is None or not math.isfinite(trial.value):
      _log.warning(
        'left out of the law: %dx%d with %.3g FLOPs, trial %d: %s',
        runs[i].width,
        runs[i].layers,
        runs[i].flops,
        trial.number,
        trial.outcome.get('error', trial.state),
      )
      continue
    found[i] = scaling_law.Point(
      parameters=runs[i].parameters, tokens=runs[i].tokens, loss=trial.value
    )
  return found


def predictions(
  found: scaling_law.Fit, runs: Sequence[ScaledRun]
) -> list[dict[str, Any]]:
  """Returns the predicted losses of runs, as JSON values."""
  result = []
  for run in runs:
    loss, low, high = found.prediction(run.parameters, run.tokens)
    result.append(
      {
        'size': f'{run.width}x{run.layers}',
        'parameters': run.parameters,
        'tokens': run.tokens,
        'flops': run.flops,
        'loss': loss,
        'low': low,
        'high': high,
      }
    )
  return result


def to_json(
  found: scaling_law.Fit,
  points: Sequence[scaling_law.Point],
  valleys: Sequence[scaling_law.Valley],
) -> dict[str, Any]:
  """Returns a fit, its intervals, and the runs that it is of."""
  names = [f.name for f in dataclasses.fields(scaling_law.Law)]
  names.append('size_exponent')
  return {
    'law': {name: getattr(found.law, name) for name in names},
    'intervals_of_90_percent': {n: found.interval(n) for n in names},
    'error': found.error,
    'runs': [{**dataclasses.asdict(p), 'flops': p.flops} for p in points],
    'best_sizes': [dataclasses.asdict(v) for v in valleys],
  }


def dumps(value: object) -> str:
  """Returns JSON text."""
  return json.dumps(value, indent=1) + '\n'
