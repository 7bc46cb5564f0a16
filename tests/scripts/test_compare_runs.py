"""Runs beside one another, from what they left."""

import json
import pathlib
import sys

import compare_runs
import pytest


@pytest.fixture
def compare(monkeypatch, capsys):
  def run(*arguments):
    monkeypatch.setattr(sys, 'argv', ['compare_runs.py', *map(str, arguments)])
    compare_runs.main()
    return capsys.readouterr().out

  return run


def write(workdir, slope, num=40):
  workdir.mkdir(parents=True)
  rows = [
    {'step': step, 'nll': 5.0 - slope * step, 'step_seconds': 3.0}
    for step in range(1, num + 1)
  ]
  for row in rows[19::20]:
    row['eval/validation/loss'] = row['nll'] + 0.25
  rows[4]['nll'] = None  # Not finite.
  text = ''.join(json.dumps(row) + '\n' for row in rows)
  (workdir / 'metrics.jsonl').write_text(text)
  return workdir


def test_table_picture_and_object(compare, tmp_path):
  one, two = write(tmp_path / 'one', 0.05), write(tmp_path / 'two', 0.1, 20)
  plot = tmp_path / 'plot.png'
  out = compare(one, f'{two}/', f'--plot={plot}', '--json')
  table = [line.split() for line in out.splitlines()[:3]]
  assert table[0] == ['steps', 'minutes', 'nll', 'eval/validation/loss']
  assert table[1] == ['one', '40', '2.0', '3', '3.25']
  assert table[2] == ['two', '20', '1.0', '3', '3.25']
  assert plot.stat().st_size > 10_000
  found = json.loads(out.splitlines()[-1])['runs']
  assert found['two']['points']['eval/validation/loss'] == [[20, 3.25]]
  assert len(found['one']['points']['nll']) == 39


def test_runs_of_one_name_keep_their_paths(compare, tmp_path):
  runs = [write(tmp_path / name / 'run', 0.05) for name in 'ab']
  out = compare(*runs)
  assert all(f'{run} ' in out for run in runs)


def test_the_commands_of_the_pages(compare, tmp_path, monkeypatch):
  root = pathlib.Path(__file__).parents[2]
  pages = [root / 'README.md', *(root / 'docs').glob('*.md')]
  lines = [line for page in pages for line in page.read_text().splitlines()]
  start = 'python scripts/compare_runs.py '
  commands = [line for line in lines if line.startswith(start)]
  monkeypatch.chdir(tmp_path)
  for number, command in enumerate(commands):
    arguments = command.removeprefix(start).split()
    for argument in arguments:
      if argument.startswith('runs/') and not pathlib.Path(argument).exists():
        write(pathlib.Path(argument), 0.01)
    plot = f'--plot=runs/{number}.png'
    assert plot.split('=')[0] in command
    out = compare(*[a for a in arguments if '--plot' not in a], plot)
    assert f'wrote runs/{number}.png' in out
  assert commands


def test_messages(compare, tmp_path, capsys):
  run = write(tmp_path / 'run', 0.05)
  for arguments, message in (
    ([tmp_path], 'has no metrics.jsonl: name the workdir of a run'),
    (
      [run, '--metric=los'],
      'no such values, but of loss, nll, step, step_seconds',
    ),
    ([], 'the following arguments are required: RUN'),
  ):
    with pytest.raises(SystemExit):
      compare(*arguments)
    assert message in capsys.readouterr().err
