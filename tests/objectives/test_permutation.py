"""Permutation language modelling: who sees whom, and what is predicted."""

import dataclasses
import functools

from flax import nnx
import jax
import numpy as np
import pytest
import tiny

from t2x.config import consistency
from t2x.hlo import jaxpr_costs
from t2x.layers import attention_config
from t2x.layers import linear
from t2x.layers import mlp
from t2x.layers import moe
from t2x.layers import position
from t2x.layers import transformer_xl
from t2x.models import encoder
from t2x.models import flops
from t2x.objectives import masking
from t2x.objectives import noise
from t2x.objectives import permutation
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib

VOCAB, FIRST, ROWS, LENGTH = 200, 105, 300, 48
PADDED = 40  # From here on there is nothing.


@functools.cache
def batch_of(rate=0.25, seed=0):
  tokens = np.random.default_rng(0).integers(FIRST, VOCAB, (ROWS, LENGTH))
  segments = np.where(np.arange(LENGTH) < 20, 1, 2) * np.ones((ROWS, 1), int)
  tokens[:, [0, 20]], tokens[:, 19] = vocab_lib.BOS, vocab_lib.EOS
  tokens[:, PADDED:], segments[:, PADDED:] = 0, 0
  objective = permutation.Permutation(rate=rate, masking=masking.Tokens())
  batch = objective.examples(
    rows_lib.Rows(tokens.astype(np.int32), segments.astype(np.int32)),
    keys=noise.keys(seed, np.arange(ROWS)),
    vocab=vocab_lib.Vocab(size=VOCAB),
    length=LENGTH,
  )
  assert {n: a.shape[1] for n, a in batch.items()} == objective.lengths(LENGTH)
  return batch


def test_targets_are_the_last_of_a_random_order():
  batch = batch_of()
  ranks, asked = batch['ranks'], batch['weights'] > 0
  # 37 tokens of text in a row: 9 are predicted.
  assert (asked.sum(1) == 9).all()
  orders = []
  for row in range(ROWS):
    places = batch['query_places'][row][asked[row]]
    assert (ranks[row] > 0).sum() == 9
    assert sorted(ranks[row, places]) == [*range(1, 10)]
    assert (
      batch['targets'][row][asked[row]] == batch['inputs'][row, places]
    ).all()
    # One that asks sees what came before its token.
    own = batch['query_ranks'][row][asked[row]]
    assert (own == ranks[row, places] - 1).all()
    for name in ('segments', 'positions'):
      got = batch[f'query_{name}'][row][asked[row]]
      assert (got == batch[name][row, places]).all()
    orders.append(np.argsort(own))
  # The order knows nothing of places: each is as often first.
  first = np.array(orders)[:, 0]
  counts = np.bincount(first, minlength=9)
  assert np.abs(counts - ROWS / 9).max() < 4.5 * (ROWS / 9) ** 0.5
  other = batch_of(seed=1)
  assert (other['ranks'] != ranks).any()


SMALL = encoder.EncoderConfig(
  vocab_size=VOCAB,
  vocab_multiple=8,
  num_layers=2,
  embed_dim=32,
  attention=transformer_xl.TransformerXL(num_heads=4, head_dim=8),
  mlp=mlp.MlpConfig(hidden=64),
  residual='post_norm',
  position=None,
  masked_head=False,
  output_bias=True,
  two_stream=True,
)
KINDS = {
  'transformer_xl': {},
  'dense and rotary': {
    'attention': attention_config.Dense(num_heads=4, head_dim=8),
    'position': position.Rotary(),
  },
  'local and learned': {
    'attention': attention_config.Local(num_heads=4, head_dim=8, window=12),
    'position': position.Learned(max_length=LENGTH),
  },
}


@pytest.mark.parametrize('kind', KINDS)
def test_nothing_leaks(kind):
  """A token changes, bit by bit, what may see it and nothing else."""
  config = dataclasses.replace(SMALL, **KINDS[kind])
  model = jax.jit(lambda: encoder.Encoder(config, rngs=nnx.Rngs(0)))()
  names = set(batch_of()) - {'targets', 'weights'}
  batch = {name: batch_of()[name][:8] for name in names}
  asked = batch_of()['weights'][:8] > 0
  fn = jax.jit(lambda batch: model.features(**batch)[0])
  want = np.asarray(fn(batch))
  rng = np.random.default_rng(0)
  changed = 0
  for _ in range(6):
    place = [int(rng.choice(np.flatnonzero(r))) for r in batch['ranks']]
    inputs = batch['inputs'].copy()
    rows = np.arange(8)
    inputs[rows, place] = (inputs[rows, place] + 1) % VOCAB
    got = np.asarray(fn(batch | {'inputs': inputs}))
    for row in range(8):
      at = place[row]
      own = batch['query_segments'][row] == batch['segments'][row, at]
      may = own & (batch['query_ranks'][row] >= batch['ranks'][row, at])
      same = (got[row] == want[row]).all(-1)
      assert same[asked[row] & ~may].all()
      changed += (~same[asked[row] & may]).sum()
  assert changed > 20


def test_flops_are_those_of_the_program():
  batch = {n: a[:4] for n, a in batch_of().items()}
  names = set(batch) - {'targets', 'weights'}
  model = jax.eval_shape(lambda: encoder.Encoder(SMALL, rngs=nnx.Rngs(0)))
  fn = lambda model, batch: model(**batch)
  counted = jaxpr_costs.count(
    jax.make_jaxpr(fn)(model, {n: batch[n] for n in names})
  )
  num = batch['targets'].shape[1]
  want = flops.forward_flops(
    SMALL, flops.BatchShape(4, LENGTH, num_targets=num), skip_masked=False
  )
  np.testing.assert_allclose(counted.total.flops, want, rtol=0.01)


def test_messages(tmp_path):
  make = lambda **more: tiny.experiment_of(tmp_path, model='encoder', **more)
  fine = {'data__objective': 'permutation', 'model__two_stream': True}
  fine |= {'mesh__data': 2, 'mesh__fsdp': 2, 'mesh__tensor': 2}
  consistency.check(make(**fine), 8)
  with pytest.raises(ValueError, match='Set both or neither'):
    consistency.check(make(data__objective='permutation'), 8)
  with pytest.raises(ValueError, match='Set both or neither'):
    consistency.check(
      make(data__objective='masked_lm', model__two_stream=True), 8
    )
  with pytest.raises(ValueError, match='puts two streams into a row'):
    consistency.check(make(**fine | {'mesh__context': 2, 'mesh__data': 1}), 8)
  with pytest.raises(ValueError, match='has no place for'):
    dataclasses.replace(SMALL, attention=linear.Linear(num_heads=4))
  with pytest.raises(ValueError, match='the second stream has none'):
    dataclasses.replace(SMALL, num_token_types=2)
  with pytest.raises(ValueError, match='plain feed-forward'):
    dataclasses.replace(SMALL, mlp=moe.MoeConfig())
  with pytest.raises(ValueError, match='Set another masking'):
    permutation.Permutation(masking=masking.ByLoss())
  with pytest.raises(ValueError, match='wider than values'):
    transformer_xl.TransformerXL(kernel='flash')
