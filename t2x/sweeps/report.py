"""Writes the report of a study: one page, and its trials as CSV and JSON.

The page needs no network. Its charts are drawn in the reader's browser, from
data that stand in the page once; tables and results are there without scripts.
"""

from collections.abc import Sequence
import datetime
import html
from importlib import resources
import shlex
import statistics

from etils import epath

from t2x import files
from t2x.sweeps import axes as axes_lib
from t2x.sweeps import cost
from t2x.sweeps import importance
from t2x.sweeps import records as records_lib
from t2x.sweeps import report_data
from t2x.sweeps import report_tables
from t2x.sweeps import space
from t2x.sweeps import study as study_lib
from t2x.tracking import html_page

FILE = 'report.html'
# One script in the page, in this order.
_SCRIPTS = ('report_scales.js', 'report_charts.js', 'report_table.js')
_NO_SCRIPTS = (
  '<noscript><p class="note">Charts, sorting and filtering need JavaScript, '
  'which is off. The tables are complete without it.</p></noscript>'
)


def write(
  directory: epath.PathLike, output: epath.PathLike | None = None
) -> tuple[epath.Path, ...]:
  """Writes the report of a study.

  Args:
    directory: directory of the study, local or gs://.
    output: path of the page, which ends in .html; by default report.html in
      the directory.

  Returns:
    The paths of the page, of the CSV and of the JSON; these two lie beside the
    page, under its name.

  Raises:
    ValueError: there is no study, or `output` is no place for a page.
  """
  paths = _paths(directory, output)
  study = study_lib.read(directory)
  records = records_lib.of(study)
  texts = (
    page(study, records),
    records_lib.to_csv(study, records),
    records_lib.to_json(study, records),
  )
  paths[0].parent.mkdir(parents=True, exist_ok=True)
  for path, text in zip(paths, texts):
    files.write_whole(path, text)
  return paths


def _paths(
  directory: epath.PathLike, output: epath.PathLike | None
) -> tuple[epath.Path, ...]:
  path = files.path(directory) / FILE if output is None else files.path(output)
  if path.suffix != '.html':
    raise ValueError(
      f'--output={output} is not the name of a page; end it in .html. The CSV '
      'and the JSON are written beside it.'
    )
  paths = tuple(path.with_suffix(end) for end in ('.html', '.csv', '.json'))
  if paths[-1].name == study_lib.FILE:
    raise ValueError(
      f'--output={output} would put {study_lib.FILE} beside it, which is the '
      'file that makes a directory a study. Use another name, such as '
      f'{FILE}.'
    )
  return paths


def page(
  study: study_lib.Study,
  records: Sequence[records_lib.Record] | None = None,
) -> str:
  """Returns the HTML of a study's report.

  Args:
    study: the study.
    records: its records; None reads them.
  """
  records = records_lib.of(study) if records is None else records
  axes = axes_lib.of(study.sweep.parameters)
  return html_page.PAGE.format(
    title=html.escape(study.directory.name),
    style=html_page.STYLE + _resource('report.css'),
    body='\n'.join(filter(None, _sections(study, records, axes))),
  )


def _sections(
  study: study_lib.Study,
  records: Sequence[records_lib.Record],
  axes: Sequence[axes_lib.ParameterAxis],
) -> list[str]:
  head = [_subtitle(study), _NO_SCRIPTS, _headlines(study, records)]
  if not records:
    return [*head, '<p>There are no trials yet.</p>']
  legend = report_tables.legend(records)
  pictures = {
    'Learning curves': report_tables.chart(
      'curves', f'{study.sweep.metric} by step', legend
    ),
    'Results': report_tables.chart(
      'history',
      f'{study.sweep.metric} by trial, and the best so far',
      report_tables.legend(records, with_best=True),
    )
    + report_tables.chart('parallel', 'Parameters and results', legend),
    'Parameters': report_tables.slices(study.sweep.metric, axes),
  }
  if all(r.value is None and r.last_value is None for r in records):
    said = 'No trial has a value yet: charts come with the first one.'
    body = report_tables.trials(study, records, axes)
    return [*head, f'<p>{said}</p>', html_page.section('Trials', body)]
  flops = cost.flops(study, records)
  sections = {
    'Best trials': report_tables.best(study, records),
    'Trials': report_tables.trials(study, records, axes),
    **pictures,
    'Importance of parameters': _importance(importance.of(study), axes),
    'Cost': report_tables.costs(records, flops)
    + report_tables.chart('seconds', 'Seconds in steps by trial', ''),
  }
  return [
    *head,
    *(html_page.section(title, body) for title, body in sections.items()),
    '<div class="tip" id="tip" hidden></div>',
    report_data.element(study, records, axes),
    f'<script>\n{"".join(map(_resource, _SCRIPTS))}</script>',
  ]


def _resource(name: str) -> str:
  file = resources.files('t2x.sweeps') / name
  return file.read_text(encoding='utf-8')


def _subtitle(study: study_lib.Study) -> str:
  sweep, facts = study.sweep, study.facts
  parts = [
    f'{facts.experiment}: {sweep.search.kind} over '
    f'{"; ".join(sweep.parameters)}',
    f'{sweep.direction} {sweep.metric} ({sweep.result} row)',
  ]
  if sweep.seeds:
    seeds = ', '.join(map(str, sweep.seeds))
    parts.append(f'mean over seeds {seeds}')
  if sweep.pruning is not None:
    parts.append(f'pruned by {sweep.pruning.kind}')
  now = datetime.datetime.now(datetime.UTC)
  parts.append(f'as of {now:%Y-%m-%d %H:%M} UTC')
  return f'<p class="sub">{html.escape("; ".join(parts))}</p>'


def _headlines(
  study: study_lib.Study, records: Sequence[records_lib.Record]
) -> str:
  counts = report_tables.counts(records)
  said = f'{len(records)} of {study.sweep.num_points}'
  figures = [('trials', said)]
  figures += [(kind, f'{n:,}') for kind, n in counts.items()]
  best = records_lib.ranked(records, study.sweep.direction, 1)
  value = html_page.number(best[0].value or 0.0) if best else 'none yet'
  figures.insert(0, (f'best {study.sweep.metric}', value))
  seconds = [r.seconds for r in records if r.seconds is not None]
  if seconds:
    figures.append(('time in steps', html_page.duration(sum(seconds))))
    middle = html_page.duration(statistics.median(seconds))
    figures.append(('median of a trial', middle))
  failures = sum(r.failures or 0 for r in records)
  figures.append(('failures of runs', f'{failures:,}'))
  return html_page.tiles(figures) + ''.join(map(_command, best))


def _command(record: records_lib.Record) -> str:
  """Returns the settings of a trial, ready for a command line."""
  settings = space.settings_of(record.trial.point)
  parts = (shlex.quote(f'{name}={value}') for name, value in settings.items())
  text = ' '.join(f'<span>--set {html.escape(part)}</span>' for part in parts)
  return (
    f'<p class="note">Settings of the best, trial {record.trial.number}:</p>'
    f'<pre class="command">{text}</pre>'
  )


def _importance(
  found: importance.Importance, axes: Sequence[axes_lib.ParameterAxis]
) -> str:
  short = {axis.name: axis.short for axis in axes}
  bars = ''.join(
    f'<span title="{html.escape(name)}">{html.escape(short[name])}</span>'
    f'<i style="width:{share:.1%}"></i><b>{share:.0%}</b>'
    for name, share in found.shares.items()
  )
  bars = bars and f'<div class="card shares">{bars}</div>'
  return f'{bars}<p class="note">{html.escape(found.said)}</p>'
