"""Writes report.html: the curves, results and settings of a run on one page.

The page needs no network. The charts are SVG in the page itself and take their
colors from its style, so that they follow the reader's light or dark setting.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import html
import json
import math
import statistics
from typing import Any

from etils import epath

from t2x import files
from t2x import reading
from t2x.tracking import html_page
from t2x.tracking import metrics
from t2x.tracking import svg_charts

FILE = 'report.html'


def write(workdir: epath.PathLike) -> epath.Path:
  """Writes the `report.html` of a run.

  Reads metrics.jsonl, and corpus.json, config.json, versions.json and
  samples.json (a list of {prompt, text}) where they exist.

  Args:
    workdir: directory of the run.

  Returns:
    The path of the report.

  Raises:
    ValueError: `workdir` holds no run.
  """
  workdir = files.path(workdir)
  if not (workdir / metrics.FILE).exists():
    raise ValueError(
      f'{workdir} has no {metrics.FILE}; a report needs the workdir of a '
      'run that has trained.'
    )
  path = workdir / FILE
  text = page(
    title=workdir.name,
    rows=metrics.read_rows(workdir),
    config=_read(workdir / 'config.json'),
    versions=_read(workdir / 'versions.json'),
    samples=_read(workdir / 'samples.json') or [],
    corpus=_read(workdir / 'corpus.json'),
  )
  files.write_whole(path, text)
  return path


def _read(path: epath.Path) -> Any:
  if not path.exists():
    return None
  return reading.parse_json(reading.text(path), str(path), 'Restore it.')


def page(
  *,
  title: str,
  rows: Sequence[Mapping[str, Any]],
  config: Mapping[str, Any] | None = None,
  versions: Mapping[str, str] | None = None,
  samples: Sequence[Mapping[str, str]] = (),
  corpus: Mapping[str, Any] | None = None,
) -> str:
  """Returns the HTML of a report; see `write`.

  Args:
    title: heading of the page, such as the name of the run.
    rows: rows of metrics.jsonl, in order of step.
    config: the run's config as JSON values; None leaves it out.
    versions: version of each package that the run used.
    samples: generated texts, each with the keys `prompt` and `text`.
    corpus: contents of corpus.json; None leaves the documents out.
  """
  sections = [
    html_page.section(
      'Figures', html_page.tiles(headlines(rows)) + _eval_table(rows)
    ),
    html_page.section('Curves', _charts(rows)),
    html_page.section('Samples', _samples(samples)),
    html_page.section(
      'Documents', _documents((corpus or {}).get('documents', {}))
    ),
    html_page.section('What ran', _versions(versions) + _config(config)),
  ]
  return html_page.PAGE.format(
    title=html.escape(title),
    style=html_page.STYLE,
    body='\n'.join(sections),
  )


def headlines(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
  """Returns the main results of a run as (name, value) texts."""
  last = rows[-1]['step'] if rows else 0
  figures = [('steps', f'{last:,}')]
  losses = points(rows, 'loss')
  if losses:
    figures.insert(0, ('final training loss', html_page.number(losses[-1][1])))
    tail = [value for _, value in losses[-(len(losses) // 50 + 1) :]]
    if len(tail) > 1:
      name = f'mean of the last {len(tail)}'
      figures.insert(1, (name, html_page.number(statistics.fmean(tail))))
  speeds = [value for _, value in points(rows, 'tokens_per_second')]
  if speeds:
    figures.append(('tokens/s, median', f'{statistics.median(speeds):,.0f}'))
  uses = [value for _, value in points(rows, 'mfu')]
  if uses:
    figures.append(('MFU, median', f'{statistics.median(uses):.1%}'))
  seconds = training_seconds(rows)
  if seconds:
    figures.append(('time in steps', html_page.duration(seconds)))
  broken = sum('loss' in row.get('non_finite', ()) for row in rows)
  if broken:
    figures.append(('steps with a loss that is not finite', f'{broken:,}'))
  return figures


def training_seconds(rows: Sequence[Mapping[str, Any]]) -> float:
  """Returns the seconds spent in training steps.

  The `step_seconds` of a row counts for all steps since the row before.
  """
  total, previous = 0.0, 0
  for step, seconds in points(rows, 'step_seconds'):
    total += seconds * (step - previous)
    previous = step
  return total


def eval_points(
  rows: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, list[svg_charts.Point]]]:
  """Returns the points of evaluations: metric -> evaluated set -> points."""
  result: dict[str, dict[str, list[svg_charts.Point]]] = {}
  for name in dict.fromkeys(name for row in rows for name in row):
    if name.startswith('eval/'):
      _, title, metric = name.split('/', 2)
      curve = points(rows, name)
      if curve:
        result.setdefault(metric, {})[title] = curve
  return result


def points(
  rows: Sequence[Mapping[str, Any]], name: str
) -> list[svg_charts.Point]:
  """Returns (step, value) of a metric, for the rows that have it."""
  return [(r['step'], r[name]) for r in rows if r.get(name) is not None]


def _charts(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns the charts of all metrics that the rows have values for."""
  evals = eval_points(rows)
  eval_losses = _eval_series(evals.pop('loss', {}))
  training = _noisy('training', points(rows, 'loss'))
  figures = [
    svg_charts.draw('Loss', training + eval_losses, focus=True),
    svg_charts.draw('Evaluation loss', eval_losses),
  ]
  evals.pop('num_tokens', None)  # The size of a set is no result.
  for metric, sets in evals.items():
    title = f'Evaluation {metric.replace("_", " ")}'
    figures.append(svg_charts.draw(title, _eval_series(sets)))
  line = lambda name, metric: svg_charts.Series(
    name=name, points=points(rows, metric)
  )
  norms = line('norm', 'grad_norm')
  speeds = _noisy('each step', points(rows, 'tokens_per_second'))
  rates = line('learning rate', 'learning_rate')
  busiest = line('busiest expert', 'expert_load_max')
  figures += [
    svg_charts.draw('Loss by term', _ending(rows, 'nll')),
    svg_charts.draw('Weights of tasks', _ending(rows, '/weight')),
    svg_charts.draw('Gradient norm', [norms], log=True),
    svg_charts.draw('Learning rate', [rates]),
    svg_charts.draw(
      "Busiest expert's load, as a multiple of the mean", [busiest]
    ),
    svg_charts.draw('Choices dropped', [line('share', 'tokens_dropped')]),
    svg_charts.draw('Tokens per second', speeds, focus=True),
  ]
  body = '\n'.join(filter(None, figures))
  return f'<div class="charts">{body}</div>' if body else ''


def _ending(
  rows: Sequence[Mapping[str, Any]], end: str
) -> list[svg_charts.Series]:
  """Returns smoothed lines of the training metrics whose names end in `end`.

  The list is empty if there are fewer than two.
  """
  names = dict.fromkeys(name for row in rows for name in row)
  names = [n for n in names if n.endswith(end) and not n.startswith('eval/')]
  curves = {name: curve for name in names if (curve := points(rows, name))}
  if len(curves) < 2:
    return []
  return [
    svg_charts.Series(name=n, points=_smoothed(p), color=i)
    for i, (n, p) in enumerate(curves.items())
  ]


def _smoothed(curve: Sequence[svg_charts.Point]) -> list[svg_charts.Point]:
  return svg_charts.smooth(curve, len(curve) // 100 + 1)


def _noisy(
  name: str, curve: Sequence[svg_charts.Point]
) -> list[svg_charts.Series]:
  """Returns a curve as a faint line, and its moving average over it."""
  return [
    svg_charts.Series(name=name, points=curve, faint=True),
    svg_charts.Series(name='smoothed', points=_smoothed(curve)),
  ]


def _eval_series(
  sets: Mapping[str, list[svg_charts.Point]],
) -> list[svg_charts.Series]:
  # The first color is the training loss's.
  return [
    svg_charts.Series(name=title, points=points, color=1 + i, marked=True)
    for i, (title, points) in enumerate(sets.items())
  ]


def _eval_table(rows: Sequence[Mapping[str, Any]]) -> str:
  """Returns a table of evaluated sets: the loss, then the other metrics."""
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
      cells.append(html_page.number(sets[name][-1][1]) if name in sets else '-')
    body += (
      f'<tr><th>{html.escape(name)}</th>{html_page.cells("td", cells)}</tr>'
    )
  return html_page.table(head, body)


def _documents(tasks: Mapping[str, Mapping[str, Any]]) -> str:
  """Returns a table of each task's documents: read, kept, and dropped."""
  reasons = dict.fromkeys(
    r for facts in tasks.values() for r in facts['dropped']
  )
  head = ['', 'source', 'copies', 'read', 'to train on', 'held out']
  head += [f'dropped: {reason.replace("_", " ")}' for reason in reasons]
  body = notes = ''
  for name, facts in tasks.items():
    numbers = [facts[key] for key in ('read', 'train', 'validation')]
    numbers += [facts['dropped'].get(reason, 0) for reason in reasons]
    cells = [facts['source'], facts['duplicates']]
    cells += [f'{number:,}' for number in numbers]
    body += (
      f'<tr><th>{html.escape(name)}</th>{html_page.cells("td", cells)}</tr>'
    )
    if facts['dropped']:
      notes += f'<p>Dropped documents: {html.escape(facts["list"])}</p>'
  return body and html_page.table(head, body) + notes


def _loss_cells(
  losses: Sequence[svg_charts.Point] | None,
  perplexities: Sequence[svg_charts.Point] | None,
) -> list[str]:
  """Returns final loss, best loss, its step, and final perplexity.

  Without `perplexities` the last is exp(final loss).
  """
  if not losses:
    return ['-'] * 4
  final = losses[-1][1]
  step, best = min(losses, key=lambda point: point[1])
  # No float holds exp of more than 709.
  perplexity = perplexities[-1][1] if perplexities else math.exp(min(final, 99))
  return [
    html_page.number(final),
    html_page.number(best),
    f'{step:,}',
    html_page.number(perplexity),
  ]


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


def _config(config: Mapping[str, Any] | None) -> str:
  if config is None:
    return ''
  text = html.escape(json.dumps(config, indent=2))
  return f'<details><summary>Config</summary><pre>{text}</pre></details>'
