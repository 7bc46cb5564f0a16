"""Runs and evaluations under several batch sizes."""

import json
import logging
import shutil

import jax
import numpy as np
import pytest
import tiny

from t2x.compilation import program as program_lib
from t2x.config import overrides
from t2x.data import batches as batches_lib
from t2x.data import corpus as corpus_lib
from t2x.data import history
from t2x.data import input_pipeline
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.trainer import run as run_lib
from t2x.trainer import train
from t2x.training import evaluate

ONE = {'mesh__data': 1, 'mesh__fsdp': 1, 'mesh__tensor': 1}
BUCKETS = {
  'data__batching': 'pad',
  'data__length': 64,
  'data__batching__buckets': '(32,64)',
}


def _lines(directory, num=60):
  """Texts that fill 16 to 64 places, as JSON lines."""
  file = directory / 'lines.jsonl'
  rng = np.random.default_rng(0)
  letters = [*'abcdefgh ']
  texts = [''.join(rng.choice(letters, n)) for n in rng.integers(5, 61, num)]
  file.write_text('\n'.join(json.dumps({'text': t}) for t in texts))
  return str(file)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('batch_size')


def test_an_evaluation_does_not_depend_on_its_batch_size(directory):
  """Masked tokens in buckets."""
  files = _lines(directory)
  losses, model = [], None
  for batch_size in (4, 8, 16):
    config = tiny.experiment_of(
      directory,
      model='encoder',
      data__objective='masked_lm',
      model__num_layers=1,
      data__files=files,
      data__batch_size=batch_size,
      **BUCKETS,
      **ONE,
    )
    mesh = mesh_lib.make(config.mesh, jax.devices()[:1])
    corpus = corpus_lib.prepare(config.data)
    with sharding.use(mesh, config.rules):
      program = program_lib.Program(config, mesh, num_steps=1)
      model = model or program.init_state().model
      ((_, _, batches),) = input_pipeline.eval_sets(corpus, config.data)
      losses.append(
        evaluate.evaluate(program.evaluate, model, map(program.place, batches))
      )
  assert losses[0]['num_tokens'] > 150
  for other in losses[1:]:
    assert other == pytest.approx(losses[0], rel=1e-6)


class _Watched:
  """Trains a run, and keeps the rows that it reads."""

  def __init__(self, directory, workdir, monkeypatch, **settings):
    self.directory, self.workdir = directory, workdir
    own = {'model__num_layers': 1, 'train__checkpoint_every': 0}
    self.settings = own | settings
    self.read = []
    made = input_pipeline.train_batches

    def watched(*args, **kwargs):
      for batch in made(*args, **kwargs):
        self.read.append(batch)
        yield batch

    monkeypatch.setattr(input_pipeline, 'train_batches', watched)

  def config(self, **settings):
    config = tiny.experiment_of(self.directory, **{**self.settings, **settings})
    return overrides.override(config, {'data.num_threads': '0'})

  def train(self, change=True, **settings):
    """Returns the inputs of the steps that were taken, row by row."""
    self.read.clear()
    config = self.config(**settings)
    train.train(
      config, str(self.workdir), allow_config_change=change, show=False
    )
    return [row.tolist() for batch in self.read for row in batch['inputs']]

  def rows(self, num, **settings):
    """The first rows that a run of this batch size reads."""
    config = self.config(**settings)
    corpus = corpus_lib.prepare(config.data)
    batches = batches_lib.TrainBatches(corpus, config.data, seed=0)
    steps = -(-num // config.data.batch_size)
    rows = np.concatenate([batches[i]['inputs'] for i in range(steps)])
    return rows[:num].tolist()


@pytest.fixture
def watched(directory, tmp_path, monkeypatch):
  return lambda **s: _Watched(directory, tmp_path / 'run', monkeypatch, **s)


@pytest.mark.slow
def test_a_run_reads_on_under_other_batch_sizes(watched, caplog):
  """Also from an older checkpoint, whose history is its own."""
  caplog.set_level(logging.INFO, 't2x')
  run = watched(train__keep_last=9)
  run.settings['train__checkpoint_every'] = 1
  read = run.train(train__num_steps=3, data__batch_size=4)
  read += run.train(train__num_steps=5, data__batch_size=8)
  assert 'data.batch_size=4 up to step 3 and 8 from there' in caplog.text
  caplog.clear()
  read += run.train(change=False, train__num_steps=6, data__batch_size=8)
  assert 'up to step' not in caplog.text
  read += run.train(train__num_steps=8, data__batch_size=12)
  num = 3 * 4 + 3 * 8 + 2 * 12
  assert read == run.rows(num, data__batch_size=4)
  # The newest ones are lost: from step 4 on, which was the first of 8 rows.
  for step in (5, 6, 7, 8):
    shutil.rmtree(run.workdir / 'checkpoints' / str(step))
  again = run.train(train__num_steps=5, data__batch_size=4)
  assert again == run.rows(24, data__batch_size=4)[20:]


def test_old_checkpoints_go_on_by_their_settings(watched, monkeypatch):
  """A step was all that they said of the data."""
  run = watched()
  with monkeypatch.context() as old:
    old.setattr(history, 'to_json', lambda _, step: {'step': step})
    run.train(train__num_steps=3, data__batch_size=4)
  # A start that changed the size and saved nothing.
  with monkeypatch.context() as lost:
    lost.setattr(run_lib.Run, 'open', _raise)
    with pytest.raises(KeyboardInterrupt):
      run.train(train__num_steps=5, data__batch_size=8)
  read = run.train(train__num_steps=5, data__batch_size=8)
  assert read == run.rows(28, data__batch_size=4)[12:]


def _raise(*_):
  raise KeyboardInterrupt


def test_the_length_of_a_run_goes_by_what_was_read(watched):
  run = watched(train__num_steps='none')
  run.train(train__num_tokens=4 * 4 * 32, data__batch_size=4)
  run.train(train__num_tokens=10 * 4 * 32, data__batch_size=8)
  assert tiny.saved_steps(run.workdir)[-1] == 4 + 3


@pytest.mark.slow
def test_a_memory_begins_anew_with_another_batch_size(watched):
  run = watched(
    data__batching='stream', model__memory=24, model__position='rotary'
  )
  run.train(train__num_steps=2, data__batch_size=4)
  first = [batch['inputs'] for batch in run.read]
  run.train(train__num_steps=4, data__batch_size=8)
  assert not run.read[0]['continues'].any()
  assert run.read[1]['continues'].any()
  read = {tuple(row) for batch in first for row in batch}
  more = [tuple(r) for b in run.read for r in b['inputs']]
  assert not read & {*more} and len({*more}) == len(more)
  # With the same size it goes on.
  run.train(change=False, train__num_steps=5, data__batch_size=8)
  assert run.read[0]['continues'].any()


@pytest.mark.parametrize(
  'change', [{'data__length': 16}, {'train__seed': 1}], ids=['length', 'seed']
)
def test_another_order_begins_anew_and_says_so(watched, caplog, change):
  run = watched(data__batch_size=4)
  run.train(train__num_steps=2)
  read = run.train(train__num_steps=4, **change)
  assert 'at step 2 the order of the data begins anew' in caplog.text
  config = run.config(**change)
  corpus = corpus_lib.prepare(config.data)
  seed = config.train.seed
  batches = batches_lib.TrainBatches(corpus, config.data, seed=seed)
  assert read == [r.tolist() for i in range(2) for r in batches[i]['inputs']]
