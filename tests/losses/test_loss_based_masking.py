"""Masks that follow the loss: their choice, their state, their layouts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from t2x.compilation import program as program_lib
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.losses import loss_based_masking
from t2x.objectives import masked_lm
from t2x.objectives import masking
from t2x.objectives import noise
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding

VOCAB, FIRST, ROWS, LENGTH = 300, 105, 400, 40


@functools.cache
def make_batch():
  objective = masked_lm.MaskedLM(masking=masking.ByLoss(), rate=0.2)
  tokens = np.random.default_rng(0).integers(FIRST, VOCAB, (ROWS, LENGTH))
  tokens[:, 0], tokens[:, 30:] = vocab_lib.BOS, vocab_lib.PAD
  source = rows_lib.Rows(
    tokens.astype(np.int32), (tokens != 0).astype(np.int32)
  )
  vocab = vocab_lib.Vocab(size=VOCAB)
  keys = noise.keys(0, np.arange(ROWS))
  batch = objective.examples(source, keys=keys, vocab=vocab, length=LENGTH)
  lengths = objective.lengths(LENGTH)
  assert {n: a.shape[1] for n, a in batch.items()} == lengths
  return tokens, batch


def masked(loss_V, seed=0, **config):
  fn = functools.partial(loss_based_masking.masked, masking.ByLoss(**config))
  batch = jax.tree.map(jnp.asarray, make_batch()[1])
  return jax.device_get(jax.jit(fn)(batch, loss_V, jax.random.key(seed)))


def test_as_many_as_before_and_only_text():
  tokens, host = make_batch()
  batch = masked(jnp.ones(VOCAB))
  assert set(batch) == set(host)
  # 29 tokens of text: 6 of a row's 8 places.
  assert (batch['weights'].sum(1) == 6).all()
  for row in range(ROWS):
    places = batch['target_positions'][row, :6]
    assert (np.diff(places) > 0).all() and places[0] > 0 and places[-1] < 30
    assert (batch['targets'][row, :6] == tokens[row, places]).all()
    rest = np.setdiff1d(np.arange(LENGTH), places)
    assert (batch['inputs'][row, rest] == tokens[row, rest]).all()
    assert (batch['inputs'][row, places] == host['noised'][row, places]).all()
  inputs = np.take_along_axis(batch['inputs'], batch['target_positions'], 1)
  share = (inputs == vocab_lib.MASK)[batch['weights'] > 0].mean()
  assert abs(share - 0.8) < 4 * 0.4 / (6 * ROWS) ** 0.5


def test_hard_tokens_are_drawn_more_often():
  """Two halves of the vocabulary, one with nine times the loss."""
  loss_V = jnp.where(jnp.arange(VOCAB) % 2 == 0, 9.0, 1.0)
  tokens, _ = make_batch()
  is_text = tokens >= FIRST

  def share(**config):
    batches = [masked(loss_V, seed, **config) for seed in range(4)]
    drawn = [b['targets'][b['weights'] > 0] for b in batches]
    return (np.concatenate(drawn) % 2 == 0).mean()

  even = (tokens[is_text] % 2 == 0).mean()
  assert abs(share(power=0.0) - even) < 4 * 0.5 / (24 * ROWS) ** 0.5
  # By plain draws without replacement.
  rng = np.random.default_rng(1)
  want = []
  for row in np.tile(np.arange(ROWS), 4):
    own = tokens[row][is_text[row]]
    chance = np.asarray(loss_V, np.float64)[own]
    drawn = rng.choice(own, 6, replace=False, p=chance / chance.sum())
    want.append((drawn % 2 == 0).mean())
  assert abs(share() - np.mean(want)) < 8 * np.std(want) / len(want) ** 0.5
  assert share(power=0.5) < share() < share(power=2.0)


def test_the_average_is_of_tokens_that_were_predicted():
  rng = np.random.default_rng(0)
  nll, targets = rng.random((3, 5)), rng.integers(0, 6, (3, 5))
  weights = rng.integers(0, 2, (3, 5)) * 0.3
  sums = loss_based_masking.sums_by_token(
    *map(jnp.asarray, (nll, targets, weights)), rows=8
  )
  config = masking.ByLoss(decay=0.75)
  got = loss_based_masking.update(config, jnp.full(8, 2.0), sums)
  for token in range(8):
    own = nll[(targets == token) & (weights > 0)]
    want = 0.75 * 2.0 + 0.25 * own.mean() if len(own) else 2.0
    np.testing.assert_allclose(got[token], want, rtol=1e-6)


def test_an_example_draws_the_same_wherever_it_is():
  """In another place of a batch, and in a longer row."""
  loss_V = jnp.where(jnp.arange(VOCAB) % 2 == 0, 9.0, 1.0)
  _, batch = make_batch()
  order = np.random.default_rng(0).permutation(ROWS)[:50]
  moved = {name: array[order] for name, array in batch.items()}
  wide = {'inputs', 'segments', 'positions', 'originals', 'noised', 'maskable'}
  moved |= {n: np.pad(moved[n], ((0, 0), (0, 24))) for n in wide}
  few = ('targets', 'weights', 'target_positions')
  moved |= {n: np.pad(moved[n], ((0, 0), (0, 8))) for n in few}
  find = functools.partial(loss_based_masking.masked, masking.ByLoss())
  key = jax.random.key(0)
  want, got = (find(b, loss_V, key) for b in (batch, moved))
  for name in ('targets', 'target_positions'):
    np.testing.assert_array_equal(
      np.where(got['weights'] > 0, got[name], 0)[:, :8],
      np.where(want['weights'] > 0, want[name], 0)[order],
    )
  # Another visit is another example.
  moved['mask_keys'] = moved['mask_keys'] + 1
  other = find(moved, loss_V, key)['target_positions']
  assert (other != got['target_positions']).any(1).all()


def experiment_of(directory, **settings):
  return tiny.experiment_of(
    directory,
    model='encoder',
    data__objective='masked_lm',
    data__objective__masking='by_loss',
    **settings,
  )


def trained(directory, num_steps=3, state=None, program=None, **settings):
  """Returns the state after some steps, and their losses."""
  config = experiment_of(directory, **settings)
  sizes = config.mesh
  num = sizes.data * sizes.fsdp * sizes.tensor * sizes.pipe
  mesh = mesh_lib.make(sizes, jax.devices()[:num])
  corpus = corpus_lib.prepare(config.data)
  losses = []
  with sharding.use(mesh, config.rules):
    program = program or program_lib.Program(config, mesh, num_steps=9)
    if state is None:
      state = program.init_state()
    first = int(state.step)
    batches = input_pipeline.train_batches(
      corpus, config.data, seed=0, start_step=first
    )
    for _ in range(num_steps):
      state, metrics = program.step(state, program.place(next(batches)))
      losses.append(float(metrics['loss']))
    assert not any('token' in name for name in metrics)
    batches.close()
  return state, losses, program


def test_layouts_and_continuation(tmp_path):
  one = {'mesh__data': 1, 'mesh__fsdp': 1, 'mesh__tensor': 1}
  state, losses, program = trained(tmp_path, **one)
  mine = jax.device_get(state.carried[loss_based_masking.NAME])
  assert 0 < (mine != np.float32(np.log(len(mine)))).sum() < len(mine)
  other, split, _ = trained(tmp_path, train__accumulate=2)
  np.testing.assert_allclose(split, losses, rtol=1e-5)
  theirs = jax.device_get(other.carried[loss_based_masking.NAME])
  np.testing.assert_allclose(theirs, mine, rtol=1e-5)

  stages = {'mesh__data': 2, 'mesh__fsdp': 2, 'mesh__tensor': 1}
  stages |= {'mesh__pipe': 2, 'pipeline__microbatches': 2}
  other, split, _ = trained(tmp_path, **stages)
  np.testing.assert_allclose(split, losses, rtol=1e-5)
  theirs = jax.device_get(other.carried[loss_based_masking.NAME])
  np.testing.assert_allclose(theirs, mine, rtol=1e-5)

  # Interrupted after two steps, the third has the same masks.
  one |= {'program': program}
  before, _, _ = trained(tmp_path, num_steps=2, **one)
  restored = tiny.saved_and_restored(tmp_path / 'run', before, program.shapes)
  again, last, _ = trained(tmp_path, num_steps=1, state=restored, **one)
  assert last == losses[2:]
  np.testing.assert_array_equal(again.carried[loss_based_masking.NAME], mine)


def test_messages(tmp_path):
  config = experiment_of(tmp_path)
  with pytest.raises(ValueError, match='Set one of them'):
    dataclasses.replace(config.data.objective, static=True)
  with pytest.raises(ValueError, match=r'it is in \[0, 1\)'):
    masking.ByLoss(decay=1.0)
