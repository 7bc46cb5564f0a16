"""Drafts of speculative decoding: a small model, extra heads, prompt lookup.

A draft proposes tokens for a model to verify. It has three methods, which are
pure and run inside jit: `begin` makes its state from the prompts, `draft`
proposes K tokens, and `after` updates the state when the model has verified
them.

Shape suffixes: B batch, K drafted tokens, C = K + 1 tokens of a pass, S
positions, D embed, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
from typing import Any
from typing import Generic
from typing import TypeVar

import jax
import jax.numpy as jnp

from t2x.decode import decode_loop
from t2x.decode import processors
from t2x.decode import sampling as sampling_lib
from t2x.layers import block
from t2x.models import decoder

# Uniform numbers in [0, 1), one a row; other arguments give other numbers.
Key = Callable[[int | jax.Array], jax.Array]
_State = TypeVar('_State')
_HeadCaches = tuple[block.BlockCache, ...]
_HeadsState = tuple[_HeadCaches, jax.Array]  # The logits of the next draft too.
_Carry = tuple[jax.Array, jax.Array, decode_loop.Caches]
_Drawn = tuple[jax.Array, jax.Array | None]


class Proposer(Generic[_State]):
  """Base class of drafts."""

  def begin(
    self,
    model: decoder.Decoder,
    prompt_BS: jax.Array,
    last_B: jax.Array,
    chunk: int,
  ) -> _State:
    """Returns the state before the first draft.

    Args:
      model: the model that verifies.
      prompt_BS: prompts, padded on the right to the capacity.
      last_B: index of each prompt's last token.
      chunk: number of prompt tokens that run at a time.
    """
    raise NotImplementedError

  def draft(
    self,
    state: _State,
    key: Key,
    text_BS: jax.Array,
    token_B: jax.Array,
    index_B: jax.Array,
    settings: sampling_lib.Rows,
  ) -> tuple[jax.Array, jax.Array | None, _State]:
    """Proposes the next K tokens of each row.

    Args:
      state: state of the draft.
      key: source of random numbers; see `Key`.
      text_BS: prompt and new tokens of each row so far.
      token_B: latest token of each row.
      index_B: position of the latest token.
      settings: sampling settings, the same as for the model's own tokens.

    Returns:
      Tokens (B, K); the probabilities (B, K, V) that they were drawn from, None
      if each was certain; and the new state.
    """
    raise NotImplementedError

  def after(
    self,
    state: _State,
    model: decoder.Decoder,
    x_BCD: jax.Array,
    index_BC: jax.Array,
    num_B: jax.Array,
  ) -> _State:
    """Returns the state after the model has verified a draft.

    Args:
      state: state that `draft` returned.
      model: the model that verified.
      x_BCD: features below the model's final norm, of the latest token and the
        drafted ones.
      index_BC: positions of these tokens.
      num_B: number of drafted tokens of each row that were accepted.
    """
    del model, x_BCD, index_BC, num_B
    return state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelDraft(Proposer[decode_loop.Caches]):
  """Drafts by a smaller model of the same vocabulary (Leviathan et al., 2023).

  Attributes:
    model: the smaller model.
    num: number of tokens that it drafts at a time.
  """

  model: decoder.Decoder
  num: int = dataclasses.field(default=4, metadata={'static': True})

  def begin(
    self,
    model: decoder.Decoder,
    prompt_BS: jax.Array,
    last_B: jax.Array,
    chunk: int,
  ) -> decode_loop.Caches:
    return decode_loop.prefill(
      self.model, prompt_BS, last_B, chunk=chunk, slack=self.num + 1
    )

  def draft(
    self,
    state: decode_loop.Caches,
    key: Key,
    text_BS: jax.Array,
    token_B: jax.Array,
    index_B: jax.Array,
    settings: sampling_lib.Rows,
  ) -> tuple[jax.Array, jax.Array | None, decode_loop.Caches]:
    del text_BS

    def decode_step(carry: _Carry, number: jax.Array) -> tuple[_Carry, _Drawn]:
      token_B, index_B, caches = carry
      x, caches = self.model.step(token_B[:, None], index_B[:, None], caches)
      logits_BV = self.model.head(x)[:, 0]
      if settings.temperature_B is None:
        new_B = best(logits_BV, settings)
        return (new_B, index_B + 1, caches), (new_B, None)
      probs_BV = probs(logits_BV, settings)
      new_B = processors.draw(jnp.log(probs_BV), key(number))
      return (new_B, index_B + 1, caches), (new_B, probs_BV)

    # One more step caches the last token, in case all are accepted.
    (_, _, state), (tokens_KB, probs_KBV) = jax.lax.scan(
      decode_step, (token_B, index_B, state), jnp.arange(self.num + 1)
    )
    tokens_BK = tokens_KB.T[:, : self.num]
    if probs_KBV is None:
      return tokens_BK, None, state
    return tokens_BK, jnp.moveaxis(probs_KBV, 0, 1)[:, : self.num], state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsDraft(Proposer[_HeadsState]):
  """Drafts by the model's own heads for further tokens (`model.ahead`).

  Gloeckle et al. (2024). The tokens of different heads are drawn independently.
  """

  def begin(
    self,
    model: decoder.Decoder,
    prompt_BS: jax.Array,
    last_B: jax.Array,
    chunk: int,
  ) -> _HeadsState:
    num, vocab = len(model.ahead), model.config.vocab_size
    B = prompt_BS.shape[0]
    caches = _prefill_heads(model, prompt_BS, last_B, chunk, num + 1)
    # The heads have no features yet, so the first draft is uniform.
    return caches, jnp.zeros((B, num, vocab))

  def draft(
    self,
    state: _HeadsState,
    key: Key,
    text_BS: jax.Array,
    token_B: jax.Array,
    index_B: jax.Array,
    settings: sampling_lib.Rows,
  ) -> tuple[jax.Array, jax.Array | None, _HeadsState]:
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

  def after(
    self,
    state: _HeadsState,
    model: decoder.Decoder,
    x_BCD: jax.Array,
    index_BC: jax.Array,
    num_B: jax.Array,
  ) -> _HeadsState:
    caches, _ = state
    features, caches = model.step_ahead(x_BCD, index_BC, caches)
    # The heads at the last accepted token predict the tokens after the next.
    at = lambda x_BCD: jnp.take_along_axis(x_BCD, num_B[:, None, None], axis=1)
    logits = [model.head(at(y_BCD))[:, 0] for y_BCD in features]
    return caches, jnp.stack(logits, axis=1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LookupDraft(Proposer[tuple[()]]):
  """Drafts the tokens that followed the last match of the latest tokens.

  Prompt lookup (Saxena, 2023): fast if an answer repeats parts of its prompt.

  Attributes:
    num: number of tokens that it drafts at a time.
    match: number of latest tokens that must match.
  """

  num: int = dataclasses.field(default=8, metadata={'static': True})
  match: int = dataclasses.field(default=2, metadata={'static': True})

  def begin(
    self,
    model: decoder.Decoder,
    prompt_BS: jax.Array,
    last_B: jax.Array,
    chunk: int,
  ) -> tuple[()]:
    del model, prompt_BS, last_B, chunk
    return ()

  def draft(
    self,
    state: tuple[()],
    key: Key,
    text_BS: jax.Array,
    token_B: jax.Array,
    index_B: jax.Array,
    settings: sampling_lib.Rows,
  ) -> tuple[jax.Array, jax.Array | None, tuple[()]]:
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
    # Without a match, or past the end, any token is a valid draft.
    tokens_BK = jnp.take_along_axis(
      text_BS, jnp.minimum(index_BK, S - 1), axis=1
    )
    return tokens_BK, None, state


Draft = ModelDraft | HeadsDraft | LookupDraft


def num_drafted(draft: Proposer[Any], model: decoder.Decoder) -> int:
  """Returns the number of tokens that a draft proposes at a time."""
  if isinstance(draft, ModelDraft | LookupDraft):
    return draft.num
  return len(model.ahead)


def _prefill_heads(
  model: decoder.Decoder,
  prompt_BS: jax.Array,
  last_B: jax.Array,
  chunk: int,
  slack: int,
) -> _HeadCaches:
  """Computes the caches of the heads; the shared layers run again for them."""
  num_rows, capacity = prompt_BS.shape

  def run_chunk(
    number: jax.Array, carry: tuple[decode_loop.Caches, _HeadCaches]
  ) -> tuple[decode_loop.Caches, _HeadCaches]:
    below, heads = carry
    tokens_BC, index_BC = decode_loop.chunk_of(prompt_BS, last_B, number, chunk)
    x_BCD, below = model.step_below(tokens_BC, index_BC, below)
    return below, model.step_ahead(x_BCD, index_BC, heads)[1]

  below = model.empty_caches(num_rows, capacity, None, slack)
  heads = model.empty_ahead(num_rows, capacity, slack)
  num_chunks = (last_B.max() + chunk - 1) // chunk
  return jax.lax.fori_loop(0, num_chunks, run_chunk, (below, heads))[1]


def best(logits_BV: jax.Array, settings: sampling_lib.Rows) -> jax.Array:
  """Returns the most likely token of each row (B,)."""
  return processors.argmax(sampling_lib.process_logits(logits_BV, settings))


def probs(logits_BV: jax.Array, settings: sampling_lib.Rows) -> jax.Array:
  """Returns the probabilities that a token is drawn from (B, V).

  At temperature 0 they are one-hot.
  """
  logits_BV = sampling_lib.process_logits(logits_BV, settings)
  best_B = processors.argmax(logits_BV)
  best_BV = jax.nn.one_hot(best_B, logits_BV.shape[-1])
  probs_BV = jax.nn.softmax(sampling_lib.apply_truncation(logits_BV, settings))
  return jnp.where(settings.temperature_B[:, None] > 0, probs_BV, best_BV)
