"""The compiled programs of the engine.

One for each size of a chunk of prefill, one for each number of rows in a decode
step, and small ones that draw a token. None depends on the lengths of sequences
or on the requests in a batch.

Shape suffixes: B rows, C chunk, N blocks of a row, V vocabulary, E ends, W
words of 32 tokens, M tokens with raised logits.
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

_Top = tuple[jax.Array, jax.Array]  # Log-probabilities and ids.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenConstraints:
  """Constraints on the next token of each row.

  Attributes:
    allowed_BW: allowed tokens as bits of uint32 words, lowest bit first.
    raised_BM: tokens whose logits are raised; -1 is padding.
    amounts_BM: amounts that are added to these logits.
  """

  allowed_BW: Any
  raised_BM: Any
  amounts_BM: Any

  def __call__(self, logits_BV: jax.Array) -> jax.Array:
    """Raises logits, and bans the tokens that are not allowed."""
    V = logits_BV.shape[1]
    raise_ = lambda row, at, by: row.at[at].add(by, mode='drop')
    place_BM = jnp.where(self.raised_BM < 0, V, self.raised_BM)
    logits_BV = jax.vmap(raise_)(logits_BV, place_BM, self.amounts_BM)
    return processors.without_bits(logits_BV, ~self.allowed_BW)


@functools.partial(jax.jit, static_argnames=('num', 'size', 'dtype'))
def empty_pages(
  model: decoder.Decoder, num: int, size: int, dtype: str | None = None
) -> decode_loop.Caches:
  """Returns empty pages of all layers; see `Decoder.empty_pages`."""
  return paged.placed(model.empty_pages(num, size, dtype))


@functools.partial(jax.jit, donate_argnames='caches')
def prefill_step(
  model: decoder.Decoder,
  caches: decode_loop.Caches,
  tokens_BC: jax.Array,
  index_BC: jax.Array,
  pages_BN: jax.Array,
) -> decode_loop.Caches:
  """Prefills a chunk of prompts; returns the new caches.

  Args:
    model: the decoder.
    caches: pages of all layers.
    tokens_BC: prompt tokens.
    index_BC: position of each token in its row.
    pages_BN: pages of each row's blocks.
  """
  caches = paged.with_tables(caches, pages_BN)
  caches = model.step(tokens_BC, index_BC, caches)[1]
  return paged.placed(paged.with_tables(caches, None))


@functools.partial(jax.jit, static_argnames='num', donate_argnames='caches')
def score(
  model: decoder.Decoder,
  caches: decode_loop.Caches,
  tokens_BC: jax.Array,
  index_BC: jax.Array,
  pages_BN: jax.Array,
  next_BC: jax.Array,
  calibration_B: jax.Array | None,
  num: int,
) -> tuple[jax.Array, _Top, decode_loop.Caches]:
  """Prefills a chunk of prompts, and scores the token after each.

  Args:
    model: the decoder.
    caches: pages of all layers.
    tokens_BC: prompt tokens.
    index_BC: position of each token in its row.
    pages_BN: pages of each row's blocks.
    next_BC: token after each.
    calibration_B: divisor of the logits of each row; None is 1.
    num: number of likeliest tokens to return at each position.

  Returns:
    Log-probabilities of the next tokens (B, C); log-probabilities and ids of
    the likeliest ones (B, C, num); and the new caches.
  """
  caches = paged.with_tables(caches, pages_BN)
  x_BCD, caches = model.step(tokens_BC, index_BC, caches)
  log_probs_BCV, top = _likeliest(model.head(x_BCD), calibration_B, num)
  next_BC1 = jnp.take_along_axis(log_probs_BCV, next_BC[..., None], axis=-1)
  caches = paged.placed(paged.with_tables(caches, None))
  replicated = decode_loop.replicated
  return replicated(next_BC1[..., 0]), jax.tree.map(replicated, top), caches


@functools.partial(jax.jit, donate_argnames='caches')
def decode_step(
  model: decoder.Decoder,
  caches: decode_loop.Caches,
  token_B: jax.Array,
  index_B: jax.Array,
  pages_BN: jax.Array,
) -> tuple[jax.Array, decode_loop.Caches]:
  """Runs a decode step; returns logits (B, V) and the new caches.

  Args:
    model: the decoder.
    caches: pages of all layers.
    token_B: latest token of each row.
    index_B: position of the latest token in its row.
    pages_BN: pages of each row's blocks.
  """
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
  controls: TokenConstraints | None,
) -> tuple[jax.Array, jax.Array]:
  """Draws the next token of each row.

  Args:
    logits_BV: logits of the model.
    settings: sampling settings of each row.
    history: sampling history of each row.
    seed_B: random seed of each row, uint32.
    row_B: row number of each request, which distinguishes those of one seed.
    number_B: number of new tokens of each row so far.
    ends_BE: tokens that end each row; -1 is padding.
    controls: constraints of each row; None if no row has any.

  Returns:
    Tokens and their log-probabilities under the model itself, (B,); a token is
    -1 if all are banned.
  """
  logits_BV = sampling_lib.calibrated(logits_BV, settings)
  key = lambda seed, row, number: jax.random.fold_in(
    jax.random.fold_in(jax.random.key(seed), row), number
  )
  controlled_BV = logits_BV if controls is None else controls(logits_BV)
  left_BV = sampling_lib.process_logits(
    controlled_BV, settings, history, number_B, ends_BE
  )
  keys_B = jax.vmap(key)(seed_B, row_B, number_B)
  token_B = sampling_lib.draw_tokens(left_BV, keys_B, settings)
  token_B = jnp.where(jnp.isfinite(left_BV.max(-1)), token_B, processors.NONE)
  logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
  log_prob_B = logit_B - jax.nn.logsumexp(logits_BV, axis=-1)
  return decode_loop.replicated(token_B), decode_loop.replicated(log_prob_B)


@functools.partial(jax.jit, static_argnames='num')
def alternatives(
  logits_BV: jax.Array, calibration_B: jax.Array | None, num: int
) -> _Top:
  """Returns log-probabilities and ids of the likeliest tokens, (B, num).

  Args:
    logits_BV: logits of the model.
    calibration_B: divisor of the logits of each row; None is 1.
    num: number of tokens.
  """
  _, top = _likeliest(logits_BV, calibration_B, num)
  return jax.tree.map(decode_loop.replicated, top)


def _likeliest(
  logits: jax.Array, calibration_B: jax.Array | None, num: int
) -> tuple[jax.Array, _Top]:
  """Returns all log-probabilities, and the `num` largest with their ids.

  The logits are (B, V) or (B, C, V), before the calibration.
  """
  settings = sampling_lib.Rows(calibration_B=calibration_B)
  logits = sampling_lib.calibrated(logits, settings)
  log_probs = jax.nn.log_softmax(logits, axis=-1)
  return log_probs, jax.lax.top_k(log_probs, min(num, logits.shape[-1]))
