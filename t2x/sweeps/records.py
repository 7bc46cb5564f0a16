"""A study's trials as plain records: for tables, CSV and JSON."""

from collections.abc import Mapping
from collections.abc import Sequence
import csv
import dataclasses
import io
import json
import math
from typing import Any

from t2x.sweeps import space
from t2x.sweeps import study as study_lib

_COLUMNS_BEFORE = ('number', 'key', 'state', 'value')
_COLUMNS_AFTER = ('last_step', 'seconds', 'failures', 'error', 'workdir')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
  """A trial and what follows from it.

  Attributes:
    trial: the trial.
    last_step: greatest step with a value; None before the first.
    last_value: value after that step; None before the first.
    workdirs: workdirs of its runs.
    state: its state, or `interrupted` where its worker has ended.
  """

  trial: study_lib.Trial
  last_step: int | None
  last_value: float | None
  workdirs: tuple[str, ...]
  state: str

  @property
  def value(self) -> float | None:
    """Its result; None before there is one. Infinite if it diverged."""
    return self.trial.value

  @property
  def diverged(self) -> bool:
    """Whether its result is not finite."""
    return self.value is not None and not math.isfinite(self.value)

  @property
  def seconds(self) -> float | None:
    """Time in training steps; None before its end."""
    return self.trial.outcome.get('seconds')

  @property
  def failures(self) -> int | None:
    """Number of times that a run of it failed; None before its end."""
    return self.trial.outcome.get('failures')

  @property
  def error(self) -> str:
    """Reason why it failed or diverged; '' where it did not."""
    return self.trial.outcome.get('error') or ''


def of(study: study_lib.Study) -> list[Record]:
  """Returns the records of a study's trials, by number."""
  trials = study.trials()
  left = study.interrupted(trials)
  return [_record(study, trial, trial.number in left) for trial in trials]


def _record(
  study: study_lib.Study, trial: study_lib.Trial, is_left: bool
) -> Record:
  last = max(trial.values, default=None)
  return Record(
    trial=trial,
    last_step=last,
    last_value=None if last is None else trial.values[last],
    workdirs=tuple(str(study.workdir(key)) for key in trial.runs),
    state='interrupted' if is_left else trial.state,
  )


def ranked(
  records: Sequence[Record], direction: str, most: int
) -> list[Record]:
  """Returns the complete trials with the best finite results, best first.

  Args:
    records: records of a study.
    direction: `minimize` or `maximize`.
    most: greatest number of them.
  """
  sign = 1 if direction == 'minimize' else -1
  done = [
    (sign * r.value, r.trial.number, r)
    for r in records
    if r.trial.state == 'complete' and r.value is not None and not r.diverged
  ]
  return [record for _, _, record in sorted(done)[:most]]


def to_csv(study: study_lib.Study, records: Sequence[Record]) -> str:
  """Returns a table with one row a trial.

  What is not known is empty; a result that is not finite is `inf` or `-inf`.
  Workdirs of several seeds are parted by semicolons.

  Args:
    study: the study.
    records: its records.
  """
  buffer = io.StringIO()
  writer = csv.writer(buffer, lineterminator='\n')
  names = list(study.sweep.parameters)
  writer.writerow([*_COLUMNS_BEFORE, *names, *_COLUMNS_AFTER])
  for record in records:
    trial = record.trial
    row = [trial.number, trial.key, record.state, record.value]
    row += [space.text(trial.point[name]) for name in names]
    row += [record.last_step, record.seconds, record.failures, record.error]
    writer.writerow([*row, ';'.join(record.workdirs)])
  return buffer.getvalue()


def to_json(study: study_lib.Study, records: Sequence[Record]) -> str:
  """Returns the trials as JSON text, with their values by step.

  JSON has no infinity: such a value is null, and `diverged` of its trial true.

  Args:
    study: the study.
    records: its records.
  """
  sweep = study.sweep
  data = {
    'experiment': study.facts.experiment,
    'metric': sweep.metric,
    'direction': sweep.direction,
    'seeds': list(sweep.seeds),
    'trials': [_to_json(record) for record in records],
  }
  return json.dumps(data, allow_nan=False, indent=1) + '\n'


def _to_json(record: Record) -> Mapping[str, Any]:
  trial = record.trial
  times = {'began': trial.began, 'ended': trial.ended}
  return {
    'number': trial.number,
    'key': trial.key,
    'state': record.state,
    'value': finite(record.value),
    'diverged': record.diverged,
    'point': dict(trial.point),
    'last_step': record.last_step,
    'values': {str(s): finite(v) for s, v in sorted(trial.values.items())},
    'seconds': record.seconds,
    'failures': record.failures,
    'error': record.error or None,
    **{n: None if at is None else at.isoformat() for n, at in times.items()},
    'workdirs': list(record.workdirs),
  }


def finite(value: float | None) -> float | None:
  """Returns a number, or None for one that JSON cannot hold."""
  return value if value is not None and math.isfinite(value) else None
