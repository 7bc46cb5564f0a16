import dataclasses
import json
import pathlib

import pytest
import tiny

from t2x import files
from t2x.config import number_changes
from t2x.config import overrides
from t2x.data import corpus as corpus_lib
from t2x.data import tokenizer_loading
from t2x.layers import low_rank
from t2x.models import encoder
from t2x.trainer import workdir as workdir_lib
from t2x.training import optim


@pytest.fixture
def run(tmp_path):
  """A workdir with the files of a run, and its config."""
  config = tiny.experiment_of(tmp_path)
  workdir = tmp_path / 'run'
  _write(workdir, config)
  (workdir / 'metrics.jsonl').write_text('{"step": 1, "loss": 5.0}\n')
  return workdir, config


def _write(workdir, config, **options):
  changes = workdir_lib.check(str(workdir), config, **options)
  workdir_lib.write(str(workdir), config, _corpus(config), changes)


def _corpus(config, fingerprint='a text'):
  tokenizer = tokenizer_loading.train(config.data.tokenizer, [])
  return corpus_lib.Corpus(
    tokenizer=tokenizer, fingerprint=fingerprint, splits={}
  )


def _set(config, *settings):
  return overrides.override(config, overrides.parse_settings(settings))


def test_a_run_says_what_it_is(run):
  workdir, config = run
  assert workdir_lib.read_config(str(workdir)) == config
  assert workdir_lib.load_config(str(workdir / 'config.json')) == config
  versions = json.loads((workdir / 'versions.json').read_text())
  assert {'python', 'jax', 'flax', 'optax'} <= set(versions)
  assert tokenizer_loading.load(workdir / 'tokenizer').decode([]) == ''
  assert not (workdir / 'history.jsonl').exists()
  assert not list(workdir.glob('*.tmp'))


def test_every_difference_is_listed(run):
  workdir, config = run
  before = (workdir / 'config.json').read_text()
  new = _set(
    config,
    'model.embed_dim=32',
    'model.position=rotary',
    'data.batch_size=16',
    'optim.learning_rate=0.5',
    'train.seed=1',
    'train.num_steps=9',
  )
  new = dataclasses.replace(
    new, optim=optim.Lion(learning_rate=0.5, b2=0.9, weight_decay=0.1)
  )
  with pytest.raises(ValueError) as info:
    workdir_lib.check(str(workdir), new)
  lines = str(info.value).splitlines()
  assert lines[0] == f'{workdir} holds a run with other settings:'
  assert lines[-1] == (
    'Use another --workdir, undo the changes, or go on all the same with '
    '--allow_config_change.'
  )
  listed = {line.split(':')[0].strip() for line in lines[1:-1]}
  assert {
    'model.embed_dim',
    'model.position.kind',
    'data.batch_size',
    'optim.kind',
    'optim.learning_rate',
    'optim.b2',
    'optim.eps',
    'optim.schedule.shape',
    'train.seed',
  } <= listed
  assert 'train.num_steps' not in listed
  assert '  model.embed_dim: 16 -> 32' in lines
  assert "  optim.kind: 'adamw' -> 'lion'" in lines
  assert (workdir / 'config.json').read_text() == before


@pytest.mark.parametrize(
  'setting',
  [
    'model.num_layers=4',
    'model.attention.num_kv_heads=2',
    'data.length=16',
    'data.objective.kind=masked_lm',
    'data.tokenizer.num_sentinels=5',
    'data.train_split=train[:50%]',
    'optim.schedule.warmup_steps=3',
    'optim.weight_decay=0',
    'train.seed=1',
    'train.ema_decay=0.9',
    'train.trainable=.*bias.*',
    'train.loss.z_loss=1e-4',
  ],
)
def test_what_would_change_the_numbers_is_refused(run, setting):
  workdir, config = run
  name = setting.partition('=')[0]
  with pytest.raises(ValueError, match=f'\n  {name}: .* -> '):
    workdir_lib.check(str(workdir), _set(config, setting))


@pytest.mark.parametrize(
  'setting',
  [
    'mesh.data=4',
    'rules.mlp=none',
    'rules.embed=data,fsdp',
    'train.remat=full',
    'train.scan_layers=false',
    'train.accumulate=2',
    'train.accumulate_whole=true',
    'train.num_steps=9',
    'train.checkpoint_every=7',
    'train.keep_last=1',
    'train.keep_every=10',
    'train.log_every=2',
    'train.eval_every=3',
    'train.eval_batches=none',
    'train.max_skipped=2',
    'data.eval_splits=',
    'data.data_dir=elsewhere',
    'data.num_threads=2',
    'model.attention.block=16',
  ],
)
def test_the_rest_may_change_and_is_logged(run, setting):
  workdir, config = run
  new = _set(config, setting)
  assert new != config
  _write(workdir, new)
  assert workdir_lib.read_config(str(workdir)) == new
  (changes,) = tiny.history(workdir)
  name = setting.partition('=')[0]
  assert changes and all(n.startswith(name) for n in changes)


def test_a_change_can_be_insisted_on(run):
  workdir, config = run
  new = _set(config, 'train.seed=1')
  _write(workdir, new, allow_change=True)
  _write(workdir, _set(new, 'train.num_steps=9'))
  assert tiny.history(workdir) == [
    {'train.seed': [0, 1]},
    {'train.num_steps': [4, 9]},
  ]


def test_the_same_settings_log_nothing(run):
  workdir, config = run
  _write(workdir, config)
  assert not (workdir / 'history.jsonl').exists()


def test_a_run_is_told_once_of_numbers_that_changed_since(run, caplog):
  workdir, config = run
  numbers = workdir / 'numbers.json'
  names = json.loads(numbers.read_text())
  assert names == [change.name for change in number_changes.CHANGES]
  assert len(set(names)) == len(names)
  config = _set(config, 'optim.schedule.shape=wsd')
  _write(workdir, config, allow_change=True)
  assert 'began before' not in caplog.text
  numbers.unlink()
  _write(workdir, config)
  told = [r for r in caplog.records if 'began before' in r.getMessage()]
  assert ['learning rate takes its peak' in r.getMessage() for r in told] == [
    True
  ]
  last = (workdir / 'history.jsonl').read_text().splitlines()[-1]
  assert json.loads(last) == {'numbers': ['schedule_ends']}
  caplog.clear()
  _write(workdir, config)
  assert 'began before' not in caplog.text


def test_a_run_without_steps_or_concern_is_told_of_no_numbers(run, caplog):
  workdir, config = run  # Its schedule is constant.
  (workdir / 'numbers.json').unlink()
  _write(workdir, config)
  _write(workdir, _set(config, 'train.num_steps=9'))
  (workdir / 'numbers.json').unlink()
  (workdir / 'metrics.jsonl').unlink()
  _write(workdir, _set(config, 'optim.schedule.shape=cosine'))
  assert 'began before' not in caplog.text


def test_whom_changes_concern(run):
  _, config = run  # Causal, packed, with a constant rate.
  since = lambda config: [c.name for c in number_changes.since((), config)]
  names = lambda *settings: since(_set(config, *settings))
  assert names() == []
  assert names('data.objective=prefix_lm') == ['draws_by_example']
  length = 'train.num_steps=none', 'train.num_tokens=9'
  assert names(*length) == []
  assert names(*length, 'data.batching=pad') == ['tokens_of_padded_rows']
  model = encoder.EncoderConfig(attention=low_rank.Nystromformer())
  few = dataclasses.replace(config, model=model)
  assert since(few) == ['landmarks_of_no_token']


def test_other_versions_are_reported(run, caplog, monkeypatch):
  workdir, config = run
  versions = {**workdir_lib.versions(), 'jax': '99.0'}
  monkeypatch.setattr(workdir_lib, 'versions', lambda: versions)
  _write(workdir, config)
  assert 'jax was 0.' in caplog.text
  assert 'and is 99.0' in caplog.text


def test_a_crash_while_writing_leaves_the_old_config(run, monkeypatch):
  workdir, config = run

  def fail(file):
    raise OSError(28, 'No space left on device')

  with monkeypatch.context() as patch:
    patch.setattr(files.os, 'fsync', fail)
    with pytest.raises(OSError, match='No space left'):
      _write(workdir, _set(config, 'train.num_steps=9'))
  assert workdir_lib.read_config(str(workdir)) == config


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('{"model": ', 'config.json is not JSON .* start in another workdir'),
    ('{"modle": {}}', "Experiment has no 'modle'. Did you mean 'model'"),
    ('{"train": {"seed": "x"}}', "'train.seed': 'x' does not fit the type int"),
    ('{"train": {"ema_decay": NaN}}', "'train.ema_decay': nan does not fit"),
    ('[1, 2]', r'config.json holds no config: .* here is \[1, 2\]'),
    ('{"model": {"kind": ["decoder"]}}', r"'model.kind': \['decoder'\] is not"),
    ('[' * 99_999, 'config.json is not JSON .it is nested too deeply'),
    ('{"train": {"seed": ' + '1' * 5000, 'a number has more than 4300 digits'),
  ],
)
def test_a_damaged_config(run, text, message):
  workdir, _ = run
  (workdir / 'config.json').write_text(text)
  with pytest.raises(ValueError, match=message):
    workdir_lib.read_config(str(workdir))


def test_a_config_that_an_editor_has_saved(run):
  workdir, config = run
  file = workdir / 'config.json'
  text = file.read_text()
  file.write_bytes(b'\xef\xbb\xbf' + text.replace('\n', '\r\n').encode())
  assert workdir_lib.read_config(str(workdir)) == config
  file.write_bytes(text.encode().replace(b'"model"', b'\n"mod\xe9l"', 1))
  with pytest.raises(ValueError, match='config.json:3: not UTF-8: byte 0xe9'):
    workdir_lib.read_config(str(workdir))


def test_no_run_and_no_file(tmp_path):
  with pytest.raises(ValueError, match='holds no run: it has no config.json'):
    workdir_lib.read_config(str(tmp_path))
  with pytest.raises(ValueError, match='--config=.*there is no such file'):
    workdir_lib.load_config(str(tmp_path / 'config.json'))


def test_another_text_is_refused(run):
  workdir, _ = run
  workdir_lib.check_corpus(str(workdir), 'a text', allow_change=False)
  workdir_lib.check_corpus(str(workdir), 'another', allow_change=True)
  message = 'holds a run on another text: its corpus was a text and is now ano'
  with pytest.raises(ValueError, match=message):
    workdir_lib.check_corpus(str(workdir), 'another', allow_change=False)


def test_a_run_from_before_the_rule_of_copies_is_told(run):
  workdir, config = run
  file = workdir / 'config.json'
  old = json.loads(file.read_text())
  del old['data']['duplicates']
  file.write_text(json.dumps(old))
  with pytest.raises(ValueError) as error:
    workdir_lib.check(str(workdir), config)
  lines = str(error.value).split('\n')
  assert "  data.duplicates: '(not set)' -> 'exact'" in lines
  assert 'The run is older than the setting data.duplicates' in str(error.value)
  changes = workdir_lib.check(str(workdir), config, allow_change=True)
  assert list(changes) == ['data.duplicates']


def test_what_became_of_the_documents_is_kept(tmp_path):
  config = tiny.experiment_of(tmp_path)
  corpus = corpus_lib.prepare(config.data)
  workdir_lib.write(str(tmp_path / 'run'), config, corpus, {})
  kept = json.loads((tmp_path / 'run' / 'corpus.json').read_text())
  assert kept['id'] == corpus.fingerprint
  facts = kept['documents']['']
  assert (facts['source'], facts['duplicates']) == ('text_files', 'exact')
  dropped = sum(facts['dropped'].values())
  assert facts['read'] == facts['train'] + facts['validation'] + dropped > 0
  listed = pathlib.Path(facts['list']).read_text()
  assert listed.count('\n') == dropped
  tfds = dataclasses.replace(corpus, documents={})
  mixed = dataclasses.replace(corpus, tasks={'a': corpus, 'b': tfds})
  assert workdir_lib._corpus_facts(mixed)['documents'] == {'a': facts}


def test_a_run_without_a_step_takes_any_settings(run):
  workdir, config = run
  (workdir / 'metrics.jsonl').unlink()
  new = _set(config, 'model.embed_dim=32')
  changes = workdir_lib.check(str(workdir), new)
  assert list(changes) == ['model.embed_dim']
  workdir_lib.check_corpus(str(workdir), 'another', allow_change=False)
  assert workdir_lib.read_tokenizer(str(workdir)) is None
  (workdir / 'checkpoints' / '5').mkdir(parents=True)
  with pytest.raises(ValueError, match='other settings'):
    workdir_lib.check(str(workdir), new)


def test_a_new_workdir_has_no_tokenizer(run, tmp_path):
  workdir, config = run
  assert workdir_lib.read_tokenizer(str(tmp_path / 'new')) is None
  own = workdir_lib.read_tokenizer(str(workdir))
  assert own is not None
  assert own.fingerprint == _corpus(config).tokenizer.fingerprint
