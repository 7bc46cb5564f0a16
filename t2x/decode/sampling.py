"""From logits to tokens, by settings of each row.

The processors run in this order: bias, repetition, presence and frequency,
banned words, least length, first tokens; then temperature, top-k, top-p, min-p,
typical. It is that of Hugging Face's `generate`, so that the same settings mean
the same.
A row's result depends on its own logits, settings and key, never on the rest
of the batch; and a program holds those processors alone that a row asks for.

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
Rows = settings_lib.Rows
rows = settings_lib.rows
few = settings_lib.few


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class History:
  """What processors know of each row's text; None where none asks.

  Attributes:
    prompt_BV: whether the prompt holds a token.
    counts_BV: how often a token was written.
    recent_BW: the latest tokens, the last one last.
    begun_B: what the text has begun of banned words: states of `banned.Rows`.
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
  """Returns the history of rows that have their prompts alone."""
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
  """Returns the logits (B, V) or (B, T, V) of a model after its calibration."""
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
    logits_BV: float32, without the padding of the vocabulary.
    keys_B: a key for each row; unused where the temperature is 0.
    settings: of each row.
    history: of each row.
    number_B: tokens that each row has written, where `min_tokens` is asked, or
      how a text begins.
    ends_BE: the tokens that end each row, where `min_tokens` is asked.

  Returns:
    Token ids (B,), int32. At temperature 0 the lowest id of equal ones.
  """
  logits_BV = shaped(logits_BV, settings, history, number_B, ends_BE)
  return drawn(logits_BV, keys_B, settings)


def drawn(logits_BV: jax.Array, keys_B: jax.Array, settings: Rows) -> jax.Array:
  """As `sample`, of logits that `shaped` returned."""
  if settings.temperature_B is None:
    return processors.largest(logits_BV)
  uniform_B = jax.vmap(jax.random.uniform)(keys_B)
  if (settings.most_k or math.inf) <= processors.MOST_SORTED:
    assert settings.most_k is not None
    # All that follows has a few tokens to look at, still in their order.
    few_BC, token_BC = processors.largest_few(logits_BV, settings.most_k)

    def draw_of_few():
      place_B = processors.draw(truncated(few_BC, settings), uniform_B)
      return jnp.take_along_axis(token_BC, place_B[:, None], axis=1)[:, 0]

    # Not where others equal the least of them: those stay with it.
    least_B1 = few_BC.min(-1, keepdims=True)
    num_B = (logits_BV >= least_B1).sum(-1)
    is_whole = (num_B <= few_BC.shape[1]).all()
    draw_of_all = lambda: processors.draw(
      truncated(logits_BV, settings), uniform_B
    )
    drawn_B = jax.lax.cond(is_whole, draw_of_few, draw_of_all)
  else:
    drawn_B = processors.draw(truncated(logits_BV, settings), uniform_B)
  best_B = processors.largest(logits_BV)
  return jnp.where(settings.temperature_B > 0, drawn_B, best_B)


def shaped(
  logits_BV: jax.Array,
  settings: Rows,
  history: History = History(),
  number_B: jax.Array | None = None,
  ends_BE: jax.Array | None = None,
) -> jax.Array:
  """Returns logits after what depends on the text: bias to first tokens."""
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
    logits_BV = processors.only(logits_BV, given_B)
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
  """Returns which rows have no token left (B,); None where that cannot be.

  Args:
    left_BV: logits that `shaped` returned.
    settings: of each row.
  """
  hiding = ('bias_BV', 'words_BMW', 'bans', 'min_tokens_B')
  if all(getattr(settings, name) is None for name in hiding):
    return None
  return left_BV.max(-1) == -jnp.inf


def truncated(logits_BV: jax.Array, settings: Rows) -> jax.Array:
  """Returns the logits that are drawn from: temperature to typical.

  Tokens that are left out have -inf; the others are not normalised.
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
