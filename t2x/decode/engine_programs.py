"""The compiled programs of the engine.

One for each size of a chunk, one for each number of rows, and small ones that
draw a token; none depends on the lengths of texts or on who is in the batch.

Shape suffixes: B rows, C chunk, N blocks of a row, V vocabulary, E ends, W
words of 32 tokens.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from t2x.attention import paged
from t2x.decode import decode_loop
from t2x.decode import processors
from t2x.decode import sampling as sampling_lib
from t2x.models import decoder
from t2x.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
  """What is said of the next token of each row.

  Attributes:
    allowed_BW: bits of the tokens that may come, uint32, the lowest first.
    raised_BM: tokens whose logits are raised, -1 for fewer.
    amounts_BM: by how much.
  """

  allowed_BW: Any
  raised_BM: Any
  amounts_BM: Any

  def __call__(self, logits_BV: jax.Array) -> jax.Array:
    """Returns the logits that are drawn from."""
    V = logits_BV.shape[1]
    raise_ = lambda row, at, by: row.at[at].add(by, mode='drop')
    place_BM = jnp.where(self.raised_BM < 0, V, self.raised_BM)
    logits_BV = jax.vmap(raise_)(logits_BV, place_BM, self.amounts_BM)
    return processors.without_bits(logits_BV, ~self.allowed_BW)


@functools.partial(jax.jit, static_argnames=('num', 'size', 'dtype'))
def empty_pages(model: decoder.Decoder, num: int, size: int, dtype=None) -> Any:
  """Returns the pages of all layers; see `Decoder.empty_pages`."""
  return paged.placed(model.empty_pages(num, size, dtype))


@functools.partial(jax.jit, donate_argnames='caches')
def read(model: decoder.Decoder, caches, tokens_BC, index_BC, pages_BN) -> Any:
  """Returns caches that hold some more tokens of prompts."""
  caches = paged.with_tables(caches, pages_BN)
  caches = model.step(tokens_BC, index_BC, caches)[1]
  return paged.placed(paged.with_tables(caches, None))


@functools.partial(jax.jit, static_argnames='num', donate_argnames='caches')
def score(
  model: decoder.Decoder,
  caches,
  tokens_BC: jax.Array,
  index_BC: jax.Array,
  pages_BN: jax.Array,
  next_BC: jax.Array,
  calibration_B: jax.Array | None,
  num: int,
) -> Any:
  """As `read`, and says how likely the token after each was.

  Args:
    model: the decoder.
    caches: of the tokens before.
    tokens_BC: of prompts.
    index_BC: where each stands.
    pages_BN: of the texts.
    next_BC: the token after each.
    calibration_B: of each row.
    num: alternatives in the place of each.

  Returns:
    Log-probabilities of the next tokens (B, C); those of the likeliest and
    their ids (B, C, num); and the caches.
  """
  caches = paged.with_tables(caches, pages_BN)
  x_BCD, caches = model.step(tokens_BC, index_BC, caches)
  log_probs_BCV, top = _likeliest(model.head(x_BCD), calibration_B, num)
  own_BC1 = jnp.take_along_axis(log_probs_BCV, next_BC[..., None], axis=-1)
  whole = lambda a: sharding.constrain(a, *[None] * a.ndim)
  caches = paged.placed(paged.with_tables(caches, None))
  return whole(own_BC1[..., 0]), jax.tree.map(whole, top), caches


@functools.partial(jax.jit, donate_argnames='caches')
def write(model: decoder.Decoder, caches, token_B, index_B, pages_BN):
  """Returns logits (B, V) after the latest token of each row, and caches."""
  caches = paged.with_tables(caches, pages_BN)
  logits_BV, caches = decode_loop.next_logits(
    model, token_B, index_B, caches, None
  )
  return logits_BV, paged.placed(paged.with_tables(caches, None))


@jax.jit
def choose(
  logits_BV: jax.Array,
  settings: sampling_lib.Rows,
  history: sampling_lib.History,
  seed_B: jax.Array,
  row_B: jax.Array,
  number_B: jax.Array,
  ends_BE: jax.Array,
  controls: Controls | None,
) -> tuple[jax.Array, jax.Array]:
  """Draws the next token of each row.

  Args:
    logits_BV: of the model.
    settings: of each row.
    history: of each row.
    seed_B: of each row, uint32.
    row_B: numbers that tell rows of one seed apart.
    number_B: tokens that each row has written.
    ends_BE: tokens that end each row.
    controls: of each row; None where no row has one.

  Returns:
    Tokens and their log-probabilities under the model itself, (B,); -1 where
    nothing is left to draw.
  """
  logits_BV = sampling_lib.calibrated(logits_BV, settings)
  key = lambda seed, row, number: jax.random.fold_in(
    jax.random.fold_in(jax.random.key(seed), row), number
  )
  controlled_BV = logits_BV if controls is None else controls(logits_BV)
  left_BV = sampling_lib.shaped(
    controlled_BV, settings, history, number_B, ends_BE
  )
  keys_B = jax.vmap(key)(seed_B, row_B, number_B)
  token_B = sampling_lib.drawn(left_BV, keys_B, settings)
  token_B = jnp.where(jnp.isfinite(left_BV.max(-1)), token_B, processors.NONE)
  logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
  log_prob_B = logit_B - jax.nn.logsumexp(logits_BV, axis=-1)
  # Whole on every device, so that each host can read them.
  whole = lambda a: sharding.constrain(a, None)
  return whole(token_B), whole(log_prob_B)


@functools.partial(jax.jit, static_argnames='num')
def alternatives(logits_BV: jax.Array, calibration_B, num: int):
  """Returns log-probabilities and ids of the likeliest tokens, (B, num)."""
  _, found = _likeliest(logits_BV, calibration_B, num)
  return jax.tree.map(lambda a: sharding.constrain(a, None, None), found)


def _likeliest(logits: jax.Array, calibration_B, num: int):
  """Returns all log-probabilities, and those of the likeliest with their ids.

  Of (B, V) or (B, C, V), after the model's calibration.
  """
  settings = sampling_lib.Rows(calibration_B=calibration_B)
  logits = sampling_lib.calibrated(logits, settings)
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  return log_probs, jax.lax.top_k(log_probs, min(num, logits.shape[-1]))
