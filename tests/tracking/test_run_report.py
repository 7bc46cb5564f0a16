import html.parser
import json
import math
import re

import pytest

from t2x.tracking import metrics
from t2x.tracking import run_report

_CONFIG = {'model': {'kind': 'decoder', 'note': '<b>&'}}
_SAMPLES = [{'prompt': 'a < b', 'text': '<script>alert(1)</script> & so on'}]


def _row(step, **more):
  return {
    'step': step,
    'loss': 8.0 / step,
    'grad_norm': 50.0 / step**2,
    'learning_rate': 1e-3,
    'tokens_per_second': 100.0 * step,
    'step_seconds': 2.0,
    'mfu': None,
    **more,
  }


def _rows():
  """Ten steps; set `a` is best at step 4, `b` has bits per byte too."""
  evals = {
    4: {'eval/a/loss': 2.0, 'eval/b/loss': 3.0, 'eval/b/bits_per_byte': 1.5},
    10: {'eval/a/loss': 2.5, 'eval/b/loss': 1.0, 'eval/b/bits_per_byte': 0.5},
  }
  return [_row(step, **evals.get(step, {})) for step in range(1, 11)]


@pytest.fixture
def workdir(tmp_path):
  folder = tmp_path / 'run <1>'
  with metrics.MetricsWriter(
    folder, start_step=0, num_steps=10, show=False
  ) as writer:
    for row in _rows():
      writer.write(row)
  (folder / 'config.json').write_text(json.dumps(_CONFIG))
  (folder / 'versions.json').write_text(json.dumps({'jax': '0.10.2'}))
  (folder / 'samples.json').write_text(json.dumps(_SAMPLES))
  return folder


class _Page(html.parser.HTMLParser):
  """Collects tags with their attributes, the text, and checks the nesting."""

  _VOID = {'meta'}

  def __init__(self, text):
    super().__init__()
    self.tags, self.texts, self._open = [], [], []
    self.feed(text)
    assert not self._open, self._open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in self._VOID:
      self._open.append(tag)

  def handle_endtag(self, tag):
    assert self._open.pop() == tag

  def handle_data(self, data):
    self.texts.append(data)

  def count(self, tag):
    return sum(name == tag for name, _ in self.tags)

  @property
  def text(self):
    return ' '.join(' '.join(self.texts).split())


def _table(text):
  """Returns set -> column -> cell."""
  cells = lambda row: re.findall(r'<t[hd]>(.*?)</t[hd]>', row)
  head, *body = (cells(row) for row in re.findall(r'<tr>(.*?)</tr>', text))
  return {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in body}


def test_the_page_needs_nothing_else(workdir):
  path = run_report.write(workdir)
  assert path.name == 'report.html' and path.parent == workdir
  text = path.read_text()
  page = _Page(text)
  assert not {'script', 'link', 'img', 'iframe'} & {t for t, _ in page.tags}
  for tag, attrs in page.tags:
    for name in ('src', 'href', 'xlink:href'):
      assert attrs.get(name, '#').startswith('#'), (tag, attrs)
  assert '@import' not in text and 'matplotlib' not in text
  assert not re.search(r'url\((?!#)', text)


def test_the_page_shows_what_ran_escaped(workdir):
  text = run_report.write(workdir).read_text()
  page = _Page(text)
  assert '<script' not in text
  assert 'run <1>' in page.text
  assert 'a < b <script>alert(1)</script> & so on' in page.text
  assert '"note": "<b>&"' in page.text
  assert 'jax 0.10.2' in page.text


def test_what_became_of_the_documents(workdir):
  facts = {
    'source': 'text_files',
    'duplicates': 'near',
    'read': 1234,
    'train': 1200,
    'validation': 30,
    'dropped': {'copy': 3, 'near_copy': 1},
    'list': '/data/<1>/dropped.jsonl',
  }
  none = {**facts, 'duplicates': 'none', 'dropped': {}, 'list': '/data/2'}
  text = json.dumps({'id': 'x', 'documents': {'one': facts, 'two': none}})
  (workdir / 'corpus.json').write_text(text)
  page = run_report.write(workdir).read_text()
  rows = _table(page[page.index('<h2>Documents') :])
  assert rows['one'] == {
    'source': 'text_files',
    'copies': 'near',
    'read': '1,234',
    'to train on': '1,200',
    'held out': '30',
    'dropped: copy': '3',
    'dropped: near copy': '1',
  }
  assert rows['two']['dropped: copy'] == '0'
  assert '/data/&lt;1&gt;/dropped.jsonl' in page and '/data/2' not in page
  (workdir / 'corpus.json').write_text('{"id": "of a run from before"}')
  assert '<h2>Documents' not in run_report.write(workdir).read_text()


def test_curves_follow_the_rows(workdir):
  page = _Page(run_report.write(workdir).read_text())
  # Loss, two evaluation metrics, gradient norm, rate, speed.
  assert page.count('figure') == page.count('svg') == 6
  for title in ('Loss', 'Evaluation loss', 'Evaluation bits per byte'):
    assert title in page.texts
  few = _Page(run_report.page(title='x', rows=[{'step': 1, 'loss': 2.0}]))
  assert few.count('figure') == 1


def test_the_table_has_final_and_best_values():
  table = _table(run_report.page(title='x', rows=_rows()))
  assert table['a'] == {
    'final loss': '2.5',
    'best loss': '2',
    'at step': '4',
    'final perplexity': f'{math.exp(2.5):.4g}',
    'final bits per byte': '-',
  }
  assert table['b']['final bits per byte'] == '0.5'
  assert table['b']['at step'] == '10'


def test_the_runs_own_perplexity_is_taken_where_it_has_one():
  rows = [_row(1, **{'eval/a/loss': 2.0, 'eval/a/perplexity': 5.0})]
  assert (
    _table(run_report.page(title='x', rows=rows))['a']['final perplexity']
    == '5'
  )


def test_headlines():
  figures = dict(run_report.headlines(_rows()))
  assert figures == {
    'final training loss': '0.8',
    'steps': '10',
    'tokens/s, median': '550',
    'time in steps': '20 s',
  }
  rows = [_row(1, mfu=0.25), _row(2, loss=None, non_finite=['loss'])]
  figures = dict(run_report.headlines(rows))
  assert figures['MFU, median'] == '25.0%'
  assert figures['final training loss'] == '8'
  assert figures['steps with a loss that is not finite'] == '1'
  many = dict(
    run_report.headlines([{'step': i, 'loss': i} for i in range(100)])
  )
  assert many['mean of the last 3'] == '98'


def test_a_row_stands_for_the_steps_since_the_last():
  rows = [{'step': step, 'step_seconds': 2.0} for step in (10, 20, 25)]
  assert run_report.training_seconds(rows) == 50.0


def test_a_run_without_rows_has_a_page():
  page = _Page(run_report.page(title='x', rows=[]))
  assert page.count('svg') == 0
  assert 'steps 0' in page.text


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(ValueError, match='has no metrics.jsonl; a report needs'):
    run_report.write(tmp_path)


def test_colors_come_from_the_page(workdir):
  text = run_report.write(workdir).read_text()
  svg = '\n'.join(re.findall(r'<svg.*?</svg>', text, re.DOTALL))
  assert 'stroke: var(--s1)' in svg and 'fill: var(--ink)' in svg
  # Nothing is left in a color that only one of light and dark can show.
  assert not re.findall(r'(?:fill|stroke): ?#\w+', svg)
  used = set(re.findall(r'var\((--\w+)\)', text))
  assert all(text.count(f'{name}: #') == 2 for name in used), used


def test_drawing_leaves_matplotlibs_settings_alone(workdir):
  import matplotlib

  before = dict(matplotlib.rcParams)
  run_report.write(workdir)
  assert dict(matplotlib.rcParams) == before
