"""Several tasks in one run: rates, batches, heads, weights, continuation."""

import collections
import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from t2x.compilation import program as program_lib
from t2x.config import consistency
from t2x.config import overrides
from t2x.data import config as data
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.data import mixing
from t2x.inference import embeddings
from t2x.inference import loading
from t2x.losses import task_weighting
from t2x.objectives import causal_lm
from t2x.objectives import classification
from t2x.objectives import masked_lm
from t2x.objectives import mixture
from t2x.objectives import next_sentence
from t2x.objectives import span_corruption
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.tracking import metrics as metrics_lib
from t2x.trainer import train
from t2x.training import train_step

SIZE = 24  # Rows of a batch.


def labelled(directory):
  """Forty texts of two classes."""
  file = directory / 'labelled.jsonl'
  file.parent.mkdir(parents=True, exist_ok=True)
  if not file.exists():
    rows = [
      {
        'text': f'{i} is {"even" if i % 2 == 0 else "odd"}.',
        'sort': 'ab'[i % 2],
      }
      for i in range(40)
    ]
    file.write_text('\n'.join(map(json.dumps, rows)))
  return str(file)


def experiment_of(directory, weighting=None, rates=(2.0, 1.0, 1.0), **settings):
  """Masked tokens, sentences of the same texts, and classes of others."""
  config = tiny.experiment_of(
    directory,
    model='encoder',
    model__pooler=True,
    model__next_sentence=True,
    model__num_token_types=2,
    data__batch_size=SIZE,
    data__eval_splits='train',
    **settings,
  )
  objectives = {
    'masks': masked_lm.MaskedLM(rate=0.3),
    'pairs': next_sentence.NextSentence(masked=masked_lm.MaskedLM(rate=0.2)),
    'sorts': classification.Classification(),
  }
  own = {'files': labelled(directory), 'target_field': 'sort'}
  tasks = tuple(
    mixture.Task(
      name=name,
      objective=objective,
      rate=rate,
      weight=weight,
      **(own if name == 'sorts' else {}),
    )
    for (name, objective), rate, weight in zip(
      objectives.items(), rates, (1.0, 0.5, 2.0), strict=True
    )
  )
  objective = mixture.Mixture(
    tasks=tasks, weighting=weighting or mixture.Fixed()
  )
  return dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, classes=(2,)),
    data=dataclasses.replace(config.data, objective=objective),
  )


@pytest.fixture(scope='module')
def shared(tmp_path_factory):
  directory = tmp_path_factory.mktemp('mixture')
  config = experiment_of(directory)
  return directory, config, corpus_lib.prepare(config.data)


# --- Which example is of which task. ---


@pytest.mark.parametrize(
  'shares', [[0.7, 0.2, 0.1], [0.5, 0.5], [1, 0, 0], [0, 1], [0.001, 0.999]]
)
def test_each_task_has_its_share_and_its_examples_in_order(shares):
  shares = np.array(shares)
  task, number = mixture.split(np.arange(20_000), shares)
  for k, share in enumerate(shares):
    own = task == k
    assert (number[own] == np.arange(own.sum())).all()
    counts = np.cumsum(own)
    wanted = share * np.arange(1, 20_001)
    assert np.abs(counts - wanted).max() <= len(shares)
  # Any of them without those before it.
  some = np.array([7, 19_000, 3])
  again = mixture.split(some, shares)
  np.testing.assert_array_equal(again, (task[some], number[some]))


def test_rates_in_proportion_to_rows():
  tasks = (
    mixture.Task(name='a'),
    mixture.Task(name='b', rate=2.0),
    mixture.Task(name='c'),
  )
  make = functools.partial(mixture.Mixture, tasks=tasks, rates='proportional')
  rows = [100, 400, 10_000]
  np.testing.assert_allclose(
    make().shares(rows), np.array([100, 800, 10_000]) / 10_900
  )
  hot = np.array([10.0, 2 * 20.0, 100.0])
  np.testing.assert_allclose(
    make(temperature=2.0).shares(rows), hot / hot.sum()
  )
  np.testing.assert_allclose(
    make(cap=200).shares(rows), np.array([100, 400, 200]) / 700
  )


def test_batches_are_of_their_tasks(shared):
  _, config, corpus = shared
  batches = mixing.MixedBatches(corpus, config.data, seed=0)
  spec = input_pipeline.batch_spec(config.data)
  seen = collections.Counter()
  for step in range(8):
    batch = batches[step]
    assert {n: (a.shape, a.dtype) for n, a in batch.items()} == spec
    tasks = batch['tasks'][:, 0]
    seen.update(tasks.tolist())
    is_pair = tasks == 1
    np.testing.assert_array_equal(batch['sentence_weights'][:, 0], is_pair)
    np.testing.assert_array_equal(batch['class0_weights'][:, 0], tasks == 2)
    assert (batch['weights'].sum(1) > 0).tolist() == (tasks != 2).tolist()
    assert batch['token_types'][is_pair].any(axis=1).all()
    assert not batch['token_types'][~is_pair].any()
    for row in np.flatnonzero(tasks == 2):
      text = corpus.tokenizer.decode(batch['inputs'][row])
      assert batch['class0_targets'][row, 0] == int('odd' in text)
  assert seen == {0: 4 * SIZE, 1: 2 * SIZE, 2: 2 * SIZE}


def test_hosts_together_make_the_batch_and_rates_read_nothing_anew(shared):
  directory, config, corpus = shared
  whole = mixing.MixedBatches(corpus, config.data, seed=3)[5]
  parts = [
    mixing.MixedBatches(corpus, config.data, seed=3, rows=rows)[5]
    for rows in (slice(0, 12), slice(12, SIZE))
  ]
  for name, array in whole.items():
    joined = np.concatenate([part[name] for part in parts])
    np.testing.assert_array_equal(joined, array, err_msg=name)
  before = {p: p.stat().st_mtime_ns for p in directory.rglob('*')}
  other = experiment_of(directory, rates=(1.0, 0.0, 3.0))
  assert corpus_lib.prepare(other.data).fingerprint == corpus.fingerprint
  written = {
    p: p.stat().st_mtime_ns for p in directory.rglob('*') if p.is_file()
  }
  assert all(before[p] == t for p, t in written.items() if 'lock' not in p.name)


def test_a_task_is_evaluated_alone_and_whole(shared):
  _, config, corpus = shared
  sets = input_pipeline.eval_sets(corpus, config.data)
  for number, (title, split, batches) in enumerate(sets):
    name = config.data.objective.tasks[number].name
    assert (title, split) == (f'train.{name}', 'train')
    rows = list(batches)
    assert all((b['tasks'] == number).all() for b in rows)
    if number == 2:
      texts = len(corpus.tasks[name].streams('train')[0].offsets) - 1
      assert sum(b['class0_weights'].sum() for b in rows) == texts > 30


# --- Losses and their weights. ---


def trained(
  directory, num_steps=2, state=None, settings=None, program=None, **more
):
  """Trains some steps, by `program` if one was made of these settings."""
  config = experiment_of(directory, **more, **(settings or {}))
  sizes = config.mesh
  num = sizes.data * sizes.fsdp * sizes.tensor * sizes.pipe
  mesh = mesh_lib.make(sizes, jax.devices()[:num])
  corpus = corpus_lib.prepare(config.data)
  with sharding.use(mesh, config.rules):
    program = program or program_lib.Program(config, mesh, num_steps=9)
    state = program.init_state() if state is None else state
    first = int(state.step)
    batches = mixing.MixedBatches(corpus, config.data, seed=0)
    for step in range(first, first + num_steps):
      batch = program.place(batches[step])
      state, metrics = program.step(state, batch)
  return jax.device_get((state, metrics)), program, batches


ONE = {'mesh__data': 1, 'mesh__fsdp': 1, 'mesh__tensor': 1}


def test_the_loss_is_the_weighted_sum_of_the_tasks(shared):
  directory, _, _ = shared
  (_, got), program, batches = trained(directory, num_steps=1, settings=ONE)
  batch = batches[0]
  state = program.init_state()
  tasks = batch['tasks'][:, 0]
  want, shares = 0.0, {}
  for term in ('', 'sentence_', 'class0_'):
    shares[term] = (
      np.array([batch[f'{term}weights'][tasks == k].sum() for k in range(3)])
      / batch[f'{term}weights'].sum()
    )
  for k, name in enumerate(('masks', 'pairs', 'sorts')):
    alone = {n: a.copy() for n, a in batch.items()}
    for term in shares:
      alone[f'{term}weights'][tasks != k] = 0
    sums = jax.jit(
      functools.partial(
        train_step.eval_step, config=program.config.train.step_config
      )
    )(state.model, alone)
    for term, share in shares.items():
      if share[k]:
        nll = sums[f'{term}nll'] / sums[f'{term}weight']
        np.testing.assert_allclose(got[f'{name}/{term}nll'], nll, rtol=1e-5)
        want += (1.0, 0.5, 2.0)[k] * share[k] * nll
  np.testing.assert_allclose(got['loss'], want, rtol=1e-5)
  assert got['pairs/weight'] == 0.5 and 'sorts/nll' not in got


WEIGHTINGS = {
  'fixed': mixture.Fixed(),
  'uncertainty': mixture.Uncertainty(),
  'grad_norm': mixture.GradNorm(),
}


@pytest.fixture(scope='module')
def on_one_device(shared):
  """A function from a weighting to two steps of one device."""
  directory, _, _ = shared
  return functools.cache(
    lambda name: trained(directory, settings=ONE, weighting=WEIGHTINGS[name])
  )


@pytest.mark.parametrize(
  'weighting',
  [
    pytest.param('fixed', marks=pytest.mark.exhaustive),
    pytest.param('uncertainty', marks=pytest.mark.exhaustive),
    'grad_norm',
  ],
)
def test_layouts_and_continuation(shared, on_one_device, weighting):
  directory, _, _ = shared
  own = {'weighting': WEIGHTINGS[weighting]}
  (state, want), program, _ = on_one_device(weighting)
  (other, got), _, _ = trained(
    directory, settings={'train__accumulate': 2}, **own
  )
  assert want.keys() == got.keys()
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=2e-4, err_msg=name)
  for name, value in state.carried.items():
    np.testing.assert_allclose(other.carried[name], value, rtol=2e-4)
  assert bool(state.carried) == (weighting != 'fixed')
  step = functools.partial(
    trained, directory, num_steps=1, settings=ONE, program=program, **own
  )
  (half, _), _, _ = step()
  (again, _), _, _ = step(state=half)
  for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True):
    np.testing.assert_array_equal(a, b)


def test_stages(shared, on_one_device):
  directory, _, _ = shared
  own = {'weighting': mixture.Uncertainty()}
  (state, want), _, _ = on_one_device('uncertainty')
  staged = ONE | {'mesh__pipe': 2, 'pipeline__microbatches': 4}
  (other, got), _, _ = trained(directory, settings=staged, **own)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=2e-4, err_msg=name)
  for name, value in state.carried.items():
    np.testing.assert_allclose(other.carried[name], value, rtol=2e-4)


def test_probes_are_norms_of_gradients():
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(5, 3, 2)), jnp.float32)
  numbers, weights = (
    jnp.array([0, 2, 2, 0, 2]),
    jnp.asarray(rng.random((5, 3, 2))),
  )

  def loss(x, probes):
    return (
      jnp.sin(task_weighting.with_probes(x, probes, numbers)) * weights
    ).sum()

  grads, squares = jax.grad(loss, (0, 1))(x, jnp.zeros(3))
  plain = np.asarray(weights * jnp.cos(x))
  np.testing.assert_allclose(grads, plain, rtol=1e-6)
  want = [(plain[[0, 3]] ** 2).sum(), 0.0, (plain[[1, 2, 4]] ** 2).sum()]
  np.testing.assert_allclose(squares, want, rtol=1e-5)


def moved(weighting, losses, norms=None, rates=(0.5, 0.5), steps=4000):
  """Weights after many steps of these losses, and norms of a row's gradient."""
  tasks = task_weighting.Tasks(
    names=('a', 'b'), weights=(1.0, 1.0), terms=((), ()), weighting=weighting
  )
  losses, share = jnp.asarray(losses), jnp.asarray(rates)

  def step(carried, _):
    sums = {'by_task': jnp.stack([losses * share, share, share])}
    if norms is not None:
      # A batch of 100 rows; its loss is a mean, to which each adds 1 / 100.
      each = task_weighting.factors(tasks, carried) * jnp.asarray(norms) / 100
      sums[task_weighting.SQUARES] = 100 * share * each**2
      sums[task_weighting.ROWS] = share
    return task_weighting.update(tasks, carried, sums), None

  end, _ = jax.lax.scan(step, task_weighting.start(tasks), length=steps)
  return np.asarray(task_weighting.factors(tasks, end))


def test_uncertainty_rests_at_one_over_twice_the_loss():
  got = moved(mixture.Uncertainty(), [4.0, 0.5])
  np.testing.assert_allclose(got, [1 / 8, 1.0], rtol=1e-3)


@pytest.mark.parametrize('rates', [(0.5, 0.5), (0.8, 0.2)])
def test_grad_norm_makes_norms_equal(rates):
  """Of gradients of length 3 and 1; both tasks train as fast."""
  weighting = mixture.GradNorm(learning_rate=1e-3)
  got = moved(weighting, [2.0, 5.0], [3.0, 1.0], rates)
  np.testing.assert_allclose(got.sum(), 2.0, rtol=1e-5)
  np.testing.assert_allclose(got[1] / got[0], 3.0, rtol=0.02)


# --- A run, and what is refused. ---


def test_a_run_of_a_mixture(shared, tmp_path):
  directory, _, _ = shared
  config = experiment_of(directory, train__num_steps=30)
  config = overrides.override(config, {'train.eval_batches': 'none'})
  train.train(config, tmp_path / 'run', show=False)
  rows = metrics_lib.read_rows(tmp_path / 'run')
  last = rows[-1]
  for name in ('masks/nll', 'pairs/sentence_nll', 'sorts/class0_accuracy'):
    assert rows[0][name] is not None
  # Over a run the rates are those that were asked for.
  for name, rate in (('masks', 0.5), ('pairs', 0.25), ('sorts', 0.25)):
    mean = np.mean([row[f'{name}/rate'] for row in rows])
    np.testing.assert_allclose(mean, rate, atol=2 / (30 * SIZE))
  assert not any('non_finite' in row for row in rows)
  assert 'eval/train.sorts/loss' not in last
  assert last['masks/nll'] < rows[0]['masks/nll'] - 0.5
  assert last['eval/train.masks/loss'] < rows[0]['masks/nll']
  assert {
    'eval/train.pairs/sentence_loss',
    'eval/train.sorts/class0_accuracy',
  } <= {*last}
  # What it learned of classes can be asked of the run.
  trained = loading.load(str(tmp_path / 'run'))
  assert trained.labels == {'class0': ['a', 'b']}
  texts = [f'{i} is {("even", "odd")[i % 2]}.' for i in range(40)]
  found = embeddings.classify(trained, texts)
  assert all(abs(sum(one.values()) - 1) < 1e-5 for one in found)
  nll = np.mean([-np.log(p['ab'[i % 2]]) for i, p in enumerate(found)])
  want = last['eval/train.sorts/class0_loss']
  np.testing.assert_allclose(nll, want, rtol=5e-3)
  with pytest.raises(ValueError, match='none for head 1'):
    embeddings.classify(trained, texts, head=1)


def test_messages(shared):
  directory, config, _ = shared
  objective = config.data.objective
  change = lambda **more: dataclasses.replace(objective, **more)
  task = objective.tasks[0]
  of = lambda **more: dataclasses.replace(task, **more)
  with pytest.raises(ValueError, match='grow by factors'):
    change(tasks=(of(weight=0.0), of(name='b')), weighting=mixture.GradNorm())
  for tasks, message in (
    ((task,), 'two tasks or more'),
    ((task, task), 'name of its own'),
    ((of(rate=0.0), of(name='b', rate=0.0)), 'nor add up to 0'),
    ((task, of(name='b', weight=-1.0)), 'not be negative'),
    (
      (task, of(name='b', objective=span_corruption.SpanCorruption())),
      'One model trains all',
    ),
  ):
    with pytest.raises(ValueError, match=message):
      change(tasks=tasks)
  consistency.check(config, 8)
  model = dataclasses.replace(config.model, classes=())
  with pytest.raises(ValueError, match='classes apart by head 0'):
    consistency.check(dataclasses.replace(config, model=model), 8)
  more = change(tasks=(task, of(name='b', objective=causal_lm.CausalLM())))
  wrong = dataclasses.replace(config.data, objective=more)
  with pytest.raises(ValueError, match='does not train a model'):
    consistency.check(dataclasses.replace(config, data=wrong), 8)
  buckets = dataclasses.replace(config.data, batching=data.Pad(buckets=(8, 16)))
  with pytest.raises(ValueError, match='are all as long'):
    input_pipeline.check(buckets)
  staged = overrides.override(
    config,
    {
      'data.objective.weighting': 'grad_norm',
      'mesh.pipe': '2',
      'data.batch_size': '64',
    },
  )
  with pytest.raises(ValueError, match='do not tell apart|tell apart'):
    consistency.check(staged, 16)
  three = change(
    tasks=(
      *objective.tasks[:2],
      dataclasses.replace(
        objective.tasks[2],
        objective=classification.Classification(num_classes=3),
      ),
    )
  )
  own = dataclasses.replace(config.data, objective=three)
  with pytest.raises(ValueError, match="has 2 labels \\('a', 'b'\\)"):
    mixing.MixedBatches(corpus_lib.prepare(own), own, seed=0)
  assert directory
