import json
import os
import random
import shutil
import signal
import time

import jax
import numpy as np
import pytest
import tiny

from t2x.compilation import program as program_lib
from t2x.config import abstract_state
from t2x.config import consistency
from t2x.data import corpus as corpus_lib
from t2x.data import history
from t2x.data import input_pipeline
from t2x.models import flops
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.tracking import metrics
from t2x.tracking import run_report
from t2x.trainer import checkpointer
from t2x.trainer import run as run_lib
from t2x.trainer import train
from t2x.training import evaluate
from t2x.training import train_state

_STEPS = 8
_KEYS = {
  'step',
  'loss',
  'nll',
  'accuracy',
  'grad_norm',
  'num_skipped',
  'learning_rate',
  'tokens_per_second',
  'step_seconds',
  'mfu',
}
_EVAL_KEYS = {
  f'eval/train/{name}'
  for name in ('loss', 'perplexity', 'accuracy', 'num_tokens')
}


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  return tmp_path_factory.mktemp('tiny')


@pytest.fixture(scope='module')
def base(directory):
  """(workdir, state) of an uninterrupted run that all others compare with."""
  workdir = directory / 'base'
  config = _config(directory, train__eval_every=4, train__eval_batches='none')
  return workdir, train.train(config, str(workdir), show=False)


def test_a_run_that_is_to_stop_after_a_step(directory, base):
  workdir = directory / 'stops'
  config = _config(directory, train__eval_every=4, train__eval_batches='none')
  train.train(config, str(workdir), stop_after=3, show=False)
  assert len(tiny.losses(workdir)) == 3
  assert 3 in tiny.saved_steps(workdir)
  assert 'eval/train/loss' in metrics.read_rows(workdir)[-1]
  assert not (workdir / 'finished.json').exists()
  train.train(config, str(workdir), show=False)
  assert tiny.losses(workdir) == tiny.losses(base[0])
  assert json.loads((workdir / 'finished.json').read_text()) == {'step': _STEPS}


@pytest.fixture(autouse=True)
def _no_reports(monkeypatch, request):
  if 'base' not in request.fixturenames or request.node.name != _REPORTING:
    monkeypatch.setattr(run_report, 'write', lambda workdir: None)


_REPORTING = 'test_the_run_leaves_a_report'


def test_one_batch_is_evaluated_at_a_time():
  """Of two that are under way, processes may take the exchanges crosswise."""
  events = []

  class Sum:
    def __init__(self, value):
      self.value = value

    def __array__(self, dtype=None, copy=None):
      events.append(('read', self.value))
      return np.asarray(self.value, dtype)

  def run(_, batch, memory):
    assert memory is None
    events.append(('run', batch))
    return {name: Sum(batch) for name in ('nll', 'accuracy', 'weight')}

  means = evaluate.evaluate(run, None, iter([1.0, 2.0, 5.0]))
  assert means['num_tokens'] == 8.0 and means['loss'] == 1.0
  runs = [i for i, (what, _) in enumerate(events) if what == 'run']
  for start, end in zip(runs, [*runs[1:], len(events)]):
    done = [value for what, value in events[start + 1 : end] if what == 'read']
    assert done and set(done) == {events[start][1]}


def _config(directory, **settings):
  settings = {
    'train__num_steps': _STEPS,
    'train__keep_last': 9,
    'data__eval_splits': 'train',
    **settings,
  }
  return tiny.experiment_of(directory, **settings)


def _train(directory, workdir, *, profile_steps=None, **settings):
  config = _config(directory, **{'data__eval_splits': '', **settings})
  return train.train(
    config, str(workdir), show=False, profile_steps=profile_steps
  )


def _same(a, b):
  """Asserts that two states are equal bit for bit, and returns how many."""
  a, b = checkpointer.by_path(a), checkpointer.by_path(b)
  assert a.keys() == b.keys()
  for name, leaf in a.items():
    np.testing.assert_array_equal(np.asarray(leaf), np.asarray(b[name]), name)
  return len(a)


def _cut(base, workdir, step):
  """Copies a run as it was after `step`."""
  shutil.copytree(base, workdir)
  for path in (workdir / 'checkpoints').iterdir():
    if int(path.name) > step:
      shutil.rmtree(path)


def test_the_loss_falls_in_one_row_a_step(base):
  workdir, state = base
  losses = tiny.losses(workdir)
  assert len(losses) == _STEPS
  assert losses[-1] < losses[0] - 1.0
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  assert len(lines) == _STEPS
  for row in metrics.read_rows(workdir):
    evaluated = row['step'] in (4, 8)
    extra = {*_EVAL_KEYS, 'eval/train/bits_per_byte'} if evaluated else set()
    assert set(row) == _KEYS | extra
    assert row['mfu'] is None  # The peak of a CPU is unknown.
    assert row['num_skipped'] == 0
    assert row['learning_rate'] == pytest.approx(1e-2)
    assert row['grad_norm'] > 0 and row['step_seconds'] > 0
    assert 0 <= row['accuracy'] <= 1
  assert int(state.step) == _STEPS


def test_the_returned_state_is_the_saved_one(base, directory):
  workdir, state = base
  again = _train(directory, workdir)  # Nothing is left to do.
  assert _same(state, again) > 20
  assert len(tiny.losses(workdir)) == _STEPS


def test_the_evaluation_sees_the_whole_split(base, directory):
  workdir, state = base
  config = _config(directory)
  expected = _evaluate(config, state.model)
  row = metrics.read_rows(workdir)[-1]
  assert row['eval/train/loss'] == pytest.approx(expected['loss'], rel=1e-5)
  assert row['eval/train/num_tokens'] == expected['num_tokens'] > 1000
  corpus = corpus_lib.prepare(config.data)
  bits = expected['loss'] * expected['num_tokens'] / np.log(2)
  assert row['eval/train/bits_per_byte'] == pytest.approx(
    bits / corpus.num_bytes('train'), rel=1e-5
  )


def _evaluate(config, model):
  mesh = mesh_lib.make(config.mesh)
  program = program_lib.Program(config, mesh, num_steps=1)
  corpus = corpus_lib.prepare(config.data)
  batches = input_pipeline.eval_batches(corpus, config.data, 'train')
  with sharding.use(mesh, config.rules):
    batches = map(program.place, batches)
    return evaluate.evaluate(program.evaluate, model, batches)


def test_stopped_and_resumed_is_uninterrupted(base, directory, tmp_path):
  workdir, state = base
  _train(directory, tmp_path, train__num_steps=3)
  assert len(tiny.losses(tmp_path)) == 3
  again = _train(directory, tmp_path)
  assert tiny.losses(tmp_path) == tiny.losses(workdir)
  _same(state, again)
  assert tiny.history(tmp_path) == [{'train.num_steps': [3, 8]}]


@pytest.mark.parametrize(
  'settings',
  [
    {
      'mesh__data': 8,
      'mesh__fsdp': 1,
      'mesh__tensor': 1,
      'train__remat': 'dots',
    },
    pytest.param(
      {
        'mesh__data': 4,
        'mesh__fsdp': 1,
        'train__accumulate': 2,
        'train__scan_layers': False,
      },
      marks=pytest.mark.exhaustive,
    ),
    {
      'train__accumulate': 2,
      'train__accumulate_whole': True,
      'train__scan_layers': False,
      'train__remat': 'save:query,mlp_up',
    },
  ],
  ids=['data8', 'data4_tensor2', 'accumulated'],
)
@pytest.mark.slow
def test_a_run_goes_on_laid_out_otherwise(base, directory, tmp_path, settings):
  workdir = tmp_path / 'run'
  _cut(base[0], workdir, 4)
  _train(directory, workdir, train__num_steps=6, **settings)
  losses = tiny.losses(workdir)
  np.testing.assert_allclose(losses, tiny.losses(base[0])[:6], rtol=2e-6)
  assert losses[:4] == tiny.losses(base[0])[:4]


@pytest.mark.parametrize('step', [3, 4])
def test_sigterm_saves_and_the_run_goes_on_exactly(
  base, directory, tmp_path, monkeypatch, step
):
  write = metrics.MetricsWriter.write

  def interrupted(self, row):
    write(self, row)
    if row['step'] == step:
      os.kill(os.getpid(), signal.SIGTERM)

  with monkeypatch.context() as patch:
    patch.setattr(metrics.MetricsWriter, 'write', interrupted)
    state = _train(directory, tmp_path, train__checkpoint_every=0)
  stopped = int(state.step)
  assert step <= stopped <= step + 1  # One step is always under way.
  assert len(tiny.losses(tmp_path)) == stopped
  assert os.listdir(tmp_path / 'checkpoints') == [str(stopped)]
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  _train(directory, tmp_path)
  assert tiny.losses(tmp_path) == tiny.losses(base[0])


def test_a_signal_during_an_evaluation_is_not_lost(
  base, directory, tmp_path, monkeypatch
):
  real = run_lib.Run.evaluate

  def interrupted(self):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(self)

  with monkeypatch.context() as patch:
    patch.setattr(run_lib.Run, 'evaluate', interrupted)
    _train(directory, tmp_path, train__checkpoint_every=0, train__eval_every=2)
  assert os.listdir(tmp_path / 'checkpoints') == ['2']
  _train(directory, tmp_path)
  assert tiny.losses(tmp_path) == tiny.losses(base[0])


@pytest.mark.slow
def test_kill_9_at_three_random_steps(directory, tmp_path):
  num_steps = 40
  _train(directory, tmp_path / 'whole', train__num_steps=num_steps)
  whole = tiny.losses(tmp_path / 'whole')
  assert len(whole) == num_steps

  seed = random.randrange(1_000_000)
  draw = random.Random(seed)
  print('seed', seed)  # Shown where the test fails.
  workdir = tmp_path / 'run'
  kills = sorted(draw.sample(range(2, num_steps - 8), 3))
  seen = []
  for number, step in [*((signal.SIGKILL, k) for k in kills), (None, None)]:
    number = number or signal.SIGTERM
    step = step or max(seen[-1] + 1, num_steps - 6)
    code, error = _interrupt(directory, workdir, number, step, num_steps)
    assert code == (-9 if number == signal.SIGKILL else 0), error
    seen.append(_last_step(workdir))
    assert seen[-1] < num_steps
  assert 'Stopped by a signal' in error
  assert _last_step(workdir) == max(
    int(name) for name in os.listdir(workdir / 'checkpoints')
  )

  _train(directory, workdir, train__num_steps=num_steps)
  assert tiny.losses(workdir) == whole


def _interrupt(directory, workdir, number, step, num_steps):
  process = tiny.start(
    directory,
    f'--workdir={workdir}',
    f'--set=train.num_steps={num_steps}',
    '--set=train.keep_last=9',
    '--set=data.eval_splits=',
  )
  # A killed run may have written rows past the checkpoint; they are dropped
  # when it goes on, so wait for that first.
  begun = False
  while process.poll() is None:
    last = _last_step(workdir)
    begun = begun or last < step
    if begun and last >= step:
      process.send_signal(number)
      break
    time.sleep(0.002)
  _, error = process.communicate(timeout=120)
  return process.returncode, error


def _last_step(workdir):
  path = workdir / 'metrics.jsonl'
  text = path.read_bytes() if path.exists() else b''
  return text.count(b'\n')


@pytest.mark.slow
def test_the_average_is_evaluated_and_the_rest_is_frozen(
  base, directory, tmp_path
):
  settings = {
    'train__num_steps': 3,
    'train__ema_decay': 0.75,
    'train__trainable': r'.*\.mlp\..*',
    'data__eval_splits': 'train',
    'train__eval_batches': 'none',
  }
  config = _config(directory, **settings)
  states = [
    train.train(
      tiny_config,
      str(tmp_path / 'run'),
      show=False,
    )
    for tiny_config in (
      _config(directory, **{**settings, 'train__num_steps': n})
      for n in (1, 2, 3)
    )
  ]
  first, second, last = (checkpointer.by_path(s.model) for s in states)
  frozen = [n for n in last if '.mlp.' not in n]
  trained = [n for n in last if '.mlp.' in n]
  assert len(frozen) > 5 and len(trained) >= 2
  for name in frozen:
    np.testing.assert_array_equal(last[name], first[name], name)
  for name in trained:
    assert np.abs(np.asarray(last[name] - second[name])).max() > 1e-4, name
  before, after = (checkpointer.by_path(s.ema) for s in states[1:])
  assert sorted(after) == sorted(trained)
  for name in trained:
    expected = 0.75 * before[name] + 0.25 * last[name]
    np.testing.assert_allclose(after[name], expected, rtol=1e-5, atol=1e-7)
  averaged = train_state.averaged_model(states[-1], config.step_config)
  row = metrics.read_rows(tmp_path / 'run')[-1]
  loss = _evaluate(config, averaged)['loss']
  assert row['eval/train/loss'] == pytest.approx(loss, rel=1e-6)
  other = _evaluate(config, states[-1].model)['loss']
  assert abs(other - loss) > 1e-3


def test_trainable_must_match_something(directory, tmp_path):
  with pytest.raises(
    ValueError, match=r"train.trainable='mlp' matches no parameter. Paths look"
  ):
    _train(directory, tmp_path, train__trainable='mlp')
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped_then_stop(directory, tmp_path):
  # The first update sends the weights to 1e30, and the loss to NaN.
  settings = {'optim__learning_rate': 1e30, 'train__checkpoint_every': 1}
  run = tmp_path / 'run'
  one = _train(directory, run, train__num_steps=1, **settings)
  three = _train(directory, run, train__num_steps=3, **settings)
  _same(one.model, three.model)
  _same(one.opt_state, three.opt_state)
  assert int(three.step) == 3 and int(three.num_skipped) == 2
  with pytest.raises(
    run_lib.NonFiniteError,
    match=r'Step 5: grad_norm=nan, loss=nan, .* 4 updates in a row .*'
    r'train.max_skipped=4.*those of step 1. Lower optim.learning_rate',
  ):
    _train(directory, run, train__max_skipped=4, **settings)
  rows = metrics.read_rows(run)
  assert [row['step'] for row in rows] == [1, 2, 3, 4, 5]
  assert [row['num_skipped'] for row in rows] == [0, 1, 2, 3, 4]
  assert rows[-1]['loss'] is None and 'loss' in rows[-1]['non_finite']


@pytest.fixture(scope='module')
def scheduled(directory):
  """A run of six steps, two of which are skipped: (settings, workdir)."""
  settings = {
    'train__num_steps': 6,
    'train__checkpoint_every': 1,
    'optim': 'sgd',
    'optim__momentum': 0.0,
    'optim__weight_decay': 0.0,
    'optim__clip_norm': 'none',
    'optim__learning_rate': 0.5,
    'optim__schedule__shape': 'linear',
    'optim__schedule__warmup_steps': 2,
    'optim__schedule__final': 0.2,
    'model__num_layers': 1,
    'mesh__data': 8,
    'mesh__fsdp': 1,
    'mesh__tensor': 1,
  }
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(run_report, 'write', lambda workdir: None)
    patch.setattr(
      input_pipeline, 'train_batches', _spoiled(input_pipeline.train_batches)
    )
    _train(directory, directory / 'scheduled', **settings)
  return settings, directory / 'scheduled'


def _spoiled(train_batches):
  """Returns batches of which the third and the fourth are not finite."""

  def batches(*args, start_step, **kwargs):
    real = train_batches(*args, start_step=start_step, **kwargs)
    for step, batch in enumerate(real, start_step + 1):
      weights = batch['weights'] * (np.nan if step in (3, 4) else 1)
      yield {**batch, 'weights': weights.astype(batch['weights'].dtype)}

  return batches


@pytest.mark.slow
def test_the_learning_rate_of_a_row_is_the_one_that_was_used(scheduled):
  """By the change of the weights, over the gradient, of plain descent."""
  settings, workdir = scheduled
  rows = metrics.read_rows(workdir)
  assert [row['num_skipped'] for row in rows] == [0, 0, 1, 2, 0, 0]
  rates = [row['learning_rate'] for row in rows]
  # Two of warmup, then down to a fifth over four; the skipped count for none.
  np.testing.assert_allclose(rates, [0.25, 0.5, 0.4, 0.4, 0.4, 0.3], rtol=1e-6)
  assert not any('num_updates' in row for row in rows)
  config = _config(workdir.parent, **settings)
  shapes, _ = abstract_state.shapes_of(config, mesh_lib.make(config.mesh))
  saved = checkpointer.Checkpoints(str(workdir))
  models = [
    checkpointer.by_path(saved.restore(shapes, step)[1].model)
    for step in range(1, 7)
  ]
  saved.close()
  for row, rate, before, after in zip(rows[1:], rates[1:], models, models[1:]):
    moved = [np.asarray(after[n] - before[n], np.float64) for n in before]
    norm = np.sqrt(sum((m**2).sum() for m in moved))
    want = 0.0 if row['num_skipped'] else rate * row['grad_norm']
    np.testing.assert_allclose(norm, want, rtol=1e-3, err_msg=str(row))


@pytest.mark.slow
def test_the_count_of_updates_goes_on_and_the_last_takes_the_final_rate(
  scheduled, directory, tmp_path, caplog
):
  settings, base = scheduled
  workdir = tmp_path / 'run'
  _cut(base, workdir, 4)
  (workdir / 'numbers.json').unlink()  # As if begun before there was one.
  _train(directory, workdir, **settings)
  assert 'began before 2026-11-30' in caplog.text
  assert 'learning rate takes its peak' in caplog.text
  rates = [row['learning_rate'] for row in metrics.read_rows(workdir)]
  before = [row['learning_rate'] for row in metrics.read_rows(base)]
  assert rates == before
  caplog.clear()
  short = {**settings, 'optim__schedule__warmup_steps': 9}
  _train(directory, tmp_path / 'short', **{**short, 'train__num_steps': 3})
  assert 'the warmup is cut to 2' in caplog.text
  assert 'began before' not in caplog.text
  rates = [r['learning_rate'] for r in metrics.read_rows(tmp_path / 'short')]
  assert rates == [0.25, 0.5, float(np.float32(0.1))]


def test_profile_steps_write_a_trace(base, directory, tmp_path):
  workdir = tmp_path / 'run'
  _cut(base[0], workdir, 4)
  # Steps 1 to 4 are past; what is left of them is recorded.
  _train(directory, workdir, train__num_steps=7, profile_steps=(2, 6))
  assert len(list(workdir.glob('profile/plugins/profile/*/*.xplane.pb'))) == 1
  _train(directory, workdir, train__num_steps=8, profile_steps=(8, 20))
  assert len(list(workdir.glob('profile/plugins/profile/*/*.xplane.pb'))) == 2
  assert tiny.losses(workdir) == tiny.losses(base[0])


def test_hidden_transfers_are_not_let_through(
  base, directory, tmp_path, monkeypatch
):
  workdir = tmp_path / 'run'
  _cut(base[0], workdir, 4)
  advance = run_lib.Run.advance

  def leaky(self, step):
    jax.jit(lambda x: x + 1)(np.ones(3))
    advance(self, step)

  monkeypatch.setattr(run_lib.Run, 'advance', leaky)
  with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
    _train(directory, workdir)


def test_log_every_leaves_out_rows(base, directory, tmp_path):
  workdir = tmp_path / 'run'
  _cut(base[0], workdir, 4)
  _train(directory, workdir, train__log_every=3)
  steps = [row['step'] for row in metrics.read_rows(workdir)]
  assert steps == [1, 2, 3, 4, 6, 8]  # The last step is always evaluated.


def test_mfu_goes_by_the_length_of_each_batch(directory, tmp_path, monkeypatch):
  monkeypatch.setattr(flops, 'peak_flops', lambda kind, dtype: 1e12)
  settings = {
    'data__batching': 'pad',
    'data__length': 64,
    'data__batching__buckets': '(16,64)',
    'data__files': f'{directory}/lengths.jsonl',
    'data__train_split': 'train',
  }
  texts = [f'a {i * 7}' if i % 2 else f'{i} long ' * 6 for i in range(64)]
  lines = [json.dumps({'text': f'{i} {t}'}) for i, t in enumerate(texts)]
  (directory / 'lengths.jsonl').write_text('\n'.join(lines))
  _train(directory, tmp_path / 'run', **settings)
  config = _config(directory).model
  shapes = [flops.BatchShape(8, length) for length in (16, 64)]
  counted = {flops.train_flops(config, shape) for shape in shapes}
  found = {
    round(row['mfu'] * row['step_seconds'] * 8 * 1e12)
    for row in metrics.read_rows(tmp_path / 'run')
  }
  assert found == counted


def test_the_run_leaves_a_report(base):
  workdir, _ = base
  run_report.write(workdir)
  assert 'loss' in (workdir / 'report.html').read_text()


@pytest.mark.parametrize(
  ('settings', 'steps'),
  [
    ({'train__num_tokens': 1}, 1),
    ({'train__num_tokens': 256}, 1),
    ({'train__num_tokens': 257}, 2),
    ({'train__num_epochs': 1.0}, None),
    ({'train__num_epochs': 2.5}, None),
    ({'train__num_epochs': 1e-6}, 1),
  ],
)
def test_the_length_of_a_run(directory, settings, steps):
  config = _config(directory, train__num_steps='none', **settings)
  corpus = corpus_lib.prepare(config.data)
  if steps is None:
    rows = corpus.num_tokens('train') / config.data.length
    expected = config.train.num_epochs * rows / config.data.batch_size
    steps = pytest.approx(expected, abs=2.5)
  assert train.resolve_num_steps(config, corpus) == steps


def test_a_length_in_epochs_is_not_rounded_up_twice(directory, monkeypatch):
  """Binary fractions make 11.000000000000002 of 1.1 epochs of 10 steps."""
  ten = history.Segment(batch_size=8, epoch=10)
  monkeypatch.setattr(input_pipeline, 'segment', lambda *_, **__: ten)
  for epochs, steps in ((1.1, 11), (0.7, 7), (2.3, 23), (1.11, 12), (1e-9, 1)):
    settings = {'train__num_steps': 'none', 'train__num_epochs': epochs}
    config = _config(directory, **settings)
    assert train.resolve_num_steps(config, None) == steps


def test_what_cannot_fit_is_refused(directory):
  check = lambda **s: consistency.check(_config(directory, **s), 8)
  check()
  with pytest.raises(ValueError, match='multiple of 16. Set it to 16'):
    check(train__accumulate=4)
  # Accumulation splits rows over `data` by hand, whatever the rules say.
  with pytest.raises(
    ValueError, match='mesh.data=2 x mesh.fsdp=2 in train.acc'
  ):
    check(rules__batch='fsdp', data__batch_size=4, train__accumulate=2)
  with pytest.raises(ValueError, match='does not train a model of kind'):
    check(data__objective='masked_lm')
  with pytest.raises(ValueError, match='data.length=128 is more than .*=64 po'):
    check(data__length=128)
  message = 'x pipeline.microbatches=8 micro.* multiple of 16. Set it to 16'
  with pytest.raises(ValueError, match=message):
    check(mesh__pipe=2, mesh__data=1)
  with pytest.raises(ValueError, match='4 parts of a pipeline for 2 .* layers'):
    check(mesh__pipe=4, mesh__data=1, mesh__fsdp=1)
  with pytest.raises(ValueError, match='Set rules.context_attention=all_to'):
    check(mesh__pipe=2, mesh__data=1, mesh__fsdp=1, mesh__context=2)
  for rule, axis in (('layers', 'fsdp'), ('mlp', 'pipe')):
    with pytest.raises(ValueError, match=f'rules.{rule}={axis}: on a mesh of'):
      check(mesh__pipe=2, mesh__data=1, **{f'rules__{rule}': axis})
