"""Draws the curves of a run as SVG text to put into an HTML page.

Colors are the CSS variables `--ink` (text), `--grid` and `--s0` to `--s5` (the
series), which the page defines.
"""

from collections.abc import Sequence
import dataclasses
import html
import io
import itertools
import math
import re
from typing import Any

Point = tuple[float, float]  # Step, value.

_MAX_POINTS = 600  # Of a line, so that pages of long runs stay small.
_NUM_SERIES = 6  # Colors in the style.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
  """One line of a chart.

  Attributes:
    name: label of the line in the legend.
    points: (step, value) pairs in order of step.
    color: index of the page's series color, taken modulo their number.
    faint: whether the line is thin and pale.
    marked: whether each point has a dot.
  """

  name: str
  points: Sequence[Point]
  color: int = 0
  faint: bool = False
  marked: bool = False


def smooth(points: Sequence[Point], reach: int) -> list[Point]:
  """Returns a centred moving average of points.

  Each value is averaged with up to `reach` values on either side. As many are
  taken on one side as on the other, so that the line does not lag behind a
  falling loss; towards both ends they are fewer.

  Args:
    points: (step, value) pairs in order of step.
    reach: greatest number of neighbours on one side.

  Returns:
    One point for each of `points`. If these are more than 2 * reach, the last
    reach / 2 are left out, since their averages would be over few values.
  """
  sums = list(itertools.accumulate((v for _, v in points), initial=0.0))
  result = []
  num = len(points)
  ends = num - reach // 2 if num > 2 * reach else num
  for i, (step, _) in enumerate(points[:ends]):
    side = min(i, reach, num - 1 - i)
    start, stop = i - side, i + side + 1
    result.append((step, (sums[stop] - sums[start]) / (stop - start)))
  return result


def thin(points: Sequence[Point], most: int = _MAX_POINTS) -> list[Point]:
  """Returns at most about `most` of the points, extremes included.

  The points are cut into `most` / 2 pieces, and the least and the greatest
  value of each piece are kept.
  """
  if len(points) <= most:
    return list(points)
  size = math.ceil(len(points) / (most // 2))
  result = []
  for start in range(0, len(points), size):
    piece = points[start : start + size]
    value = lambda point: point[1]
    result += sorted({min(piece, key=value), max(piece, key=value)})
  return result


def draw(
  title: str,
  series: Sequence[Series],
  *,
  log: bool = False,
  focus: bool = False,
) -> str:
  """Returns an HTML figure of a line chart; '' if there are no points.

  Args:
    title: caption of the figure.
    series: lines to draw; those without points are left out.
    log: whether the value axis is logarithmic, if the values are positive and
      span more than a decade.
    focus: whether the value axis leaves out values that only the first steps
      reach.
  """
  series = [s for s in series if s.points]
  if not series:
    return ''
  svg = _svg(series, log=log, focus=focus)
  legend = ''
  if len(series) > 1:
    keys = (
      f'<span class="s{s.color % _NUM_SERIES}{" faint" * s.faint}"><i></i>'
      f'{html.escape(s.name)}</span>'
      for s in series
    )
    legend = f'<div class="legend">{"".join(keys)}</div>'
  return (
    f'<figure><figcaption>{html.escape(title)}</figcaption>{legend}{svg}'
    '</figure>'
  )


# Colors that the page's style replaces: matplotlib knows no CSS variables.
_INK = '#010203'
_GRID = '#010204'
_COLORS = [f'#0a0b{i:02x}' for i in range(_NUM_SERIES)]


def _svg(series: Sequence[Series], *, log: bool, focus: bool) -> str:
  """Draws lines as SVG text that takes its colors from the page."""
  # Imported here so that training does not wait for it; without pyplot, whose
  # global state belongs to the caller.
  import matplotlib
  from matplotlib import figure

  fig = figure.Figure(figsize=(4.6, 2.5), layout='constrained')
  axes = fig.subplots()
  for s in series:
    steps, values = zip(*thin(s.points))
    axes.plot(
      steps,
      values,
      color=_COLORS[s.color % _NUM_SERIES],
      linewidth=0.8 if s.faint else 1.4,
      alpha=0.35 if s.faint else 1,
      marker='o' if s.marked or len(steps) == 1 else None,
      markersize=3.5,
    )
  _scale(axes, series, log=log, focus=focus)
  axes.set_xlabel('step', color=_INK)
  axes.tick_params(colors=_INK, length=0)
  axes.grid(True, color=_GRID, linewidth=0.6)
  axes.set_axisbelow(True)
  axes.spines[:].set_visible(False)
  buffer = io.StringIO()
  # Text stays text, set in the page's font.
  with matplotlib.rc_context({'svg.fonttype': 'none'}):
    fig.savefig(buffer, format='svg', transparent=True, metadata={'Date': None})
  return _restyle(buffer.getvalue())


def _scale(
  axes: Any, series: Sequence[Series], *, log: bool, focus: bool
) -> None:
  """Sets the ranges and tick labels of a chart's axes (of matplotlib)."""
  from matplotlib import ticker

  values = [value for s in series for _, value in s.points]
  # In less than a decade a logarithmic axis would have too few labels.
  if log and 0 < 10 * min(values) < max(values):
    axes.set_yscale('log')
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
  axes.yaxis.set_major_formatter(ticker.FuncFormatter(_tick))
  if focus:
    axes.set_ylim(*_focus_range(series))
  axes.set_xlim(left=0)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  axes.xaxis.set_major_formatter(ticker.FuncFormatter(_tick))


def _restyle(svg: str) -> str:
  """Returns the <svg> element alone, with CSS variables for its colors."""
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  # Ids must be unique in a page; nothing refers to these.
  svg = re.sub(r'<g id="[^"]*">', '<g>', svg)
  variables = {_INK: '--ink', _GRID: '--grid'}
  variables |= {c: f'--s{i}' for i, c in enumerate(_COLORS)}
  for color, variable in variables.items():
    svg = svg.replace(color, f'var({variable})')
  return svg


def _focus_range(series: Sequence[Series]) -> Point:
  """Returns a range of the values after the first fiftieth of each line."""
  values = []
  for s in series:
    values += [value for _, value in s.points[len(s.points) // 50 :]]
  low, high = min(values), max(values)
  margin = 0.05 * (high - low) or 0.1
  return low - margin, high + margin


def _tick(value: float, position: int) -> str:
  del position
  if abs(value) >= 1e6:
    return f'{value / 1e6:g}M'
  if abs(value) >= 1e4:
    return f'{value / 1e3:g}k'
  return f'{value:.6g}'
