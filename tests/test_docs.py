"""The documentation site builds without a warning, and leaves nothing out."""

import importlib
import os
import pathlib
import re
import subprocess
import sys

import extras
import pytest

_ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='module')
def docs_pages():
  extras.need('griffe', extra='docs')
  return importlib.import_module('docs_pages')


@pytest.fixture(scope='module')
def docs_entries(docs_pages):
  return docs_pages.docs_entries


@pytest.mark.slow
def test_the_site_builds_without_warnings(docs_pages, tmp_path):
  extras.need('zensical', extra='docs')
  environment = os.environ | {'PYTHONPATH': str(_ROOT)}
  for folder, command in (
    (_ROOT, ['scripts/docs_pages.py', str(tmp_path)]),
    (tmp_path, ['-m', 'zensical', 'build', '--strict']),
  ):
    done = subprocess.run(
      [sys.executable, *command],
      cwd=folder,
      env=environment,
      capture_output=True,
      text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
  site = tmp_path / 'site'
  assert 'Two commands' in (site / 'index.html').read_text()
  page = (site / 'api' / 't2x' / 'parallel' / 'sharding.html').read_text()
  for name in ('Rules', 'constrain', 'to_spec'):
    assert f'id="t2x.parallel.sharding.{name}"' in page
  page = (site / 'config' / 'train.html').read_text()
  assert 'num_steps' in page and '1000' in page
  for name in docs_pages.modules():
    path = site.joinpath('api', *name.split('.'))
    assert path.with_suffix('.html').exists() or (path / 'index.html').exists()


def test_every_config_field_has_a_meaning(docs_pages):
  assert docs_pages.undocumented() == []


def test_every_kind_is_in_the_reference(docs_pages):
  pages = docs_pages.config_pages()
  for name, kinds in {
    'model': ('encoder_decoder', 'bigbird', 'convolution', 'alibi', 'rmsnorm'),
    'data': ('ul2', 'mixture', 'by_loss', 'grad_norm', 'pretrained', 'stream'),
    'optim': ('adafactor', 'muon'),
  }.items():
    text = pages[f'config/{name}.md']
    for kind in kinds:
      assert re.search(rf'^##+ `[\w.]+={kind}`', text, re.M), kind
    links = set(re.findall(r'\]\(#([\w-]+)\)', text))
    assert links <= set(re.findall(r'\{ #([\w-]+) \}', text))


def test_a_field_has_type_default_and_meaning(docs_pages):
  text = docs_pages.config_pages()['config/train.md']
  assert '| `num_steps` | int or none | `1000` | updates in all' in text
  assert '| `offload` | `none`, `optimizer` | `none` |' in text


def test_pages_link_within_the_site(docs_pages):
  relinked = docs_pages._relinked
  readme = relinked('[a](docs/running.md#layouts)', 'README.md')
  assert readme == '[a](running.md#layouts)'
  topic = relinked('[b](../../BUILD_NOTES.md)', 'docs/decisions/data.md')
  assert topic == '[b](../build_notes.md)'
  assert relinked('[c](https://x.org)', 'README.md') == '[c](https://x.org)'


def test_entries_of_several_names_are_split(docs_entries):
  doc = 'S.\n\nArgs:\n  q, k: arrays\n    (B, T).\n  v: values [B].'
  assert docs_entries.markdown(doc) == (
    'S.\n\nArgs:\n  q: arrays\n    (B, T).\n  k: arrays\n    (B, T).\n'
    '  v: values \\[B].'
  )


def test_what_is_laid_out_by_hand_becomes_code(docs_entries):
  doc = 'S:\n  a  [1]\n  b  2\n\nText `x[1]`.\n\n>>> f(1)\n[2]\n\nEnd.'
  assert docs_entries.markdown(doc).split('\n\n') == [
    'S:',
    '```python\na  [1]\nb  2\n```',
    '\nText `x[1]`.',
    '\n```python\n>>> f(1)\n[2]\n```',
    '\nEnd.',
  ]
