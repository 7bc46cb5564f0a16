"""The language of masks against its words, one pair at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import seen

from t2x.attention import block_patterns
from t2x.attention import mask as mask_lib
from t2x.attention import patterns
from t2x.attention.patterns import Causal
from t2x.attention.patterns import DilatedPattern
from t2x.attention.patterns import Global
from t2x.attention.patterns import Window

T, S = 23, 19
PATTERNS = {
  'everything': patterns.Everything(),
  'causal': Causal(),
  'window': Window(3),
  'dilated': DilatedPattern(4),
  'dilated window': Window(7) & DilatedPattern(3),
  'prefix': Causal() | patterns.Prefix(),
  'global': Global(2),
  'region': patterns.Region(5),
  'blocks': block_patterns.Blocks(6, ('1001', '0100', '1110', '0001')),
  'random': block_patterns.RandomBlocks(size=5, num=2, num_blocks=5, seed=3),
  'random, causal': block_patterns.RandomBlocks(
    size=5, num=2, num_blocks=5, causal=True
  ),
  'causal band and global': Causal() & (Window(4) | Global(3)),
  'bigbird': Window(3)
  | Global(2)
  | block_patterns.RandomBlocks(size=4, num_blocks=6),
  'causal and dilated, or region': Causal() & DilatedPattern(2)
  | patterns.Region(4),
}
PREFIX = 6


def table(pattern, num_queries=T, num_keys=S):
  return np.array(
    [
      [seen.by_place(pattern, i, j, PREFIX) for j in range(num_keys)]
      for i in range(num_queries)
    ]
  )


@pytest.mark.parametrize('name', PATTERNS)
def test_pairs_are_seen_as_the_words_say(name):
  pattern = PATTERNS[name]
  q, k, prefix = np.arange(T)[:, None], np.arange(S)[None], np.full((1, 1), 6)
  want = table(pattern)
  np.testing.assert_array_equal(pattern.sees(q, k, prefix), want)
  traced = jax.jit(pattern.sees)(q, k, prefix)
  np.testing.assert_array_equal(traced, want)
  if name != 'prefix':
    assert patterns.count(pattern, T, S) == want.sum()


@pytest.mark.parametrize('name', PATTERNS)
def test_reach_promises_no_more_than_is_so(name):
  pattern = PATTERNS[name]
  whole = table(pattern, 24, 24)
  missed = 0
  for q_size, k_size in ((1, 1), (3, 4), (8, 8), (24, 6)):
    q, k = np.arange(0, 24, q_size)[:, None], np.arange(0, 24, k_size)
    some, every = pattern.reach((q, q + q_size - 1), (k, k + k_size - 1))
    blocks = whole.reshape(24 // q_size, q_size, 24 // k_size, k_size)
    any_seen, all_seen = blocks.any((1, 3)), blocks.all((1, 3))
    assert (some | ~any_seen).all()
    assert (all_seen | ~every).all()
    missed += (some & ~any_seen).sum()
  # Alone, a pattern knows its blocks; joined, it may think too much of some.
  if not isinstance(pattern, patterns.And | patterns.Or):
    assert missed == 0


def test_random_blocks_are_drawn_once_and_as_many_as_asked_for():
  random = block_patterns.RandomBlocks(size=2, num=3, num_blocks=40)
  assert (random.matrix.sum(1) == 3).all()
  assert len({tuple(row) for row in random.matrix}) > 35
  other = block_patterns.RandomBlocks(size=2, num=3, num_blocks=40, seed=1)
  assert (other.matrix != random.matrix).any()
  # Each block is as likely: about 3 of 400 rows see it.
  many = block_patterns.RandomBlocks(size=2, num=3, num_blocks=400).matrix.sum(
    0
  )
  assert many.mean() == 3 and many.max() < 15


def test_causal_random_blocks_are_the_same_in_longer_sequences():
  short, long = (
    block_patterns.RandomBlocks(size=2, num=3, num_blocks=n, causal=True).matrix
    for n in (10, 30)
  )
  np.testing.assert_array_equal(long[:10, :10], short)
  assert not np.triu(long, 1).any()


def test_joining_with_everything_changes_nothing():
  everything, band = patterns.Everything(), Causal() & Window(2)
  assert everything & band == band & everything == band
  assert everything | band == band | everything == everything
  assert band & band == band | band == band


def test_masks_join_with_their_arrays():
  ids = jnp.asarray([[1, 1, 2]])
  segments = mask_lib.Mask(q_segments_BT=ids, k_segments_BS=ids)
  prefix = mask_lib.with_prefix(jnp.asarray([[1]]))
  joined = (mask_lib.make(causal=True) | prefix) & segments
  whole = slice(0, 3), slice(0, 3)
  want = np.array([[[1, 0, 0], [1, 1, 0], [0, 0, 1]]], bool)
  np.testing.assert_array_equal(mask_lib.visible(joined, *whole), want)
  with pytest.raises(ValueError, match='segments hold for a whole mask'):
    _ = segments | prefix
  other = mask_lib.Mask(q_segments_BT=ids + 1, k_segments_BS=ids + 1)
  with pytest.raises(ValueError, match='q_segments_BT of their own'):
    _ = segments & other


def test_a_pattern_is_found_in_another():
  band = Causal() & (Window(4) | Global(3))
  assert patterns.has(band, Causal) and patterns.has(band, Global)
  assert not patterns.has(band, DilatedPattern)
  assert not band.is_relative
  assert (Causal() & Window(3) & DilatedPattern(2)).is_relative
