"""Dropout whose random bits do not depend on the layout of the arrays.

The bits of an entry are a hash of its row's key and of its coordinates: the
token's position in the row, the head, the feature. A microbatch, a shard, a
block or another order of the same entries has the same bits.

Shape suffixes: B batch, T query position, S key position, K key/value heads, G
query heads per key/value head, N heads.
"""

import dataclasses
import math

import jax
from jax.extend import random as random_bits
import jax.numpy as jnp

from t2x.parallel import zigzag as zigzag_lib


def row_keys(key: jax.Array, rows_B: jax.Array) -> jax.Array:
  """Returns one key for each row, from the row's number in the global batch.

  So a row has the same bits in a microbatch or a shard of the batch as in the
  whole batch on one device.

  Args:
    key: key of the training step.
    rows_B: number of each row in the global batch.
  """
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows_B)


def fold(keys_B: jax.Array | None, number: int | jax.Array) -> jax.Array | None:
  """Derives the keys for a part of the model (a layer, or a site in it).

  Args:
    keys_B: a key for each row; None means no dropout, and gives None.
    number: number of the part.
  """
  if keys_B is None:
    return None
  return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_B)


def dropout(
  x: jax.Array,
  rate: float,
  keys_B: jax.Array | None,
  zigzag: int = 1,
  first_feature: int | jax.Array = 0,
) -> jax.Array:
  """Zeroes entries with probability `rate` and scales up the others.

  Args:
    x: (B, T, ...).
    rate: probability of a zero.
    keys_B: a key for each row; None means no dropout.
    zigzag: number of devices over which the tokens of a row are in zigzag
      order.
    first_feature: index of the first feature of `x` in the whole array, if `x`
      is a part of one.
  """
  if keys_B is None or rate == 0.0:
    return x
  shape = x.shape[1:]
  index_T = jnp.asarray(zigzag_lib.index(shape[0], zigzag), jnp.uint32)
  token = index_T.reshape(-1, *(1,) * (len(shape) - 1))
  rest = jax.lax.iota(jnp.uint32, math.prod(shape[1:]))
  rest = rest + jnp.asarray(first_feature, jnp.uint32)
  feature = rest.reshape(1, *shape[1:])
  a_B, b_B = (w.reshape(-1, *(1,) * len(shape)) for w in _words(keys_B))
  bits = _hash(a_B, b_B, token[None], feature[None])[0]
  return _keep(x, bits, rate)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class OfScores:
  """Dropout of attention probabilities, a block of queries and keys at a time.

  Attributes:
    keys_B: a key for each row.
    rate: probability of a zero.
    heads_KG: number of each query head; None is 0, 1, 2, ...
  """

  keys_B: jax.Array
  rate: float = dataclasses.field(metadata={'static': True})
  heads_KG: jax.Array | None = None

  def of_heads(self, heads_KG: jax.Array) -> 'OfScores':
    """Returns the dropout of some of these heads, by their index among them."""
    if self.heads_KG is not None:
      heads_KG = self.heads_KG.reshape(-1)[heads_KG]
    return dataclasses.replace(self, heads_KG=heads_KG)

  def __call__(
    self, probs_BKGTS: jax.Array, q_index_BT: jax.Array, k_index_BS: jax.Array
  ) -> jax.Array:
    """Sets dropped probabilities to zero and scales up the others.

    Args:
      probs_BKGTS: probabilities.
      q_index_BT: indices of the queries in their rows, (T,) or (B, T).
      k_index_BS: indices of the keys in their rows, (S,) or (B, S).
    """
    K, G = probs_BKGTS.shape[1:3]
    heads_KG = self.heads_KG
    if heads_KG is None:
      heads_KG = jnp.arange(K * G).reshape(K, G)
    a_B, b_B = (w.reshape(-1, 1, 1) for w in _words(self.keys_B))
    heads_BKG = heads_KG.astype(jnp.uint32)[None]
    of_head = _hash(a_B, b_B, heads_BKG, jnp.zeros_like(heads_BKG))
    a_BKG, b_BKG = (w[..., None, None] for w in of_head)
    place = lambda index: jnp.atleast_2d(index).astype(jnp.uint32)
    q = place(q_index_BT)[:, None, None, :, None]
    k = place(k_index_BS)[:, None, None, None, :]
    return _keep(probs_BKGTS, _hash(a_BKG, b_BKG, q, k)[0], self.rate)


def _words(keys_B: jax.Array) -> list[jax.Array]:
  """Returns two 32-bit words of each key."""
  data = jax.random.key_data(keys_B).astype(jnp.uint32)
  return [data[..., 0], data[..., 1]]


def _hash(
  a: jax.Array, b: jax.Array, high: jax.Array, low: jax.Array
) -> list[jax.Array]:
  """Returns two words of Threefry-2x32 (Salmon et al., 2011), broadcast."""
  words = jnp.broadcast_arrays(a, b, high, low)
  return random_bits.threefry2x32_p.bind(*words)


def _keep(x: jax.Array, bits: jax.Array, rate: float) -> jax.Array:
  keep = bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
  return jnp.where(keep, x / (1.0 - rate), jnp.zeros((), x.dtype))
