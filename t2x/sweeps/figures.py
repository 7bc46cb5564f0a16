"""A study's pictures by matplotlib, for notebooks.

figures.learning_curves(study)
plt.show()

Each function makes a new figure of pyplot's and returns it. Trials that were
pruned are dashed or hollow; those that diverged are crosses and those that
failed squares, at the side of bad results. Neither has a say in the axes.
"""

from __future__ import annotations

from collections.abc import Sequence
import math
from typing import TYPE_CHECKING
from typing import Any

import numpy as np

from t2x.sweeps import axes as axes_lib
from t2x.sweeps import importance as importance_lib
from t2x.sweeps import records as records_lib
from t2x.sweeps import study as study_lib

if TYPE_CHECKING:  # Slow to import, and of use to notebooks alone.
  from matplotlib import axes as plot_axes
  from matplotlib import figure

_BEST, _WORST, _PALE = '#0072b2', '#b4b8be', '#8a9097'
_MARKS = {'diverged': ('x', '#c03a2b'), 'failed': ('s', '#b0568c')}
_WIDTH = 3.0  # Inches of a slice.
_HEIGHT = 2.6
_MOST_COLUMNS = 3
_REACH = 3.0  # Quartile distances beyond which a value is far from all others.


def learning_curves(study: study_lib.Study) -> figure.Figure:
  """Draws the metric of every trial by step, the best in the darkest color."""
  import matplotlib.pyplot as plt

  records = records_lib.of(study)
  fig, axes = plt.subplots(figsize=(8, 3.6))
  last = max((r.last_step or 0 for r in records), default=0)
  values = []
  for record, color in _worst_first(study, records):
    curve = _finite_curve(record)
    if curve:
      steps, metric = zip(*curve)
      axes.plot(steps, metric, **_style(record, color))
      values += [v for s, v in curve if s >= last / 10]
  _limit(axes, values, study.sweep.direction)
  for record in records:
    kind = _kind(record)
    if kind == 'diverged' and record.last_step is not None:
      _mark(axes, record.last_step, kind, study.sweep.direction)
    elif kind == 'failed' and (curve := _finite_curve(record)):
      shape, color = _MARKS[kind]
      axes.plot(*curve[-1], marker=shape, mfc='none', ms=5, color=color)
  axes.set(xlabel='step', ylabel=study.sweep.metric)
  axes.set_xlim(left=0)
  _add_legend(axes, records)
  return fig


def slices(study: study_lib.Study) -> figure.Figure:
  """Draws the results by the values of each parameter."""
  import matplotlib.pyplot as plt

  records = records_lib.of(study)
  parameters = axes_lib.of(study.sweep.parameters)
  columns = min(len(parameters), _MOST_COLUMNS)
  rows = math.ceil(len(parameters) / columns)
  size = (_WIDTH * columns, _HEIGHT * rows)
  fig, grid = plt.subplots(
    rows, columns, figsize=size, sharey=True, squeeze=False
  )
  for axes, axis in zip(grid.flat, parameters):
    _slice(axes, axis, study, records)
  for axes in grid.flat[len(parameters) :]:
    axes.set_visible(False)
  for axes in grid[:, 0]:
    axes.set_ylabel(study.sweep.metric)
  return fig


def importance(study: study_lib.Study) -> figure.Figure:
  """Draws the share of each parameter, or says why there is none."""
  from matplotlib import ticker
  import matplotlib.pyplot as plt

  found = importance_lib.of(study)
  names = axes_lib.short_names(study.sweep.parameters)
  fig, axes = plt.subplots(figsize=(6, 0.6 + 0.32 * max(len(found.shares), 2)))
  if not found.shares:
    axes.set_axis_off()
    axes.text(0.5, 0.5, found.said, ha='center', va='center', wrap=True)
    return fig
  labels = [names[name] for name in found.shares]
  bars = axes.barh(labels, list(found.shares.values()), color=_BEST)
  axes.bar_label(bars, [f'{s:.0%}' for s in found.shares.values()], padding=3)
  axes.invert_yaxis()
  axes.xaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
  axes.set(xlabel='importance, by PED-ANOVA', xlim=(0, 1.1))
  return fig


def _slice(
  axes: plot_axes.Axes,
  axis: axes_lib.ParameterAxis,
  study: study_lib.Study,
  records: Sequence[records_lib.Record],
) -> None:
  from matplotlib import ticker

  values = []
  for record, color in _worst_first(study, records):
    place = axis.place(record.trial.point[axis.name])
    kind = _kind(record)
    if kind in _MARKS:
      _mark(axes, place, kind, study.sweep.direction)
    elif record.value is not None:
      fill, edge = (color, color)
      if kind == 'pruned':
        fill, edge = 'none', _PALE
      axes.scatter([place], [record.value], s=16, c=fill, edgecolors=edge)
      values.append(record.value)
  _limit(axes, values, study.sweep.direction, room_for_marks=0.15)
  axes.set_xlabel(axis.short)
  if axis.scale == 'log':
    axes.set_xscale('log')
    room = (axis.high / axis.low) ** 0.05
    axes.set_xlim(axis.low / room, axis.high * room)
  else:
    room = 0.5 if axis.labels else 0.05 * (axis.high - axis.low)
    axes.set_xlim(axis.low - room, axis.high + room)
  ticks = range(len(axis.labels)) if axis.labels else axis.ticks
  if ticks:
    texts = axis.labels or [f'{tick:.4g}' for tick in ticks]
    axes.set_xticks(list(ticks), labels=texts)
    axes.xaxis.set_minor_locator(ticker.NullLocator())


def _kind(record: records_lib.Record) -> str:
  return 'diverged' if record.diverged else record.trial.state


def _finite_curve(record: records_lib.Record) -> list[tuple[int, float]]:
  found = sorted(record.trial.values.items())
  return [(step, value) for step, value in found if math.isfinite(value)]


def _worst_first(
  study: study_lib.Study, records: Sequence[records_lib.Record]
) -> list[tuple[records_lib.Record, str]]:
  """Returns the records with their colors, so that the best lie on top."""
  from matplotlib import colors

  best = records_lib.ranked(records, study.sweep.direction, len(records))
  ramp = colors.LinearSegmentedColormap.from_list('rank', [_BEST, _WORST])
  shares = np.linspace(0, 1, len(best))
  numbers = {record.trial.number for record in best}
  others = [(r, _PALE) for r in records if r.trial.number not in numbers]
  ranked = [(r, colors.to_hex(ramp(s))) for r, s in zip(best, shares)]
  return others + ranked[::-1]


def _style(record: records_lib.Record, color: str) -> dict[str, Any]:
  """Returns how a trial's line is drawn."""
  kind = _kind(record)
  style = {'color': color, 'linewidth': 1.2}
  if kind in _MARKS:
    style |= {'color': _MARKS[kind][1], 'alpha': 0.6}
  elif kind != 'complete':
    style |= {'linestyle': '--' if kind == 'pruned' else ':', 'alpha': 0.7}
  if len(record.trial.values) == 1:
    style |= {'marker': 'o', 'markersize': 3}
  return style


def _limit(
  axes: plot_axes.Axes,
  values: Sequence[float],
  direction: str,
  *,
  room_for_marks: float = 0.0,
) -> None:
  """Sets the axis of results without values far from all others.

  Args:
    axes: axes to set.
    values: results.
    direction: `minimize` or `maximize`.
    room_for_marks: share of the axis to add at the side of bad results.
  """
  if not values:
    return
  low, middle, high = np.quantile(
    values, (0.25, 0.5, 0.75), method='inverted_cdf'
  )
  reach = _REACH * ((high - low) or abs(middle) or 1.0)
  least = max(min(values), low - reach)
  most = min(max(values), high + reach)
  span = most - least
  if direction == 'minimize':  # The best is always within.
    least, most = min(values), most + room_for_marks * span
  else:
    least, most = least - room_for_marks * span, max(values)
  room = 0.06 * span or 0.1 * abs(most) or 1.0
  axes.set_ylim(least - room, most + room)


def _mark(axes: plot_axes.Axes, x: float, kind: str, direction: str) -> None:
  """Marks a trial without a finite result at the side of bad results."""
  shape, color = _MARKS[kind]
  y = 0.96 if kind == 'diverged' else 0.89
  axes.plot(
    [x],
    [y if direction == 'minimize' else 1 - y],
    transform=axes.get_xaxis_transform(),
    marker=shape,
    markersize=5,
    markerfacecolor='none',
    color=color,
  )


def _add_legend(
  axes: plot_axes.Axes, records: Sequence[records_lib.Record]
) -> None:
  from matplotlib import lines

  kinds = {_kind(record) for record in records}
  keys = []
  if 'complete' in kinds:
    keys.append(lines.Line2D([], [], color=_BEST, label='best'))
    keys.append(lines.Line2D([], [], color=_WORST, label='worst, by rank'))
  for kind, style in (('pruned', '--'), ('running', ':')):
    if kind in kinds:
      keys.append(lines.Line2D([], [], color=_PALE, ls=style, label=kind))
  for kind, (shape, color) in _MARKS.items():
    if kind in kinds:
      line = lines.Line2D([], [], color=color, ls='none', label=kind)
      line.set(marker=shape, markerfacecolor='none')
      keys.append(line)
  if keys:
    axes.legend(handles=keys, frameon=False, fontsize='small')
