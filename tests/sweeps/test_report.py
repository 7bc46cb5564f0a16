"""The report of a study: its page, its tables, and figures for notebooks."""

import csv
import html.parser
import io
import json
import math
import re

import matplotlib
import matplotlib.pyplot as plt
import pytest
import small_sweep
import sweep_report

from t2x.sweeps import axes as axes_lib
from t2x.sweeps import cost
from t2x.sweeps import figures
from t2x.sweeps import importance
from t2x.sweeps import ownership
from t2x.sweeps import points
from t2x.sweeps import records
from t2x.sweeps import report
from t2x.sweeps import search
from t2x.sweeps import space
from t2x.sweeps import study as study_lib

_NASTY = '<b>rates <i>& "more"'
_ERROR = 'after step 4, exit status 1: </script><script>alert(1)</script>'
_PARAMETERS = {
  'optim.learning_rate': space.LogUniform(1e-4, 1.0),
  'optim': ['adamw', 'lion'],
  'model.num_layers': space.Integers(1, 4),
  'optim.b1, optim.b2': [(0.9, 0.95), (0.9, 0.999)],
}


def _study(tmp_path, name='study', **changes):
  changes = {
    'parameters': _PARAMETERS,
    'search': search.RandomSearch(num_trials=14, seed=1),
    **changes,
  }
  facts = small_sweep.facts(tmp_path, **changes)
  return study_lib.create(tmp_path / name, facts)


def _candidates(study):
  sweep = study.sweep
  for point in sweep.search.points(sweep.parameters):
    yield points.candidate(study.facts.config, sweep, point)


def _add(study, found, state, value=None, curve=(), **outcome):
  workers = ownership.Workers(study.directory)
  if state == 'running':  # By this process.
    workers._beat()
  trial = study.begin(found, found.key, workers.own)
  for step, metric in curve:
    study.report(trial, step, metric)
  if state != 'running':
    study.finish(study.trial(trial.number), state, value, **outcome)


def _loss(found):
  """Loss of a point: of the rate alone."""
  return (math.log10(found.point['optim.learning_rate']) + 2) ** 2 + 1


def _fill(study, complete):
  """Adds complete trials, and one of each other state."""
  found = list(_candidates(study))
  for candidate in found[:complete]:
    loss = _loss(candidate)
    curve = [(4, loss + 1), (8, loss)]
    facts = {'seconds': 2.5, 'failures': 0}
    _add(study, candidate, 'complete', loss, curve, **facts)
  others = iter(found[complete:])
  facts = {'seconds': 1.0, 'failures': 0}
  _add(study, next(others), 'pruned', curve=[(4, 7.25)], **facts)
  failed = {'seconds': 0.5, 'failures': 2, 'error': _ERROR}
  _add(study, next(others), 'failed', curve=[(2, 6.5)], **failed)
  diverged = {'seconds': 0.25, 'failures': 1, 'error': 'diverged: loss'}
  curve = [(2, 9.0), (4, math.inf)]
  _add(study, next(others), 'complete', math.inf, curve, **diverged)
  _add(study, next(others), 'running')


@pytest.fixture(scope='module')
def study(tmp_path_factory):
  result = _study(tmp_path_factory.mktemp('report'), _NASTY)
  _fill(result, complete=10)
  return result


@pytest.fixture(scope='module')
def text(study):
  return report.page(study)


class _Page(html.parser.HTMLParser):
  """Collects tags and table rows, and checks the nesting."""

  _VOID = {'meta', 'input', 'wbr'}

  def __init__(self, text):
    super().__init__()
    self.tags, self.rows, self.texts, self._open = [], [], [], []
    self.feed(text)
    assert not self._open, self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag == 'tr':
      self.rows.append([])
    if tag in ('td', 'th') and self.rows:
      self.rows[-1].append('')
    if tag not in self._VOID:
      self._open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)
    if {'td', 'th'} & {*self._open}:
      self.rows[-1][-1] += data

  def all(self, name, attribute):
    return [
      a[attribute] for tag, a in self.tags if tag == name and a.get(attribute)
    ]


def _data(text):
  found = re.search(
    r'<script type="application/json"[^>]*>(.*?)</script>', text
  )
  assert found is not None
  return json.loads(found[1])


def test_the_page_shows_every_trial(study, text):
  page = _Page(text)
  rows = {row[0]: row for row in page.rows}
  trials = study.trials()
  assert [str(t.number) for t in trials] == [
    row[0] for row in page.rows if row[0].isdigit()
  ]
  first = trials[0]
  assert rows['0'][1:5] == [
    'complete',
    f'{first.value:.4g}',
    f'{first.point["optim.learning_rate"]:.5g}',
    first.point['optim'],
  ]
  assert rows['0'][-4:] == ['8', '2.5', '0', '']
  assert [rows[n][1:3] for n in ('10', '11', '12', '13')] == [
    ['pruned', '7.25'],
    ['failed', '(6.5)'],
    ['diverged', 'diverged'],
    ['running', '–'],
  ]
  assert rows['13'][-4:] == ['–', '–', '–', '']
  assert rows['11'][-1] == _ERROR


def test_headlines_and_best(study, text):
  page = _Page(text)
  best = study.best()
  tiles = dict(re.findall('<dt>(.*?)</dt><dd>(.*?)</dd>', text))
  assert tiles['best eval/train/loss'] == f'{best.value:.4g}'
  assert tiles['trials'] == '14 of 14'
  assert [tiles[k] for k in ('complete', 'pruned', 'failed', 'diverged')] == [
    '10',
    '1',
    '1',
    '1',
  ]
  assert tiles['time in steps'] == '27 s'
  assert tiles['failures of runs'] == '3'
  for name, value in space.settings_of(best.point).items():
    assert f'>--set {name}={value}</span>' in text.replace(
      '&#x27;', ''
    ).replace("'", '')
  order = sorted(study.trials()[:10], key=lambda t: t.value)[:5]
  assert ['', *(f'trial {t.number}' for t in order)] in page.rows
  assert 'PED-ANOVA' in text
  rows = {row[0]: row for row in page.rows}
  assert rows['all'][1:5] == ['14', '27 s', '100%', '3']
  assert rows['failed'][1:3] == ['1', '0 s']


def test_texts_of_the_study_are_escaped(text):
  assert '<b>rates' not in text and '<script>alert' not in text
  assert '<h1>&lt;b&gt;rates &lt;i&gt;&amp; &quot;more&quot;</h1>' in text
  assert _data(text)['trials'][11]['e'] == _ERROR
  page = _Page(text)
  assert [tag for tag, _ in page.tags].count('script') == 2
  # Nothing is loaded from anywhere.
  assert not page.all('script', 'src') + page.all('link', 'href')
  assert not re.search(r'url\((?!#)|@import|https?://(?!www\.w3\.org/)', text)


def test_the_data_of_the_charts(study, text):
  data = _data(text)
  axes = {axis['name']: axis for axis in data['axes']}
  assert [a['scale'] for a in axes.values()] == [
    'log',
    'category',
    'linear',
    'category',
  ]
  assert axes['optim']['labels'] == ['adamw', 'lion']
  assert axes['optim.b1, optim.b2']['labels'] == ['(0.9,0.95)', '(0.9,0.999)']
  assert axes['model.num_layers']['whole']
  for shown, trial in zip(data['trials'], study.trials(), strict=True):
    point = trial.point
    assert shown['p'] == [
      pytest.approx(point['optim.learning_rate'], rel=1e-5),
      ['adamw', 'lion'].index(point['optim']),
      point['model.num_layers'],
      [(0.9, 0.95), (0.9, 0.999)].index(point['optim.b1, optim.b2']),
    ]
  states = [t['s'] for t in data['trials']]
  assert states[10:] == ['pruned', 'failed', 'diverged', 'running']
  # No infinity: it would be no JSON, and no axis could hold it.
  assert data['trials'][12]['v'] is None
  assert data['trials'][12]['c'] == [[2], [9.0]]
  assert data['trials'][13]['c'] == [[], []]


def test_the_page_sorts_filters_and_says_what_it_shows(text):
  page = _Page(text)
  headers = [a for tag, a in page.tags if tag == 'th' and 'data-key' in a]
  assert [a['data-key'] for a in headers] == [
    *('n', 's', 'v', 'p0', 'p1', 'p2', 'p3', 'last', 't', 'f', 'e')
  ]
  assert [a['aria-sort'] for a in headers] == ['ascending'] + ['none'] * 10
  assert [tag for tag, _ in page.tags].count('button') == len(headers)
  boxes = [a['value'] for _, a in page.tags if a.get('type') == 'checkbox']
  assert boxes == ['complete', 'diverged', 'pruned', 'failed', 'running']
  for script in ('function sortBy', 'function visibleTrials', "'role', 'img'"):
    assert script in text
  assert page.all('figure', 'data-chart') == [
    *('curves', 'history', 'parallel', *['slice'] * 4, 'seconds')
  ]
  assert 'prefers-color-scheme: dark' in text and '<noscript>' in text


def test_a_study_without_trials(tmp_path):
  study = _study(tmp_path)
  text = report.page(study)
  assert 'There are no trials yet.' in text and 'none yet' in text
  assert _Page(text).rows == []
  assert records.to_csv(study, []).count('\n') == 1
  assert json.loads(records.to_json(study, []))['trials'] == []


def test_few_trials_have_no_importance(tmp_path):
  study = _study(tmp_path)
  found = next(_candidates(study))
  _add(study, found, 'complete', 2.0, [(8, 2.0)], seconds=1.0, failures=0)
  text = report.page(study)
  assert 'needs 10 complete trials with finite results, and there are 1' in text


def test_all_trials_failed(tmp_path):
  study = _study(tmp_path, direction='maximize')
  found = list(_candidates(study))
  _add(study, found[0], 'failed', error='no reason')
  _add(study, found[1], 'complete', -math.inf, error='diverged: loss')
  text = report.page(study)
  assert 'No trial has a finite result yet.' in text
  rows = {row[0]: row for row in _Page(text).rows}
  assert rows['0'][1:3] == ['failed', '–']
  assert rows['1'][1:3] == ['diverged', 'diverged']


def test_csv_and_json_are_the_study(study):
  found = records.of(study)
  rows = list(csv.DictReader(io.StringIO(records.to_csv(study, found))))
  data = json.loads(records.to_json(study, found))
  assert data['metric'] == 'eval/train/loss'
  trials = study.trials()
  for trial, row, kept in zip(trials, rows, data['trials'], strict=True):
    workdir = str(study.directory / 'trials' / trial.key)
    error = trial.outcome.get('error')
    rate = trial.point['optim.learning_rate']
    assert float(row['optim.learning_rate']) == rate
    assert row['optim.b1, optim.b2'] == space.text(
      trial.point['optim.b1, optim.b2']
    )
    value = trial.value
    assert (row['value'] or None) == (None if value is None else str(value))
    last = max(trial.values, default=None)
    expected = [trial.number, trial.key, trial.state, last]
    expected += [trial.outcome.get('seconds'), trial.outcome.get('failures')]
    names = ('number', 'key', 'state', 'last_step', 'seconds', 'failures')
    assert [row[name] for name in names] == [
      '' if v is None else str(v) for v in expected
    ]
    assert [kept[name] for name in names] == expected
    assert (row['error'], row['workdir']) == (error or '', workdir)
    assert (kept['error'], kept['workdirs']) == (error, [workdir])
    assert kept['point'] == json.loads(json.dumps(dict(trial.point)))
    assert kept['diverged'] == (value == math.inf)
    assert kept['value'] == (None if kept['diverged'] else value)
    assert kept['values'] == {
      str(s): None if math.isinf(v) else v for s, v in trial.values.items()
    }
    assert (kept['ended'] is None) == (trial.state == 'running')


def test_seeds_have_a_workdir_each(tmp_path):
  study = _study(tmp_path, seeds=(0, 1))
  found = next(_candidates(study))
  _add(study, found, 'complete', 2.0, [(8, 2.0)], seconds=4.0, failures=0)
  kept = records.of(study)
  keys = [run.key for run in found.runs]
  workdirs = [str(study.workdir(key)) for key in keys]
  assert kept[0].workdirs == (*workdirs,) and len(workdirs) == 2
  (row,) = csv.DictReader(io.StringIO(records.to_csv(study, kept)))
  assert row['workdir'] == ';'.join(workdirs)
  text = report.page(study)
  assert 'mean over seeds 0, 1' in text and ' '.join(keys) in text
  alone = _study(tmp_path, 'alone')
  _add(alone, next(_candidates(alone)), 'complete', 2.0, [(8, 2.0)])
  flops = [cost.flops(of, records.of(of)) for of in (alone, study)]
  assert 2 * flops[0][0] == flops[1][0] > 0


def test_flops_grow_with_steps_and_layers(study):
  found = cost.flops(study, records.of(study))
  assert found is not None
  trials = study.trials()
  for a in trials[:10]:
    for b in trials[:10]:
      layers = [t.point['model.num_layers'] for t in (a, b)]
      if layers[0] < layers[1]:
        assert 0 < found[a.number] < found[b.number]
  pruned, last = found[10], trials[10].point['model.num_layers']
  alike = [t for t in trials[:10] if t.point['model.num_layers'] == last]
  for trial in alike:
    assert pruned == pytest.approx(found[trial.number] / 2)
  assert found[13] == 0


def test_flops_of_too_many_shapes_are_unknown(study, monkeypatch):
  monkeypatch.setattr(cost, '_MOST_STRUCTURES', 1)
  assert cost.flops(study, records.of(study)) is None


def test_importance_finds_the_rate(study):
  found = importance.of(study)
  assert next(iter(found.shares)) == 'optim.learning_rate'
  assert sum(found.shares.values()) == pytest.approx(1.0)
  assert '10 complete trials' in found.said and 'rough' in found.said


def test_axes():
  of = lambda **parameters: axes_lib.of(
    {name: space.of(p) for name, p in parameters.items()}
  )
  assert [a.scale for a in of(a=[1e-3, 1e-2], b=[3, 5], c=[True, False])] == [
    *('log', 'linear', 'category')
  ]
  assert [
    a.scale for a in of(a=space.Uniform(0.1, 50.0), b=space.Integers(1, 9))
  ] == ['log', 'linear']
  assert [a.scale for a in of(a=space.LogUniform(1.0, 5.0))] == ['log']
  (axis,) = of(a=[None, 0.1])
  assert axis.labels == ('none', '0.1') and axis.place(0.1) == 1
  short = axes_lib.short_names(['model.dim', 'mlp.dim', 'a.b, a.c', 'optim'])
  assert [*short.values()] == ['model.dim', 'mlp.dim', 'b, c', 'optim']


def test_files_lie_beside_the_page(study, tmp_path):
  kept = (study.directory / 'study.json').read_text()
  paths = report.write(study.directory)
  assert [p.name for p in paths] == ['report.html', 'report.csv', 'report.json']
  assert all(path.parent == study.directory for path in paths)
  assert (study.directory / 'study.json').read_text() == kept
  paths = report.write(study.directory, tmp_path / 'new' / 'a.html')
  assert [path.name for path in paths] == ['a.html', 'a.csv', 'a.json']
  assert all(path.exists() for path in paths)


@pytest.mark.parametrize(
  ['output', 'said'],
  [('report.txt', 'end it in .html'), ('study.html', 'makes a directory a')],
)
def test_a_page_must_not_hide_something_else(study, output, said):
  with pytest.raises(ValueError, match=said):
    report.write(study.directory, study.directory / output)


def test_no_study(tmp_path):
  with pytest.raises(ValueError, match='holds no study'):
    report.write(tmp_path)


def test_the_script_has_its_flags():
  assert '--study=DIR [--output=FILE.html]' in sweep_report.__doc__


def test_figures(study):
  with matplotlib.rc_context({'backend': 'agg'}):
    curves = figures.learning_curves(study)
    slices = figures.slices(study)
    bars = figures.importance(study)
  (axes,) = curves.axes
  legend = [text.get_text() for text in axes.get_legend().get_texts()]
  assert legend == [
    *('best', 'worst, by rank', 'pruned', 'running', 'diverged', 'failed')
  ]
  visible = [axes for axes in slices.axes if axes.get_visible()]
  assert [axes.get_xlabel() for axes in visible] == [
    *('learning_rate', 'optim', 'num_layers', 'b1, b2')
  ]
  assert visible[0].get_xscale() == 'log'
  # What diverged is marked, and the axis is that of the others.
  worst = max(t.value for t in study.trials()[:10])
  assert visible[0].get_ylim()[1] < worst + 9
  assert len(bars.axes[0].patches) == len(_PARAMETERS)
  for figure in (curves, slices, bars):
    figure.canvas.draw()
    plt.close(figure)
