"""What a study has cost: seconds as its runs wrote them, FLOPs by estimate."""

from collections.abc import Mapping
from collections.abc import Sequence
import math

from t2x.config import experiment
from t2x.cost_model import estimate
from t2x.parallel import mesh
from t2x.sweeps import points
from t2x.sweeps import records as records_lib
from t2x.sweeps import study as study_lib

# Each takes some 100 ms to estimate, and a page should not take minutes.
_MOST_STRUCTURES = 30


def flops(
  study: study_lib.Study, records: Sequence[records_lib.Record]
) -> Mapping[int, float] | None:
  """Returns the FLOPs of each trial by its number, of all its runs.

  They are those of matrix products in train steps, up to the last step with a
  value of the metric; evaluations and repeated steps are left out. None where
  they cannot be estimated, or the trials differ in too many shapes.

  Args:
    study: the study.
    records: its records.
  """
  try:
    configs = [_config(study, record) for record in records]
    keys = [points.structure_key(config) for config in configs]
    structures = dict(zip(keys, configs))
    if len(structures) > _MOST_STRUCTURES:
      return None
    known = {key: _flops_of_step(c) for key, c in structures.items()}
  except ValueError:  # This t2x, or this machine's data, refuses one.
    return None
  return {
    record.trial.number: known[key] * _steps(record, config)
    for record, key, config in zip(records, keys, configs)
  }


def _config(
  study: study_lib.Study, record: records_lib.Record
) -> experiment.Experiment:
  """Returns the config of a trial's first run; others have another seed."""
  point = record.trial.point
  found = points.candidate(study.facts.config, study.sweep, point)
  return found.runs[0].config


def _flops_of_step(config: experiment.Experiment) -> float:
  sizes = [getattr(config.mesh, axis) for axis in mesh.AXES]
  devices = math.prod(size for size in sizes if size > 0)
  return estimate.step(config, devices).mean_flops * devices


def _steps(record: records_lib.Record, config: experiment.Experiment) -> int:
  """Returns the steps that a trial took itself, all its runs together."""
  trial, steps = record.trial, record.last_step or 0
  if 'steps' in trial.outcome:  # As its runs have taken them.
    return int(trial.outcome['steps'])
  stop = trial.origin.stop_after if trial.origin else None
  if trial.state == 'complete' and not record.diverged:
    steps = stop or experiment.num_steps(config) or steps
  return max(steps - trial.first_step, 0) * len(trial.runs)
