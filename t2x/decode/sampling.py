"""Sampling: draws tokens from logits, with settings of each row.

The processors run in this order: bias, repetition, presence and frequency
penalties, banned words, least length, first tokens; then temperature, top-k,
top-p, min-p, typical. The order is that of Hugging Face's `generate`, so that
equal settings have equal effects. A row's result depends only on its own
logits, settings and key, never on the rest of the batch. A program contains
only the processors that some row uses.

Shape suffixes: B batch, V vocabulary, M words, W tokens of a word, E ends.
"""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2x.decode import processors
from t2x.decode import settings as settings_lib

SamplingConfig = settings_lib.SamplingConfig
Rows = settings_lib.SamplingRows
rows = settings_lib.rows
canonical = settings_lib.canonical


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
  """Summary of each row's tokens that logit processors need.

  An array is None if no processor needs it.

  Attributes:
    prompt_BV: whether each token occurs in the prompt.
    counts_BV: number of times that each token was generated.
    recent_BW: latest tokens, in order.
    begun_B: states of the automata of banned words; see `banned.Rows`.
  """

  prompt_BV: Any = None
  counts_BV: Any = None
  recent_BW: Any = None
  begun_B: Any = None

  def add(self, token_B: jax.Array, settings: Rows) -> 'History':
    """Returns the history with one more token of each row."""
    counts_BV, recent_BW = self.counts_BV, self.recent_BW
    if counts_BV is not None:
      count = jax.vmap(lambda row, token: row.at[token].add(1))
      counts_BV = count(counts_BV, token_B)
    if recent_BW is not None:
      recent_BW = jnp.concatenate([recent_BW, token_B[:, None]], 1)[:, 1:]
    begun_B = self.begun_B
    if settings.bans is not None:
      begun_B = settings.bans.reader.after(begun_B, token_B)
    return History(
      prompt_BV=self.prompt_BV,
      counts_BV=counts_BV,
      recent_BW=recent_BW,
      begun_B=begun_B,
    )


def begin(settings: Rows, prompts: Sequence[Any], vocab_size: int) -> History:
  """Returns the history of rows before their first new token.

  Args:
    settings: sampling settings of the rows.
    prompts: token ids of each row's prompt.
    vocab_size: size of the vocabulary.
  """
  shape = len(prompts), vocab_size
  prompt_BV = counts_BV = recent_BW = None
  if settings.repetition_B is not None:
    prompt_BV = np.zeros(shape, bool)
    for row, prompt in zip(prompt_BV, prompts):
      row[np.asarray(prompt, int)] = True
  if settings.repetition_B is not None or settings.presence_B is not None:
    counts_BV = np.zeros(shape, np.int32)
  if settings.words_BMW is not None:
    size = settings.words_BMW.shape[-1] - 1
    recent_BW = np.full((len(prompts), size), processors.NONE, np.int32)
    for row, prompt in zip(recent_BW, prompts):
      last = prompt[len(prompt) - min(size, len(prompt)) :]
      row[size - len(last) :] = last
  return History(
    prompt_BV=prompt_BV,
    counts_BV=counts_BV,
    recent_BW=recent_BW,
    begun_B=None if settings.bans is None else settings.bans.start(prompts),
  )


def calibrated(logits: jax.Array, settings: Rows) -> jax.Array:
  """Divides logits, (B, V) or (B, T, V), by the calibration of each row."""
  if settings.calibration_B is None:
    return logits
  return logits / settings.calibration_B.reshape(-1, *[1] * (logits.ndim - 1))


def sample(
  logits_BV: jax.Array,
  keys_B: jax.Array,
  settings: Rows,
  history: History = History(),
  *,
  number_B: jax.Array | None = None,
  ends_BE: jax.Array | None = None,
) -> jax.Array:
  """Draws one token for each row.

  Args:
    logits_BV: float32 logits, without the padding of the vocabulary.
    keys_B: random key of each row; unused at temperature 0.
    settings: sampling settings of each row.
    history: sampling history of each row.
    number_B: number of new tokens of each row so far; needed for `min_tokens`,
      `first` and `not_first`.
    ends_BE: tokens that end each row; needed for `min_tokens`.

  Returns:
    Token ids (B,), int32. At temperature 0, the lowest id of equal logits.
  """
  logits_BV = process_logits(logits_BV, settings, history, number_B, ends_BE)
  return draw_tokens(logits_BV, keys_B, settings)


def draw_tokens(
  logits_BV: jax.Array, keys_B: jax.Array, settings: Rows
) -> jax.Array:
  """Draws one token for each row from the logits of `process_logits`."""
  if settings.temperature_B is None:
    return processors.argmax(logits_BV)
  uniform_B = jax.vmap(jax.random.uniform)(keys_B)
  if (settings.most_k or math.inf) <= processors.MOST_SORTED:
    assert settings.most_k is not None
    # The following processors then see few tokens, in order of their ids.
    largest_BC, token_BC = processors.top_few(logits_BV, settings.most_k)

    def draw_of_largest() -> jax.Array:
      place_B = processors.draw(
        apply_truncation(largest_BC, settings), uniform_B
      )
      return jnp.take_along_axis(token_BC, place_B[:, None], axis=1)[:, 0]

    # Unless others equal the least of these: they must be kept as well.
    least_B1 = largest_BC.min(-1, keepdims=True)
    num_B = (logits_BV >= least_B1).sum(-1)
    is_whole = (num_B <= largest_BC.shape[1]).all()
    draw_of_all = lambda: processors.draw(
      apply_truncation(logits_BV, settings), uniform_B
    )
    drawn_B = jax.lax.cond(is_whole, draw_of_largest, draw_of_all)
  else:
    drawn_B = processors.draw(apply_truncation(logits_BV, settings), uniform_B)
  best_B = processors.argmax(logits_BV)
  return jnp.where(settings.temperature_B > 0, drawn_B, best_B)


def process_logits(
  logits_BV: jax.Array,
  settings: Rows,
  history: History = History(),
  number_B: jax.Array | None = None,
  ends_BE: jax.Array | None = None,
) -> jax.Array:
  """Applies the processors from bias to first tokens.

  Args:
    logits_BV: logits of the next token.
    settings: sampling settings of each row.
    history: sampling history of each row.
    number_B: number of new tokens of each row so far; see `sample`.
    ends_BE: tokens that end each row; see `sample`.
  """
  if settings.bias_BV is not None:
    logits_BV = processors.biased(logits_BV, settings.bias_BV)
  if settings.repetition_B is not None:
    seen_BV = history.prompt_BV | (history.counts_BV > 0)
    logits_BV = processors.repetition(logits_BV, seen_BV, settings.repetition_B)
  if settings.presence_B is not None:
    logits_BV = processors.frequency(
      logits_BV, history.counts_BV, settings.presence_B, settings.frequency_B
    )
  if settings.words_BMW is not None:
    logits_BV = processors.without_words(
      logits_BV, history.recent_BW, settings.words_BMW
    )
  if settings.bans is not None:
    logits_BV = settings.bans(logits_BV, history.begun_B)
  if settings.min_tokens_B is not None:
    assert number_B is not None and ends_BE is not None
    is_short_B = number_B < settings.min_tokens_B
    logits_BV = processors.min_length(logits_BV, is_short_B, ends_BE)
  if settings.first_B is not None:
    assert number_B is not None
    given_B = jnp.where(number_B == 0, settings.first_B, processors.NONE)
    logits_BV = processors.force_token(logits_BV, given_B)
  if settings.not_first_BM is not None:
    assert number_B is not None
    place_B = 0
    if settings.first_B is not None:
      place_B = (settings.first_B != processors.NONE).astype(jnp.int32)
    logits_BV = processors.min_length(
      logits_BV, number_B == place_B, settings.not_first_BM
    )
  return logits_BV


def is_stuck(left_BV: jax.Array, settings: Rows) -> jax.Array | None:
  """Returns whether all tokens of a row are banned (B,).

  It returns None if the settings can ban no token.

  Args:
    left_BV: logits that `process_logits` returned.
    settings: sampling settings of each row.
  """
  hiding = ('bias_BV', 'words_BMW', 'bans', 'min_tokens_B')
  if all(getattr(settings, name) is None for name in hiding):
    return None
  return left_BV.max(-1) == -jnp.inf


def apply_truncation(logits_BV: jax.Array, settings: Rows) -> jax.Array:
  """Applies the processors from temperature to typical.

  Tokens that cannot be drawn get -inf; the others are not normalized.
  """
  logits_BV = processors.temperature(logits_BV, settings.temperature_B)
  if settings.top_k_B is not None:
    logits_BV = processors.top_k(logits_BV, settings.top_k_B, settings.most_k)
  if settings.top_p_B is not None:
    logits_BV = processors.top_p(logits_BV, settings.top_p_B)
  if settings.min_p_B is not None:
    logits_BV = processors.min_p(logits_BV, settings.min_p_B)
  if settings.typical_B is not None:
    logits_BV = processors.typical(logits_BV, settings.typical_B)
  return logits_BV
