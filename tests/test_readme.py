"""The commands and the code of the README and of docs/ run."""

import os
import re
import shlex
import subprocess

import commands
import extras
import pytest
import simulated
import tiny

_ROOT = os.path.join(os.path.dirname(__file__), '..')
with open(os.path.join(_ROOT, 'README.md'), encoding='utf-8') as _f:
  _TEXT = _f.read()
_PAGES = _TEXT
for _name in (
  'attention.md',
  'objectives.md',
  'pipelines.md',
  'planning.md',
  'inference.md',
  'serving.md',
  'training.md',
):
  with open(os.path.join(_ROOT, 'docs', _name), encoding='utf-8') as _f:
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
  assert len(_COMMANDS) >= 8 and len(_SNIPPETS) == 5


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


@pytest.mark.parametrize(
  'command', [c for c in _COMMANDS if c.startswith('bash scripts')]
)
def test_scripts_parse(command):
  script = shlex.split(command)[1]
  subprocess.run(['bash', '-n', script], cwd=_ROOT, check=True)


@pytest.mark.parametrize('index', [0, 1, -2, -1])
def test_code_runs(index):
  exec(compile(_SNIPPETS[index], 'README.md', 'exec'), {'__name__': 'readme'})


def test_every_file_of_the_map_exists():
  block = _TEXT.split('## The code')[1]
  names = re.findall(r'\b([a-z_]+\.(?:py|sh)|[a-z_]+/)(?=[\s,])', block)
  assert len(names) > 20
  for name in names:
    places = ('', 't2x', 'scripts', 'experiments')
    paths = [os.path.join(_ROOT, place, name) for place in places]
    assert any(map(os.path.exists, paths)), name
