"""What proposes tokens for a model to check: a model, heads, or the text.

A draft has three functions, pure and within jit: `begin` makes its state from
the prompts, `draft` proposes K tokens, `after` hears what came of them.

Shape suffixes: B batch, K drafted tokens, C tokens of a pass, S positions, D
embed, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t2x.decode import decode_loop
from t2x.decode import processors
from t2x.decode import sampling as sampling_lib
from t2x.models import decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDraft:
  """Drafts by a smaller model of the same vocabulary.

  Attributes:
    model: a `Decoder`.
    num: tokens that it drafts at a time.
  """

  model: decoder.Decoder
  num: int = dataclasses.field(default=4, metadata={'static': True})

  def begin(self, model, prompt_BS, last_B, chunk):
    """Returns the state that `draft` goes on from: caches of the prompts."""
    return decode_loop.prefill(
      self.model, prompt_BS, last_B, chunk=chunk, slack=self.num + 1
    )

  def draft(self, state, key, text_BS, token_B, index_B, settings):
    """Returns K tokens, what each was drawn from, and the new state.

    Args:
      state: of the last call.
      key: fold(numbers) -> a number in [0, 1) for each row.
      text_BS: all tokens of each row so far.
      token_B: the latest one.
      index_B: where it stands.
      settings: as the model's own tokens are drawn.

    Returns:
      Tokens (B, K), probabilities (B, K, V) or None where each is certain.
    """
    del text_BS

    def one(carry, number):
      token_B, index_B, caches = carry
      x, caches = self.model.step(token_B[:, None], index_B[:, None], caches)
      logits_BV = self.model.head(x)[:, 0]
      if settings.temperature_B is None:
        new_B = best(logits_BV, settings)
        return (new_B, index_B + 1, caches), (new_B, None)
      probs_BV = probs(logits_BV, settings)
      new_B = processors.draw(jnp.log(probs_BV), key(number))
      return (new_B, index_B + 1, caches), (new_B, probs_BV)

    # One more pass: the last token must be cached too, should all be taken.
    (_, _, state), (tokens_KB, probs_KBV) = jax.lax.scan(
      one, (token_B, index_B, state), jnp.arange(self.num + 1)
    )
    tokens_BK = tokens_KB.T[:, : self.num]
    if probs_KBV is None:
      return tokens_BK, None, state
    return tokens_BK, jnp.moveaxis(probs_KBV, 0, 1)[:, : self.num], state

  def after(self, state, model, x_BCD, index_BC, num_B):
    """Returns the state after the model has checked a draft."""
    del model, x_BCD, index_BC, num_B
    return state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsDraft:
  """Drafts by the model's own heads for further tokens (`model.ahead`).

  Gloeckle et al. (2024). Each head's token is drawn by itself.
  """

  def begin(self, model, prompt_BS, last_B, chunk):
    num, vocab = len(model.ahead), model.config.vocab_size
    B = prompt_BS.shape[0]
    caches = _prefill_heads(model, prompt_BS, last_B, chunk, num + 1)
    # Nothing is known of the first tokens: all are equally likely.
    return caches, jnp.zeros((B, num, vocab))

  def draft(self, state, key, text_BS, token_B, index_B, settings):
    del text_BS, token_B, index_B
    caches, logits_BKV = state
    num = logits_BKV.shape[1]
    if settings.temperature_B is None:
      heads = [best(logits_BKV[:, k], settings) for k in range(num)]
      return jnp.stack(heads, axis=1), None, state
    probs_BKV = jnp.stack(
      [probs(logits_BKV[:, k], settings) for k in range(num)], axis=1
    )
    tokens = [
      processors.draw(jnp.log(probs_BKV[:, k]), key(k)) for k in range(num)
    ]
    return jnp.stack(tokens, axis=1), probs_BKV, (caches, logits_BKV)

  def after(self, state, model, x_BCD, index_BC, num_B):
    caches, _ = state
    features, caches = model.step_ahead(x_BCD, index_BC, caches)
    # Those of the last token that stayed speak of what follows the next.
    at = lambda x_BCD: jnp.take_along_axis(x_BCD, num_B[:, None, None], axis=1)
    logits = [model.head(at(y_BCD))[:, 0] for y_BCD in features]
    return caches, jnp.stack(logits, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupDraft:
  """Drafts what followed the last time that the latest tokens stood there.

  Prompt lookup (Saxena, 2023): for answers that repeat their prompt.

  Attributes:
    num: tokens that it drafts at a time.
    match: tokens that must be the same.
  """

  num: int = dataclasses.field(default=8, metadata={'static': True})
  match: int = dataclasses.field(default=2, metadata={'static': True})

  def begin(self, model, prompt_BS, last_B, chunk):
    del model, prompt_BS, last_B, chunk
    return ()

  def draft(self, state, key, text_BS, token_B, index_B, settings):
    del key, token_B, settings
    S = text_BS.shape[1]
    place_S = jnp.arange(S)
    same_BS = jnp.ones(text_BS.shape, bool)
    for back in range(self.match):
      latest_B1 = jnp.take_along_axis(
        text_BS, jnp.maximum(index_B - back, 0)[:, None], axis=1
      )
      earlier_BS = jnp.roll(text_BS, back, axis=1)
      same_BS &= (earlier_BS == latest_B1) & (place_S >= back)[None]
    same_BS &= place_S[None] < index_B[:, None]
    last_B = jnp.where(same_BS, place_S[None], -1).max(-1)
    index_BK = last_B[:, None] + 1 + jnp.arange(self.num)[None]
    # Where nothing matches, or the text ends, any token will do.
    tokens_BK = jnp.take_along_axis(
      text_BS, jnp.minimum(index_BK, S - 1), axis=1
    )
    return tokens_BK, None, state

  def after(self, state, model, x_BCD, index_BC, num_B):
    del model, x_BCD, index_BC, num_B
    return state


Draft = ModelDraft | HeadsDraft | LookupDraft


def num_drafted(draft: Draft, model: decoder.Decoder) -> int:
  """Returns how many tokens a draft proposes at a time."""
  return len(model.ahead) if isinstance(draft, HeadsDraft) else draft.num


def _prefill_heads(model, prompt_BS, last_B, chunk, slack):
  """Returns caches of the heads; the trunk runs once more for them."""
  num_rows, capacity = prompt_BS.shape

  def run_chunk(number, carry):
    below, heads = carry
    tokens_BC, index_BC = decode_loop.chunk_of(prompt_BS, last_B, number, chunk)
    x_BCD, below = model.step_below(tokens_BC, index_BC, below)
    return below, model.step_ahead(x_BCD, index_BC, heads)[1]

  below = model.empty_caches(num_rows, capacity, None, slack)
  heads = model.empty_ahead(num_rows, capacity, slack)
  num_chunks = (last_B.max() + chunk - 1) // chunk
  return jax.lax.fori_loop(0, num_chunks, run_chunk, (below, heads))[1]


def best(logits_BV, settings: sampling_lib.Rows) -> jax.Array:
  """Returns the token that temperature 0 takes."""
  return processors.largest(sampling_lib.shaped(logits_BV, settings))


def probs(logits_BV, settings: sampling_lib.Rows) -> jax.Array:
  """Returns what a token is drawn from; at temperature 0 it is certain."""
  logits_BV = sampling_lib.shaped(logits_BV, settings)
  best_B = processors.largest(logits_BV)
  best_BV = jax.nn.one_hot(best_B, logits_BV.shape[-1])
  probs_BV = jax.nn.softmax(sampling_lib.truncated(logits_BV, settings))
  return jnp.where(settings.temperature_B[:, None] > 0, probs_BV, best_BV)
