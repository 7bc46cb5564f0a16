"""What a user reads when something is wrong, and what the flags do."""

import dataclasses
import json
import os

import commands
from flax import nnx
import jax
import pytest
import shared_runs
import tiny

from t2x import main
from t2x.config import overrides
from t2x.inference import evaluation
from t2x.inference import generation
from t2x.inference import loading
from t2x.models import encoder
from t2x.parallel import sharding
from t2x.tracking import run_report
from t2x.trainer import run as run_lib
from t2x.trainer import train
from t2x.trainer import workdir as workdir_lib


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return shared_runs.trained(tmp_path_factory, train__num_steps=2)


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch):
  monkeypatch.setattr(run_report, 'write', lambda workdir: None)


_compiled = []
jax.monitoring.register_event_duration_secs_listener(
  lambda event, *args, **kwargs: (
    _compiled.append(event) if 'backend_compile' in event else None
  )
)


def _refused(directory, workdir, message, **settings):
  """Asserts that a run is refused at once, with `message`."""
  _compiled.clear()
  with pytest.raises(ValueError, match=message) as info:
    train.train(
      tiny.experiment_of(directory, **settings), str(workdir), show=False
    )
  # So that the command line prints it without a traceback.
  assert main.is_own(info.value)
  assert not _compiled, 'something was compiled'
  assert not os.path.exists(workdir), 'the workdir was made'
  return info.value


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    (
      {'mesh__data': 3},
      r'The mesh \(data=3, fsdp=2, tensor=2\) needs 12 devices and there are '
      '8. Change --set mesh.AXIS=SIZE .*device_count=12',
    ),
    (
      {'mesh__data': -1, 'mesh__fsdp': 3},
      'needs a multiple of 6 devices and there are 8',
    ),
    ({'mesh__fsdp': -1, 'mesh__data': -1}, 'only one axis can take the devic'),
    ({'mesh__tensor': 0}, 'mesh.tensor=0; a size is at least 1, or -1'),
    (
      {'model__attention__num_kv_heads': 3},
      'num_heads=4 must be a multiple of attention.num_kv_heads=3: each',
    ),
    (
      {'data__source': 'text_file'},
      r"Unknown data.source='text_file'. Did you mean 'text_files'\?",
    ),
    ({'data__files': ''}, "data.files='' is empty; source text_files needs"),
    (
      {'data__files': '/nowhere/*.txt'},
      "'/nowhere/.*.txt' matches no file .*Correct the path",
    ),
    ({'data__batch_size': 6}, 'rows cannot be dealt to mesh.data=2 x mesh.fsd'),
    ({'model__vocab_size': 200}, 'The tokenizer has 3.. ids and model.voca'),
    ({'data__eval_splits': 'tset'}, "'tset' of text_files.*; it has"),
    ({'train__trainable': 'none_such'}, 'matches no parameter. Paths look lik'),
  ],
)
def test_what_cannot_be_is_refused_at_once(
  directory, tmp_path, settings, message
):
  _refused(directory, tmp_path / 'run', message, **settings)


def test_an_axis_that_does_not_divide(directory, tmp_path):
  error = _refused(
    directory,
    tmp_path / 'run',
    'not divisible',
    mesh__tensor=8,
    mesh__data=1,
    mesh__fsdp=1,
  )
  assert isinstance(error, sharding.ShardingError)
  message = str(error)
  for part in (
    'model.tower.layers.group.0.attention.',  # The path,
    'of shape (2, 16, 4, 4)',  # the shape,
    "dimension 2 ('kv_heads') of size 4",
    'rules.kv_heads=tensor',  # the rule,
    'mesh.tensor=8',  # the size of the axis,
    'Choose a size or a mesh that divides',  # and two ways out.
    '--set rules.kv_heads=none',
  ):
    assert part in message, message


def test_bad_files(directory, tmp_path):
  bad = tmp_path / 'bad.txt'
  bad.write_bytes(b'fine until h\xe9re')
  _refused(
    directory,
    tmp_path / 'run',
    f'{bad}:1: not UTF-8: byte 0xe9 at offset 12. Convert it',
    data__files=bad,
  )
  empty = tmp_path / 'empty.txt'
  empty.write_text('')
  _refused(
    directory,
    tmp_path / 'run',
    'too little text: .* at least two documents that differ.*Give more files',
    data__files=empty,
  )


def test_a_place_that_cannot_be_written(directory, tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  with pytest.raises(OSError, match='file'):
    train.train(tiny.experiment_of(directory), str(file / 'run'), show=False)


@pytest.fixture(scope='module')
def run(directory):
  return directory / 'run'


def test_other_settings_are_refused_before_anything_is_done(directory, run):
  before = sorted(os.listdir(run))
  _compiled.clear()
  with pytest.raises(ValueError, match='holds a run with other settings') as e:
    train.train(
      tiny.experiment_of(directory, train__seed=3, model__num_layers=3),
      str(run),
      show=False,
    )
  assert '  train.seed: 0 -> 3' in str(e.value)
  assert '  model.num_layers: 2 -> 3' in str(e.value)
  assert not _compiled and sorted(os.listdir(run)) == before


def test_generating(run):
  trained = loading.load(str(run))
  assert trained.step == 2
  texts = generation.generate_text(trained, ['the run', 'a'], num_tokens=4)
  assert len(texts) == 2
  with pytest.raises(
    ValueError,
    match='Prompt 1 has 101 tokens; with num_tokens=8 .* 109, and a sequence '
    'may hold 32. Either cut the prompt to at most 24 tokens, or raise max_len',
  ) as info:
    generation.generate_text(trained, ['a', 'b' * 100], num_tokens=8)
  assert main.is_own(info.value)
  long = {'num_tokens': 12, 'ignore_end': True}
  (text,) = generation.generate_text(trained, ['the run'], **long)
  middle = text[len(text) // 2]
  (stopped,) = generation.generate_text(
    trained, ['the run'], stop=['never there', middle], **long
  )
  assert stopped == text[: text.index(middle)] != text
  with pytest.raises(ValueError, match="stop holds ''"):
    generation.generate_text(trained, ['a'], num_tokens=4, stop=[''])
  found = generation.search_text(trained, ['a'], num_tokens=4, num_best=2)
  assert len(found[0]) == 2 and found[0][0][1] >= found[0][1][1]
  letters = set(text.encode().decode('ascii', 'ignore')) - {'\ufffd'}
  banned = trained.banned([*letters, 'run'])
  (other,) = generation.generate_text(
    trained,
    ['the run'],
    sampling=generation.Sampling(banned_words=banned),
    **long,
  )
  assert other and not letters & set(other)
  # Past the length of training, but not past the positions that there are.
  generation.generate_text(trained, ['b' * 39], num_tokens=4, max_length=64)
  with pytest.raises(ValueError, match='may hold 64.* a model with more pos'):
    generation.generate_text(trained, ['b' * 99], num_tokens=4, max_length=99)


def test_evaluating_another_text_is_told(run, tmp_path, caplog):
  lines = [f'{{"text": "line {i} of another text"}}\n' for i in range(40)]
  (tmp_path / 'other.jsonl').write_text(''.join(lines))
  other = f'data.files={tmp_path}/other.jsonl'
  for settings, is_told in (([], False), ([other], True)):
    caplog.clear()
    trained = loading.load(str(run), settings=settings)
    found = evaluation.evaluate_splits(trained, max_batches=1)
    assert found['eval/train/loss'] > 0
    assert ('another one than the run was' in caplog.text) == is_told


def test_an_encoder_cannot_generate(directory, run):
  config = tiny.experiment_of(
    directory, model__kind='encoder', data__objective='masked_lm'
  )
  assert isinstance(config.model, encoder.EncoderConfig)
  trained = dataclasses.replace(
    loading.load(str(run)),
    config=config,
    model=jax.eval_shape(
      lambda: encoder.Encoder(config.model, rngs=nnx.Rngs(0))
    ),
  )
  _compiled.clear()
  with pytest.raises(ValueError, match='Encoder cannot generate: only a Dec'):
    generation.generate_text(trained, ['a'], num_tokens=3)
  assert not _compiled


def test_no_run_and_no_checkpoint_yet(directory, tmp_path):
  with pytest.raises(ValueError, match='holds no run: it has no config.json'):
    loading.load(str(tmp_path))
  config = tiny.experiment_of(directory)
  (tmp_path / 'config.json').write_text(overrides.dumps(config))
  with pytest.raises(
    ValueError, match='no checkpoint yet. Let .*train.checkpoint_every=2 steps'
  ):
    loading.load(str(tmp_path))


def test_prompts(tmp_path):
  with pytest.raises(ValueError, match='There is no prompt: give --prompt='):
    main.read_lines([], None, 'prompt')
  with pytest.raises(ValueError, match='--prompt_file=.*: there is no such fi'):
    main.read_lines([], str(tmp_path / 'none'), 'prompt')
  (tmp_path / 'prompts').write_text('b\n\nc d\n')
  prompts = main.read_lines(['a'], str(tmp_path / 'prompts'), 'prompt')
  assert prompts == ['a', 'b', 'c d']


def test_lines_of_prompts_end_at_line_feeds_alone(tmp_path):
  file = tmp_path / 'prompts'
  odd = 'a\x0bb\x0cc\x1cd\x1ee\x85f\u2028g\u2029h\ri'
  file.write_bytes(f'\ufeff{odd}\r\n\n{odd}\n  x\r\n\r\nlast\r'.encode())
  found = main.read_lines([], str(file), 'prompt')
  assert found == [odd, odd, '  x', 'last\r']
  file.write_bytes('one\nr\u00e9sum\u00e9'.encode('latin-1'))
  with pytest.raises(
    ValueError,
    match='--prompt_file=.*prompts:2: not UTF-8: byte 0xe9 at offset 5. Conv',
  ):
    main.read_lines([], str(file), 'prompt')


def test_an_argument_that_is_not_utf8():
  with pytest.raises(
    SystemExit, match=r"error: the argument '--prompt=\\udce9"
  ):
    main._parse(['generate.py', '--prompt=\udce9'])


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('5', 'it is FIRST:LAST, as in 10:13'),
    ('a:b', 'it is FIRST:LAST, as in 10:13'),
    ('0:3', 'the first step is at least 1'),
    ('5:4', 'not after the last'),
  ],
)
def test_profile_steps(text, message):
  assert main._steps('10:13') == (10, 13)
  assert main._steps('4:4') == (4, 4)
  with pytest.raises(ValueError, match=message):
    main._steps(text)


def _command(*arguments, name='quickstart', env=None):
  root = os.path.join(os.path.dirname(__file__), '..')
  path = os.path.join(root, 'experiments', f'{name}.py')
  return commands.run(path, *arguments, env={**os.environ, **(env or {})})


def _assert_error(done, *parts):
  assert done.returncode == 1
  assert done.stderr.startswith('error: '), done.stderr
  assert 'Traceback' not in done.stderr and not done.stdout
  for part in parts:
    assert part in done.stderr, done.stderr


@pytest.mark.slow
def test_errors_on_the_command_line(tmp_path):
  workdir = tmp_path / 'run'
  _assert_error(
    _command(f'--workdir={workdir}', '--set=model.num_layer=3'),
    "error: 'model.num_layer': DecoderConfig has no 'num_layer'. Did you mean "
    "'num_layers'?",
  )
  _assert_error(
    _command('--set', 'model.num_layers=3'),
    'error: --workdir is missing: name a directory for the run',
  )
  assert not workdir.exists()


@pytest.mark.parametrize(
  ('arguments', 'error', 'message'),
  [
    (['x=3'], None, "error: unexpected argument 'x=3'; settings are written"),
    ([], run_lib.NonFiniteError('Step 3'), None),
    (
      [],
      OSError(28, 'No space left', 'a'),
      r"error: \[Errno 28\] No space.*'a'",
    ),
  ],
)
def test_how_a_command_ends(monkeypatch, arguments, error, message):
  monkeypatch.setattr(main.app, 'run', lambda f, **_: f(['name', *arguments]))

  def command():
    raise error

  if message is None:  # Raised by this test, and not by t2x itself.
    with pytest.raises(type(error)):
      main.app_run(command)
    return
  with pytest.raises(SystemExit, match=message):
    main.app_run(command)


@pytest.mark.slow
def test_errors_of_the_tools(run, tmp_path):
  _assert_error(
    _command(f'--workdir={tmp_path}', name='evaluate'),
    f'error: {tmp_path} holds no run: it has no config.json.',
  )
  _assert_error(
    _command(f'--workdir={run}', f'--prompt={"a" * 99}', name='generate'),
    'error: Prompt 0 has 100 tokens; with num_tokens=64',
  )


@pytest.mark.slow
def test_print_config_touches_nothing(directory, tmp_path):
  saved = tmp_path / 'config.json'
  config = tiny.experiment_of(directory, train__seed=4)
  saved.write_text(overrides.dumps(config))
  done = _command(
    '--print_config',
    f'--config={saved}',
    "--set=data.files='elsewhere/*.txt'",
    '--set=mesh.tensor=64',  # More than there are devices.
    # A platform that does not exist: touching a device would raise.
    env={'JAX_PLATFORMS': 'nonesuch'},
  )
  assert done.returncode == 0, done.stderr
  data = json.loads(done.stdout)
  assert data['mesh']['tensor'] == 64
  assert data['data']['files'] == "'elsewhere/*.txt'"
  changes = overrides.differences(overrides.to_json(config), data)
  assert set(changes) == {'mesh.tensor', 'data.files'}


@pytest.mark.slow
def test_a_run_from_the_command_line(directory, tmp_path):
  """Its own settings, then its saved config.json in another workdir."""
  run = tmp_path / 'run'
  corpus = tmp_path / 'texts'
  tiny.write_corpus(corpus)
  done = tiny.run(
    directory,
    f'--workdir={run}',
    '--set=train.num_steps=2',
    '--set=data.source=text_files',
    f'--set=data.files={corpus}/*.txt',
    '--profile_steps=2:2',
  )
  assert done.returncode == 0, done.stderr
  assert f'The run is in {run}' in done.stdout and 'loss' in done.stdout
  assert json.loads((run / 'config.json').read_text())['data']['files'] == (
    f'{corpus}/*.txt'
  )
  assert list(run.glob('profile/plugins/profile/*/*.xplane.pb'))
  config = workdir_lib.load_config(str(run / 'config.json'))
  train.train(config, str(tmp_path / 'again'), show=False)
  assert tiny.losses(tmp_path / 'again') == tiny.losses(run)


def test_own_errors_only():
  """What a library raises keeps its traceback: it may be our mistake."""
  try:
    jax.numpy.zeros((2, 3)) @ jax.numpy.zeros((2, 3))
  except (TypeError, ValueError) as error:
    assert not main.is_own(error)
