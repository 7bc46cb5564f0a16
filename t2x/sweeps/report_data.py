"""The data of a study's page, as JSON within it."""

from collections.abc import Sequence
import dataclasses
import json
from typing import Any

from t2x.sweeps import axes as axes_lib
from t2x.sweeps import records as records_lib
from t2x.sweeps import study as study_lib
from t2x.tracking import svg_charts

_DIGITS = 6  # More than a chart can show.
_MOST_POINTS = 60_000  # Of all curves together.
_LEAST_POINTS = 20  # Of one curve.


def element(
  study: study_lib.Study,
  records: Sequence[records_lib.Record],
  axes: Sequence[axes_lib.ParameterAxis],
) -> str:
  """Returns the script element that the page's charts are drawn from.

  Args:
    study: the study.
    records: its records.
    axes: axes of its parameters.
  """
  most = max(_MOST_POINTS // max(len(records), 1), _LEAST_POINTS)
  data = {
    'metric': study.sweep.metric,
    'direction': study.sweep.direction,
    'axes': [dataclasses.asdict(axis) for axis in axes],
    'trials': [_trial(record, axes, most) for record in records],
  }
  text = json.dumps(data, allow_nan=False, separators=(',', ':'))
  # Nothing in it ends the element, or begins a comment.
  text = text.replace('<', '\\u003c')
  return f'<script type="application/json" id="data">{text}</script>'


def kind(record: records_lib.Record) -> str:
  """Returns a trial's state, or `diverged` where its result is not finite."""
  return 'diverged' if record.diverged else record.state


def _trial(
  record: records_lib.Record, axes: Sequence[axes_lib.ParameterAxis], most: int
) -> dict[str, Any]:
  """Returns a trial under short names, of which there are thousands."""
  trial = record.trial
  curve = [
    (step, value)
    for step, value in sorted(trial.values.items())
    if records_lib.finite(value) is not None
  ]
  curve = svg_charts.thin(curve, most)
  return {
    'n': trial.number,
    's': kind(record),
    'v': _rounded(record.value),
    'p': [_rounded(axis.place(trial.point[axis.name])) for axis in axes],
    'c': [[s for s, _ in curve], [_rounded(v) for _, v in curve]],
    'last': record.last_step,
    't': record.seconds,
    'f': record.failures,
    'e': record.error,
  }


def _rounded(value: float | None) -> float | None:
  """Returns a number short enough for a chart; None where it is not finite."""
  value = records_lib.finite(value)
  return float(f'{value:.{_DIGITS}g}') if isinstance(value, float) else value
