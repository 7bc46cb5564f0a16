"""The commands and the code of the README and of docs/ run."""

import glob
import os
import re
import shlex
import subprocess

import commands
import draw_packages
import extras
import pytest
import simulated
import tiny

_ROOT = os.path.join(os.path.dirname(__file__), '..')
with open(os.path.join(_ROOT, 'README.md'), encoding='utf-8') as _f:
  _TEXT = _f.read()
_DOCS = sorted(glob.glob(os.path.join(_ROOT, 'docs', '*.md')))
_PAGES = _TEXT
for _name in [*_DOCS, os.path.join(_ROOT, 'CONTRIBUTING.md')]:
  with open(_name, encoding='utf-8') as _f:
    _PAGES += _f.read()
_BLOCKS = re.findall(r'^```(\w+)\n(.*?)^```', _PAGES, re.M | re.S)
_COMMANDS = [
  line
  for language, block in _BLOCKS
  if language == 'bash'
  for line in block.splitlines()
]
_SNIPPETS = [block for language, block in _BLOCKS if language == 'python']


def test_there_is_something_to_test():
  assert len(_COMMANDS) >= 8 and len(_SNIPPETS) == 6


@pytest.mark.parametrize(
  'command', [c for c in _COMMANDS if c.startswith('python experiments')]
)
def test_experiment_commands_are_accepted(command):
  arguments = shlex.split(command)[1:]
  tools = 'generate', 'evaluate', 'embed', 'classify', 'serve'
  tool = {f'experiments/{name}.py' for name in tools}
  check = '--help' if arguments[0] in tool else '--print_config'
  script, *flags = arguments
  result = commands.run(os.path.join(_ROOT, script), *flags, check, cwd=_ROOT)
  if check == '--help':  # absl prints the flags and exits with 1.
    shown = '--num_tokens', '--split', '--text', '--port'
    assert any(flag in result.stdout for flag in shown)
    for argument in arguments[1:]:
      assert argument.split('=')[0] in result.stdout
  else:
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith('{')


_SCRIPTS = (
  'python scripts/show',
  'python scripts/verify',
  'python scripts/compile',
  'python scripts/plan',
)


def _shown() -> list[list[str]]:
  """Returns the commands of each block that show, verify or compile."""
  blocks = [text.splitlines() for name, text in _BLOCKS if name == 'bash']
  chosen = [[c for c in block if c.startswith(_SCRIPTS)] for block in blocks]
  return [block for block in chosen if block]


@pytest.mark.parametrize('block', _shown(), ids=lambda block: block[0][:50])
def test_scripts_that_only_look_run(block, tmp_path, monkeypatch):
  """One after the other: a later one may read what an earlier one wrote."""
  monkeypatch.setenv('XLA_FLAGS', simulated.flags())
  if any('--topology=v5e' in command for command in block):
    extras.need('libtpu', extra='plan')
  files = []
  for command in block:
    _, script, *arguments = shlex.split(command)
    if 'show' not in script:  # With the model and data of the other tests.
      layers = 2 if 'pipe=' in command else 1
      small = tiny.small(tmp_path) | {
        'optim': 'sgd',
        'model.num_layers': layers,
      }
      arguments += [f'--set={name}={value}' for name, value in small.items()]
    path = os.path.join(_ROOT, script)
    result = commands.run(path, *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    if 'show' in script:
      assert result.stdout
    files += re.findall(r'--(?:html|svg|csv|out|cache)=(\S+)', command)
    if 'verify' in script:
      assert result.stdout.count(' yes ') == command.count('--layout')
  lines_alone = ('verify', '--estimate')
  assert bool(files) != all(
    any(word in command for word in lines_alone) for command in block
  )
  assert all((tmp_path / file).exists() for file in files)


_SWEEPS = [
  command
  for command in _COMMANDS
  if re.match('python scripts/(sweep|scaling|coordinate)', command)
]


@pytest.mark.parametrize('command', _SWEEPS, ids=lambda c: c.split()[1])
def test_commands_of_sweeps_are_accepted(command, tmp_path, monkeypatch):
  extras.need('optuna', extra='sweep')
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  script, *arguments = shlex.split(command)[1:]
  plans = '--dry_run' in arguments
  result = commands.run(
    os.path.join(_ROOT, script),
    *(arguments if plans else ['--help']),
    cwd=_ROOT if plans else tmp_path,
  )
  if plans:
    assert result.returncode == 0, result.stderr
    assert 'TFLOP' in result.stdout or 'FLOPs' in result.stdout
  else:  # absl prints the flags and exits with 1.
    for argument in arguments:
      if argument.startswith('--'):
        assert f'  {argument.split("=")[0]}:' in result.stdout


@pytest.mark.parametrize(
  'command', [c for c in _COMMANDS if c.startswith('bash scripts')]
)
def test_scripts_parse(command):
  script = shlex.split(command)[1]
  subprocess.run(['bash', '-n', script], cwd=_ROOT, check=True)


@pytest.mark.parametrize('index', range(len(_SNIPPETS)))
def test_code_runs(index):
  exec(compile(_SNIPPETS[index], 'README.md', 'exec'), {'__name__': 'readme'})


def test_files_that_pages_name_exist():
  """Paths in code spans: `t2x/...`, `tests/...`, and the like."""
  names = re.findall(
    r'`((?:t2x|tests|scripts|experiments|docs)/[\w./]*\w/?)`', _PAGES
  )
  assert len(names) > 30
  for name in names:
    path = os.path.join(_ROOT, name)
    assert os.path.exists(path) or os.path.exists(f'{path}.py'), name


def test_every_package_is_on_the_map():
  with open(os.path.join(_ROOT, 'docs', 'architecture.md')) as f:
    text = f.read()
  for folder in glob.glob(os.path.join(_ROOT, 't2x', '*', '')):
    if glob.glob(os.path.join(folder, '*.py')):
      assert f'`{os.path.basename(folder[:-1])}`' in text, folder


def test_the_picture_of_packages_is_current():
  drawn = draw_packages.svg(draw_packages.floors())
  how = 'python scripts/draw_packages.py'
  assert draw_packages.PICTURE.read_text() == drawn, how
  floors = {name for row in draw_packages.floors() for name in row}
  walks = {
    name for _, _, names in draw_packages.WALKS for name in names.split()
  }
  assert walks <= floors


def test_links_lead_somewhere():
  paths = [
    os.path.join(_ROOT, name)
    for name in ('README.md', 'BUILD_NOTES.md', 'CONTRIBUTING.md')
  ]
  pattern = os.path.join(_ROOT, 'docs', '**', '*.md')
  paths += glob.glob(pattern, recursive=True)
  for path in paths:
    with open(path, encoding='utf-8') as f:
      targets = re.findall(r'\]\(([^)]+)\)', re.sub(r'`[^`]*`', '', f.read()))
    for target in targets:
      file = target.partition('#')[0]
      if '://' not in target and file:
        there = os.path.join(os.path.dirname(path), file)
        assert os.path.exists(there), f'{path}: {target}'


def test_notes_are_short():
  names = ['BUILD_NOTES.md', *glob.glob('docs/**/*.md', root_dir=_ROOT)]
  for name in [*names, *glob.glob('docs/*.md', root_dir=_ROOT)]:
    with open(os.path.join(_ROOT, name), encoding='utf-8') as f:
      assert len(f.readlines()) < 250, name
