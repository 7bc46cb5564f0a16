"""report.html: what a run was and how it went, on one page without a network.

The figures are SVG in the page itself and take their colors from its style,
so that they follow the reader's light or dark setting.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import html
import io
import itertools
import json
import math
import re
import statistics
from typing import Any

from etils import epath

from t2x import metrics

FILE = 'report.html'

Point = tuple[float, float]  # Step, value.

_MAX_POINTS = 600  # To a line; a page stays small however long the run was.
_NUM_SERIES = 6  # Colors in the style.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Series:
  """One line of a chart.

  Attributes:
    name: in the legend.
    points: in order of step.
    color: which of the page's series colors.
    faint: thin and pale, behind the others.
    marked: a dot for each point.
  """

  name: str
  points: Sequence[Point]
  color: int = 0
  faint: bool = False
  marked: bool = False


def write(workdir: epath.PathLike) -> epath.Path:
  """Writes `report.html` of the run in `workdir`, and returns its path.

  Reads metrics.jsonl, and config.json, versions.json and samples.json (a list
  of {prompt, text}) where they exist.

  Raises:
    ValueError: `workdir` holds no run.
  """
  workdir = epath.Path(workdir)
  if not (workdir / metrics.FILE).exists():
    raise ValueError(
      f'{workdir} has no {metrics.FILE}; a report needs the workdir of a '
      'run that has trained.'
    )
  path = workdir / FILE
  path.write_text(
    page(
      title=workdir.name,
      rows=metrics.read_rows(workdir),
      config=_read(workdir / 'config.json'),
      versions=_read(workdir / 'versions.json'),
      samples=_read(workdir / 'samples.json') or [],
    )
  )
  return path


def _read(path: epath.Path) -> Any:
  return json.loads(path.read_text()) if path.exists() else None


def page(
  *,
  title: str,
  rows: Sequence[Mapping[str, Any]],
  config: Any = None,
  versions: Mapping[str, str] | None = None,
  samples: Sequence[Mapping[str, str]] = (),
) -> str:
  """Returns the page as text; see `write`."""
  sections = [
    _section('Figures', _tiles(headlines(rows)) + _eval_table(rows)),
    _section('Curves', _charts(rows)),
    _section('Samples', _samples(samples)),
    _section('What ran', _versions(versions) + _config(config)),
  ]
  return _PAGE.format(
    title=html.escape(title), style=_STYLE, body='\n'.join(sections)
  )


def headlines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
  """Returns the run's figures as (name, value)."""
  last = rows[-1]['step'] if rows else 0
  figures = [('steps', f'{last:,}')]
  losses = _points(rows, 'loss')
  if losses:
    figures.insert(0, ('final training loss', _number(losses[-1][1])))
    tail = [value for _, value in losses[-(len(losses) // 50 + 1) :]]
    if len(tail) > 1:
      name = f'mean of the last {len(tail)}'
      figures.insert(1, (name, _number(statistics.fmean(tail))))
  speeds = [value for _, value in _points(rows, 'tokens_per_second')]
  if speeds:
    figures.append(('tokens/s, median', f'{statistics.median(speeds):,.0f}'))
  uses = [value for _, value in _points(rows, 'mfu')]
  if uses:
    figures.append(('MFU, median', f'{statistics.median(uses):.1%}'))
  seconds = training_seconds(rows)
  if seconds:
    figures.append(('time in steps', _duration(seconds)))
  broken = sum('loss' in row.get('non_finite', ()) for row in rows)
  if broken:
    figures.append(('steps with a loss that is not finite', f'{broken:,}'))
  return figures


def training_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
  """Returns the time spent in steps; a row stands for those since the last."""
  total, previous = 0.0, 0
  for step, seconds in _points(rows, 'step_seconds'):
    total += seconds * (step - previous)
    previous = step
  return total


def eval_points(
  rows: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, list[Point]]]:
  """Returns metric -> name of the evaluated set -> points."""
  result: dict[str, dict[str, list[Point]]] = {}
  for name in dict.fromkeys(name for row in rows for name in row):
    if name.startswith('eval/'):
      _, title, metric = name.split('/', 2)
      points = _points(rows, name)
      if points:
        result.setdefault(metric, {})[title] = points
  return result


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[Point]:
  return [(r['step'], r[name]) for r in rows if r.get(name) is not None]


def smooth(points: Sequence[Point], reach: int) -> list[Point]:
  """Averages each value with up to `reach` on either side.

  As many on one side as on the other, but at the end, so that the line does
  not lag behind a loss that falls.
  """
  sums = list(itertools.accumulate((v for _, v in points), initial=0.0))
  result = []
  for i, (step, _) in enumerate(points):
    side = min(i, reach)
    start, stop = i - side, min(i + side + 1, len(points))
    result.append((step, (sums[stop] - sums[start]) / (stop - start)))
  return result


def thin(points: Sequence[Point], most: int = _MAX_POINTS) -> list[Point]:
  """Keeps the least and the greatest value of each of `most` / 2 pieces."""
  if len(points) <= most:
    return list(points)
  size = math.ceil(len(points) / (most // 2))
  result = []
  for start in range(0, len(points), size):
    piece = points[start : start + size]
    value = lambda point: point[1]
    result += sorted({min(piece, key=value), max(piece, key=value)})
  return result


def _charts(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns all figures that the rows have values for."""
  evals = eval_points(rows)
  eval_losses = _eval_series(evals.pop('loss', {}))
  training = _noisy('training', _points(rows, 'loss'))
  charts = [
    _chart('Loss', training + eval_losses, focus=True),
    _chart('Evaluation loss', eval_losses),
  ]
  for metric, sets in evals.items():
    title = f'Evaluation {metric.replace("_", " ")}'
    charts.append(_chart(title, _eval_series(sets)))
  norms = Series(name='norm', points=_points(rows, 'grad_norm'))
  speeds = _noisy('each step', _points(rows, 'tokens_per_second'))
  rates = Series(name='learning rate', points=_points(rows, 'learning_rate'))
  charts += [
    _chart('Gradient norm', [norms], log=True),
    _chart('Learning rate', [rates]),
    _chart('Tokens per second', speeds, focus=True),
  ]
  figures = '\n'.join(filter(None, charts))
  return f'<div class="charts">{figures}</div>' if figures else ''


def _noisy(name: str, points: Sequence[Point]) -> list[Series]:
  reach = len(points) // 100 + 1
  return [
    Series(name=name, points=points, faint=True),
    Series(name='smoothed', points=smooth(points, reach)),
  ]


def _eval_series(sets: Mapping[str, list[Point]]) -> list[Series]:
  # The first color is the training loss's.
  return [
    Series(name=title, points=points, color=1 + i, marked=True)
    for i, (title, points) in enumerate(sets.items())
  ]


def _chart(
  title: str,
  series: Sequence[Series],
  *,
  log: bool = False,
  focus: bool = False,
) -> str:
  """Returns a figure, or nothing where there are no points.

  Args:
    title: of the figure.
    series: lines; those without points are left out.
    log: a logarithmic value axis, where the values span a decade.
    focus: cut the value axis where only the first steps lie above it.
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
  from matplotlib import figure, ticker

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


def _restyle(svg: str) -> str:
  """Keeps the drawing alone and puts CSS variables for its colors."""
  svg = svg[svg.index('<svg') :]
  svg = re.sub(r'<metadata>.*?</metadata>', '', svg, flags=re.DOTALL)
  # Ids would repeat from figure to figure; these are never referred to.
  svg = re.sub(r'<g id="[^"]*">', '<g>', svg)
  variables = {_INK: '--ink', _GRID: '--grid'}
  variables |= {c: f'--s{i}' for i, c in enumerate(_COLORS)}
  for color, variable in variables.items():
    svg = svg.replace(color, f'var({variable})')
  return svg


def _focus_range(series: Sequence[Series]) -> Point:
  """Leaves out the heights that only the first fiftieth of a line reaches."""
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


def _section(title: str, body: str) -> str:
  return f'<section><h2>{title}</h2>\n{body}</section>' if body else ''


def _tiles(figures: Sequence[tuple[str, str]]) -> str:
  tiles = (
    f'<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>'
    for name, value in figures
  )
  return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _eval_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns a row for each evaluated set: its loss, then all other metrics."""
  evals = eval_points(rows)
  losses = evals.pop('loss', {})
  perplexities = evals.pop('perplexity', {})
  names = dict.fromkeys(
    [*losses, *(name for sets in evals.values() for name in sets)]
  )
  if not names:
    return ''
  head = ['set', 'final loss', 'best loss', 'at step', 'final perplexity']
  head += [f'final {metric.replace("_", " ")}' for metric in evals]
  body = ''
  for name in names:
    cells = _loss_cells(losses.get(name), perplexities.get(name))
    for sets in evals.values():
      cells.append(_number(sets[name][-1][1]) if name in sets else '-')
    body += f'<tr><th>{html.escape(name)}</th>{_cells("td", cells)}</tr>'
  return (
    f'<div class="wide"><table><thead><tr>{_cells("th", head)}</tr></thead>'
    f'<tbody>{body}</tbody></table></div>'
  )


def _loss_cells(losses, perplexities) -> list[str]:
  """Final loss, best loss, its step, and perplexity, exp(loss) by default."""
  if not losses:
    return ['-'] * 4
  final = losses[-1][1]
  step, best = min(losses, key=lambda point: point[1])
  # No float holds exp of more than 709.
  perplexity = perplexities[-1][1] if perplexities else math.exp(min(final, 99))
  return [_number(final), _number(best), f'{step:,}', _number(perplexity)]


def _cells(tag: str, values: Sequence[str]) -> str:
  return ''.join(f'<{tag}>{html.escape(value)}</{tag}>' for value in values)


def _samples(samples: Sequence[Mapping[str, str]]) -> str:
  return ''.join(
    f'<blockquote><b>{html.escape(sample["prompt"])}</b>'
    f'{html.escape(sample["text"])}</blockquote>'
    for sample in samples
  )


def _versions(versions: Mapping[str, str] | None) -> str:
  return (
    ''
    if not versions
    else '<p class="versions">'
    + ' '.join(
      f'<span>{html.escape(str(name))} <b>{html.escape(str(value))}</b></span>'
      for name, value in versions.items()
    )
    + '</p>'
  )


def _config(config: Any) -> str:
  if config is None:
    return ''
  text = html.escape(json.dumps(config, indent=2))
  return f'<details><summary>Config</summary><pre>{text}</pre></details>'


def _number(value: float) -> str:
  return f'{value:,.0f}' if abs(value) >= 1e4 else f'{value:.4g}'


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f'{hours} h {minutes} min'
  return f'{minutes} min {seconds} s' if minutes else f'{seconds} s'


# Series colors after Okabe and Ito's set, told apart under color blindness,
# with lighter tones on dark.
_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fafaf8; --card: #ffffff; --ink: #5c6066; --text: #1c1e21;
  --grid: #e6e6e3; --s0: #0072b2; --s1: #d55e00; --s2: #00896a; --s3: #b0568c;
  --s4: #a67c00; --s5: #3d8fc0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #16181b; --card: #1f2226; --ink: #a2a8b0; --text: #e9ebed;
    --grid: #33373d; --s0: #56b4e9; --s1: #f08a3c; --s2: #2fc79b;
    --s3: #e08fc0; --s4: #e3c04a; --s5: #8fa7ff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem;
  background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', sans-serif;
}
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .75rem; }
.tiles {
  display: grid; gap: .75rem; margin: 0;
  grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr));
}
.tiles div, figure, .wide, blockquote, details {
  background: var(--card); border: 1px solid var(--grid); border-radius: 8px;
}
.tiles div { padding: .6rem .9rem; }
dt { color: var(--ink); font-size: .85rem; }
dd { margin: 0; font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.wide { margin-top: .75rem; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; white-space: nowrap; }
th, td {
  padding: .45rem .9rem; text-align: right; font-weight: normal;
  font-variant-numeric: tabular-nums;
}
th:first-child { text-align: left; }
thead th { color: var(--ink); font-size: .85rem; }
tbody tr { border-top: 1px solid var(--grid); }
.charts {
  display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr));
}
figure { margin: 0; padding: .75rem .75rem .5rem; }
figcaption { font-weight: 600; font-size: .95rem; }
figure svg { display: block; width: 100%; height: auto; }
svg text { font-family: system-ui, sans-serif !important; fill: var(--ink); }
.legend {
  display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem;
  color: var(--ink);
}
.legend i {
  display: inline-block; width: 1rem; height: 3px; border-radius: 2px;
  margin-right: .4rem; vertical-align: middle; background: var(--s0);
}
.legend .faint i { opacity: .4; }
.legend .s1 i { background: var(--s1); }
.legend .s2 i { background: var(--s2); }
.legend .s3 i { background: var(--s3); }
.legend .s4 i { background: var(--s4); }
.legend .s5 i { background: var(--s5); }
blockquote {
  margin: 0 0 .75rem; padding: .75rem 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; color: var(--ink);
}
blockquote b { color: var(--text); }
.versions { margin: 0 0 .75rem; color: var(--ink); font-size: .85rem; }
.versions span { white-space: nowrap; margin-right: .9rem; }
.versions b { color: var(--text); font-weight: 500; }
summary { padding: .6rem .9rem; cursor: pointer; }
pre { margin: 0; padding: 0 .9rem .9rem; overflow-x: auto; font-size: .85rem; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
