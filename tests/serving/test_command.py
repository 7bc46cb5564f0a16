"""The server and what goes with it, as commands."""

import os
import signal
import subprocess
import sys

import commands
import httpx
import pytest
import serving_run

_ROOT = os.path.join(os.path.dirname(__file__), '..', '..')

pytestmark = pytest.mark.slow


def command(script, *flags, **options):
  return subprocess.Popen(
    [sys.executable, os.path.join(_ROOT, script), *flags],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


def ended(script, *flags):
  """Returns the code, the output and the errors of a command."""
  done = commands.run(os.path.join(_ROOT, script), *flags)
  return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  directory = tmp_path_factory.mktemp('run')
  serving_run.trained_of(
    directory,
    train__num_steps=2,
    data__length=256,
    model__position__max_length=256,
  )
  return str(directory / 'run')


def test_a_server_starts_serves_and_stops(run):
  env = {**os.environ, 'T2X_API_KEY': 'secret'}
  flags = f'--workdir={run}', '--port=0', '--name=mine', '--slots=4'
  process = command('experiments/serve.py', *flags, env=env)
  try:
    line = process.stdout.readline()
    assert line.startswith('mine is served at http://127.0.0.1:'), (
      line or process.stderr.read()
    )
    url = line.split()[-1]
    ask = lambda headers: httpx.post(
      f'{url}/v1/completions',
      json={'prompt': 'the run', 'max_tokens': 4, 'ignore_eos': True},
      headers=headers,
    )
    assert ask({}).status_code == 401
    answer = ask({'Authorization': 'Bearer secret'}).json()
    assert answer['usage']['completion_tokens'] == 4
    assert answer['model'] == 'mine'
    assert httpx.get(url, headers={'Host': 'evil'}).status_code == 400
    taken = f'--port={url.split(":")[-1]}'
    code, _, error = ended('experiments/serve.py', f'--workdir={run}', taken)
    assert code == 1 and 'Cannot listen on 127.0.0.1' in error
  finally:
    process.send_signal(signal.SIGTERM)
    output, error = process.communicate(timeout=60)
  assert process.returncode == 0, error
  assert 'The server has stopped.' in output and 'Traceback' not in error


def test_a_load_test(run):
  flags = f'--workdir={run}', '--port=0', '--slots=4'
  process = command('experiments/serve.py', *flags)
  try:
    url = process.stdout.readline().split()[-1]
    code, output, error = ended(
      'scripts/bench_serve.py', f'--url={url}', '--requests=60',
      '--clients=12', '--max_tokens=24', '--faults=0.4',
    )  # fmt: skip
    assert code == 0, output + error
    assert 'different               0\n' in output
  finally:
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
  assert process.returncode == 0 and 'Traceback' not in error
  code, _, error = ended('scripts/bench_serve.py', f'--url={url}')
  assert code == 1 and 'does not answer' in error


def test_what_cannot_be_served(run, tmp_path):
  serve = lambda *flags: ended('experiments/serve.py', '--port=0', *flags)
  code, _, error = serve(f'--workdir={tmp_path}')
  assert code == 1 and 'holds no run' in error
  code, _, error = serve(f'--workdir={run}', '--page_size=7')
  assert code == 1 and error.strip().endswith('such as 32.')
  template = tmp_path / 'wrong.jinja'
  template.write_text('{% for %}')
  code, _, error = serve(f'--workdir={run}', f'--chat_template={template}')
  assert code == 1 and 'chat template cannot be read' in error
  code, _, error = serve(f'--workdir={run}', '--host=300.1.2.3')
  assert code == 1 and 'error: Cannot listen' in error


def test_texts_that_are_held_to_something(run, tmp_path):
  schema = tmp_path / 'schema.json'
  schema.write_text('{"enum": [{"a": 1}, {"b": 2}]}')
  write = lambda *flags: ended(
    'experiments/generate.py', f'--workdir={run}', '--prompt=the run',
    '--num_tokens=20', *flags,
  )  # fmt: skip
  code, output, error = write('--regex=[0-9]{4}')
  assert code == 0, error
  assert output.splitlines()[1].isdigit() and len(output.splitlines()[1]) == 4
  code, output, error = write(f'--schema_file={schema}')
  assert output.splitlines()[1] in ('{"a":1}', '{"b":2}'), error
  for more in ((), ('--num_beams=4',)):
    code, output, error = write('--keyword=ox', '--keyword=zebra', *more)
    assert code == 0 and 'ox' in output and 'zebra' in output, error
  code, output, error = write(
    f'--expert={run}', '--temperature=0', '--post=strip'
  )
  assert code == 0 and output.startswith('--- the run\n'), error
  for flags, message in (
    (('--regex=(a',), 'cannot be followed'),
    (('--regex=a', '--keyword=b'), 'one rule'),
    (('--regex=a', '--num_beams=2'), '--regex has no place in a search'),
    ((f'--anti_expert={run}',), '--anti_expert needs --expert'),
    (('--post=upper',), "no step 'upper'"),
    (('--schema_file=/nowhere',), 'No such file'),
  ):
    code, _, error = write(*flags)
    assert code == 1 and message in error, error
    assert 'Traceback' not in error


def test_an_artefact(run, tmp_path):
  made = tmp_path / 'made'
  code, output, error = ended(
    'scripts/export_model.py', f'--workdir={run}', f'--to={made}'
  )
  assert code == 0 and 'run.py' in output, error
  code, output, error = ended(
    str(made / 'run.py'), '--prompt=the run', '--num_tokens=5'
  )
  assert code == 0 and output.startswith('--- the run\n'), error
  code, _, error = ended('scripts/export_model.py', f'--workdir={run}')
  assert code == 1 and '--to is missing' in error
