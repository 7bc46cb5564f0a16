"""The tables of a study's page, and the frames of its charts."""

from collections.abc import Mapping
from collections.abc import Sequence
import html
import re

from t2x.sweeps import axes as axes_lib
from t2x.sweeps import records as records_lib
from t2x.sweeps import report_data
from t2x.sweeps import space
from t2x.sweeps import study as study_lib
from t2x.tracking import html_page

_KINDS = (
  'complete',
  'diverged',
  'pruned',
  'failed',
  'running',
  'interrupted',
)
_NUM_BEST = 5
_MISSING = '<span class="missing">–</span>'

# What marks trials of a kind in the charts: the body of an SVG image.
_KEYS = {
  'pruned': '<path class="line pruned" d="M0,7H24"/>'
  '<circle class="dot pruned" cx="12" cy="7" r="3.5"/>',
  'diverged': '<path class="mark diverged" d="M8,3l8,8m0,-8l-8,8"/>',
  'failed': '<path class="mark failed" d="M8,3h8v8h-8z"/>',
  'running': '<path class="line running" d="M0,7H24"/>',
  'interrupted': '<path class="line interrupted" d="M0,7H24"/>',
}


def counts(records: Sequence[records_lib.Record]) -> dict[str, int]:
  """Returns the number of trials of each kind that there is."""
  kinds = [report_data.kind(record) for record in records]
  return {kind: kinds.count(kind) for kind in _KINDS if kind in kinds}


def chart(name: str, caption: str, legend: str, axis: int | None = None) -> str:
  """Returns the frame that the page's script draws a chart into.

  Args:
    name: kind of the chart, as in report_charts.js.
    caption: title of the chart.
    legend: HTML of its legend.
    axis: index of the parameter that it is of.
  """
  more = '' if axis is None else f' data-axis="{axis}"'
  return (
    f'<figure data-chart="{name}"{more}><figcaption>{html.escape(caption)}'
    f'</figcaption>{legend}<div class="chart" role="region" tabindex="0" '
    f'aria-label="{html.escape(caption)}"></div><p class="note"></p></figure>'
  )


def slices(metric: str, axes: Sequence[axes_lib.ParameterAxis]) -> str:
  """Returns the frames of the charts of the metric by each parameter."""
  frames = (
    chart('slice', f'{metric} by {axis.name}', '', i)
    for i, axis in enumerate(axes)
  )
  return f'<div class="slices">{"".join(frames)}</div>'


def legend(
  records: Sequence[records_lib.Record], *, with_best: bool = False
) -> str:
  """Returns the legend of the charts that show trials of all kinds.

  Args:
    records: records of a study.
    with_best: whether the chart has a line of the best result so far.
  """
  found = counts(records)
  keys = []
  if 'complete' in found:
    keys.append('best<i class="ramp"></i>worst, by rank')
  keys += [
    f'<svg viewBox="0 0 24 14" aria-hidden="true">{key}</svg>{kind}'
    for kind, key in _KEYS.items()
    if kind in found
  ]
  if with_best:
    line = '<path class="best-line" d="M0,7H24"/>'
    keys.append(
      f'<svg viewBox="0 0 24 14" aria-hidden="true">{line}</svg>best so far'
    )
  body = ''.join(f'<span class="key">{key}</span>' for key in keys)
  return f'<div class="legend">{body}</div>'


def best(study: study_lib.Study, records: Sequence[records_lib.Record]) -> str:
  """Returns a table of the best trials, and how their settings differ."""
  found = records_lib.ranked(records, study.sweep.direction, _NUM_BEST)
  if not found:
    return '<p>No trial has a finite result yet.</p>'
  head = ['', *(f'trial {record.trial.number}' for record in found)]
  values = [html_page.number(record.value or 0.0) for record in found]
  body = _row(study.sweep.metric, values, '')
  for name in study.sweep.parameters:
    texts = [value_text(record.trial.point[name]) for record in found]
    body += _row(name, texts, 'same' if len({*texts}) == 1 else 'other')
  body += _row('runs, in trials/', [' '.join(r.trial.runs) for r in found], '')
  note = ''
  if len(found) > 1:
    note = '<p class="note">Settings in bold differ among them.</p>'
  at_end = _at_an_end(study, found[0])
  if at_end:
    note += (
      f'<p class="note">The best value of {html.escape(", ".join(at_end))} is '
      'the last of its range: better ones may lie beyond.</p>'
    )
  return f'<div class="best">{html_page.table(head, body)}</div>{note}'


def _at_an_end(study: study_lib.Study, record: records_lib.Record) -> list[str]:
  """Returns the parameters of which a trial has the least or greatest value."""
  result = []
  for name, parameter in study.sweep.parameters.items():
    value, ends = record.trial.point[name], parameter.ends
    numbers = all(
      isinstance(end, int | float) and not isinstance(end, bool) for end in ends
    )
    if numbers and len(ends) > 2 and value in (min(ends), max(ends)):
      result.append(name)
  return result


def _row(name: str, texts: Sequence[str], mark: str) -> str:
  mark = mark and f' class="{mark}"'
  # Long names may be broken between their parts.
  name = re.sub(r'([._/])', r'\1<wbr>', html.escape(name))
  cells = ''.join(f'<td{mark}>{html.escape(text)}</td>' for text in texts)
  return f'<tr><th scope="row">{name}</th>{cells}</tr>'


def value_text(value: space.Value) -> str:
  """Returns a parameter's value for a table, numbers with five digits."""
  return f'{value:.5g}' if isinstance(value, float) else space.text(value)


def trials(
  study: study_lib.Study,
  records: Sequence[records_lib.Record],
  axes: Sequence[axes_lib.ParameterAxis],
) -> str:
  """Returns the table of all trials, below what filters it.

  Args:
    study: the study.
    records: its records.
    axes: axes of its parameters.
  """
  body = ''.join(_trial(record, axes) for record in records)
  said = ''
  if any(r.value is None and r.last_value is not None for r in records):
    said = 'A value in parentheses is the last of a trial without a result. '
  return (
    f'{_filters(records)}<div class="wide trials" role="region" tabindex="0" '
    f'aria-label="All trials"><table><thead><tr>'
    f'{_headers(study.sweep.metric, axes)}</tr></thead><tbody>{body}</tbody>'
    f'</table></div><p class="note">{said}Charts show the trials that the '
    'table shows; hover over a mark to see its trial, click to scroll the '
    'table to it.</p>'
  )


def _filters(records: Sequence[records_lib.Record]) -> str:
  boxes = ''.join(
    f'<label><input type="checkbox" value="{kind}" checked> {kind} ({n:,})'
    '</label>'
    for kind, n in counts(records).items()
  )
  return (
    '<div class="bar" hidden><input type="search" id="search" '
    'placeholder="Filter, as in: adamw 0.01" aria-label="Filter of trials">'
    f'{boxes}<output id="count" aria-live="polite"></output></div>'
  )


def _headers(metric: str, axes: Sequence[axes_lib.ParameterAxis]) -> str:
  columns = [('n', 'trial', ''), ('s', 'state', ''), ('v', metric, '')]
  columns += [(f'p{i}', a.short, a.name) for i, a in enumerate(axes)]
  columns += [('last', 'step', ''), ('t', 'seconds', '')]
  columns += [('f', 'failures', ''), ('e', 'note', '')]
  numbers = {f'p{i}' for i, axis in enumerate(axes) if not axis.labels}
  numbers |= {'n', 'v', 'last', 't', 'f'}
  cells = ''
  for key, name, title in columns:
    mark = '' if key in numbers else ' class="left"'
    title = title and f' title="{html.escape(title)}"'
    order = 'ascending' if key == 'n' else 'none'
    cells += (
      f'<th scope="col" data-key="{key}" aria-sort="{order}"{mark}{title}>'
      f'<button type="button">{html.escape(name)}</button></th>'
    )
  return cells


def _trial(
  record: records_lib.Record, axes: Sequence[axes_lib.ParameterAxis]
) -> str:
  trial, kind = record.trial, report_data.kind(record)
  cells = [f'<td class="left"><span class="state {kind}">{kind}</span></td>']
  cells.append(f'<td>{_result(record)}</td>')
  for axis in axes:
    mark = ' class="left"' if axis.labels else ''
    text = html.escape(value_text(trial.point[axis.name]))
    cells.append(f'<td{mark}>{text}</td>')
  seconds = record.seconds
  texts = [
    None if record.last_step is None else f'{record.last_step:,}',
    None if seconds is None else f'{seconds:,.1f}',
    None if record.failures is None else f'{record.failures:,}',
  ]
  cells += [f'<td>{_MISSING if t is None else t}</td>' for t in texts]
  cells.append(_note(record))
  return (
    f'<tr data-trial="{trial.number}"><th scope="row">{trial.number}</th>'
    f'{"".join(cells)}</tr>'
  )


def _result(record: records_lib.Record) -> str:
  if record.diverged:
    return 'diverged'
  if record.value is not None:
    return html_page.number(record.value)
  last = records_lib.finite(record.last_value)
  if last is None:
    return _MISSING
  said = f'after step {record.last_step:,}'
  return (
    f'<span class="missing" title="{said}">({html_page.number(last)})</span>'
  )


def _note(record: records_lib.Record) -> str:
  text = html.escape(record.error)
  return f'<td class="said" title="{text}">{text}</td>' if text else '<td></td>'


def costs(
  records: Sequence[records_lib.Record], flops: Mapping[int, float] | None
) -> str:
  """Returns a table of what the trials of each state have cost.

  Args:
    records: records of a study.
    flops: FLOPs by number of the trial; None where they are not known.
  """
  groups: dict[str, list[records_lib.Record]] = {}
  for kind in counts(records):
    groups[kind] = [r for r in records if report_data.kind(r) == kind]
  total = sum(r.seconds or 0.0 for r in records)
  head = ['', 'trials', 'time in steps', 'share', 'failures']
  head += [] if flops is None else ['TFLOP, estimated']
  body = ''
  for name, group in {**groups, 'all': list(records)}.items():
    seconds = sum(r.seconds or 0.0 for r in group)
    cells = [f'{len(group):,}', html_page.duration(seconds)]
    cells.append(f'{seconds / total:.0%}' if total else '–')
    cells.append(f'{sum(r.failures or 0 for r in group):,}')
    if flops is not None:
      sum_flops = sum(flops[r.trial.number] for r in group)
      cells.append(f'{sum_flops / 1e12:,.3g}')
    body += (
      f'<tr><th scope="row">{name}</th>{html_page.cells("td", cells)}</tr>'
    )
  return html_page.table(head, body) + _cost_note(flops is None)


def _cost_note(is_unknown: bool) -> str:
  said = (
    'Trials that are running count from their end on. The first trial of a '
    'shape compiles its program, in its time. '
  )
  if is_unknown:
    said += 'FLOPs could not be estimated, or are of too many shapes.'
  else:
    said += (
      'FLOPs are of matrix products in train steps, without evaluations and '
      'without steps that were repeated.'
    )
  return f'<p class="note">{said}</p>'
