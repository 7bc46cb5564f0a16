"""Beam search: the continuations of highest score, for many prompts at a time.

One compiled loop keeps for each prompt the running beams and the best of those
that ended. With one group the tokens are those of Hugging Face's `generate`:
the rules for stopping and for the length penalty are the same. With several
groups, the groups advance in turn, and each is penalized for the tokens that
earlier groups take (Vijayakumar et al., 2018, diverse beam search).

Shape suffixes: B prompts, G groups, W beams of a group, R = B * G * W rows, C
candidates, N new token, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp

from t2x.decode import beam_config
from t2x.decode import decode_loop
from t2x.decode import hypotheses
from t2x.decode import required_words
from t2x.decode import sampling as sampling_lib
from t2x.layers import block

BeamConfig = beam_config.BeamConfig

# Of the loop: its step, latest tokens and their positions, groups, caches and
# the history of all rows.
_Carry = tuple[
  jax.Array,
  jax.Array,
  jax.Array,
  tuple[hypotheses.Beams, ...],
  decode_loop.Caches,
  sampling_lib.History,
]


@functools.partial(jax.jit, static_argnames=('capacity', 'config'))
def search(
  model: decode_loop.Model,
  caches: decode_loop.Caches,
  *,
  token_B: jax.Array,
  index_B: jax.Array,
  live_B: jax.Array,
  num_tokens: jax.Array,
  ends_E: jax.Array,
  capacity: int,
  config: BeamConfig,
  settings: sampling_lib.Rows,
  history: sampling_lib.History,
  source_segments_BS: jax.Array | None = None,
  words: required_words.RequiredWords | None = None,
) -> hypotheses.Beams:
  """Runs a beam search for every prompt.

  Args:
    model: a `Decoder` or an `EncoderDecoder`.
    caches: keys and values of the tokens before `token_B`, one row a prompt.
    token_B: last token of each prompt, which decoding continues from.
    index_B: position of `token_B` in its row.
    live_B: whether each row is a prompt; the others pad the batch.
    num_tokens: the most new tokens, at most `capacity`.
    ends_E: tokens that end a sequence; -1 is padding.
    capacity: number of positions in the caches.
    config: settings of the search.
    settings: sampling settings of R rows. The processors that ban or penalize
      tokens apply; those that only shape the drawing have no effect.
    history: sampling history of R rows.
    source_segments_BS: the source positions that an encoder-decoder attends to,
      1 for a token and 0 for padding; None with a decoder.
    words: words that every sequence must contain; None if there are none.

  Returns:
    The hypotheses of all groups; `done_BWN` is (B, G * W, N), best first.
  """
  B, G, W = len(token_B), config.num_groups, config.group_size
  rows = lambda a: jnp.repeat(a, G * W, axis=0)
  caches = _map_rows(rows, caches)
  segments_RS = None if source_segments_BS is None else rows(source_segments_BS)
  progress = None if words is None else required_words.begin(words, (B, W))
  groups = tuple(
    hypotheses.empty(live_B, W, capacity, progress) for _ in range(G)
  )
  first = (jnp.int32(0), rows(token_B), rows(index_B), groups, caches, history)

  def goes_on(state: _Carry) -> jax.Array:
    number, _, _, groups, _, _ = state
    return (number < num_tokens) & _any_open(groups, live_B, config)

  def extend(state: _Carry) -> _Carry:
    number, token_R, index_R, groups, caches, history = state
    logits_RV, caches = decode_loop.next_logits(
      model, token_R, index_R, caches, segments_RS
    )
    logits_RV = sampling_lib.calibrated(logits_RV, settings)
    log_probs_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32), axis=-1)
    ends_RE = jnp.broadcast_to(ends_E[None], (len(token_R), len(ends_E)))
    log_probs_RV = sampling_lib.process_logits(
      log_probs_RV,
      settings,
      history,
      jnp.broadcast_to(number, token_R.shape),
      ends_RE,
    )
    log_probs_BGWV = log_probs_RV.reshape(B, G, W, -1)
    taken_BV = jnp.zeros_like(log_probs_BGWV[:, 0, 0])
    new_groups, parents, tokens = list(groups), [], []
    for g in range(G):
      log_probs_BWV = (
        log_probs_BGWV[:, g] - config.diversity * taken_BV[:, None]
      )
      step = hypotheses.BeamStep(number, num_tokens, ends_E)
      parts = groups[g], log_probs_BWV, step, config
      new_groups[g], parent_BW, token_BW = (
        _advance(*parts)
        if words is None
        else required_words.advance(*parts, words)
      )
      count = jax.vmap(lambda row, token: row.at[token].add(1.0))
      taken_BV = count(taken_BV, token_BW)
      parents.append(parent_BW + g * W)
      tokens.append(token_BW)
    token_R = jnp.stack(tokens, axis=1).reshape(-1)
    within_BR = jnp.stack(parents, axis=1).reshape(B, G * W)
    parent_R = (within_BR + jnp.arange(B)[:, None] * G * W).reshape(-1)
    pick = lambda a: jnp.take(a, parent_R, axis=0)
    caches = _map_rows(pick, caches, cross=False)
    history = jax.tree.map(pick, history).add(token_R, settings)
    return number + 1, token_R, index_R + 1, tuple(new_groups), caches, history

  *_, groups, _, _ = jax.lax.while_loop(goes_on, extend, first)
  return hypotheses.whole(groups)


def _advance(
  beams: hypotheses.Beams,
  log_probs_BWV: jax.Array,
  step: hypotheses.BeamStep,
  config: BeamConfig,
) -> tuple[hypotheses.Beams, jax.Array, jax.Array]:
  """Extends the beams of one group by a token.

  Returns:
    The new beams; the beam that each continues (B, W); its new token (B, W).
  """
  number, num_tokens, ends_E = step
  B, W, V = log_probs_BWV.shape
  # So many that at least W of them do not end.
  num = min(max(2, 1 + len(ends_E)) * W, W * V)
  sums_BWV = log_probs_BWV + beams.sums_BW[..., None]
  sums_BC, place_BC = jax.lax.top_k(sums_BWV.reshape(B, -1), num)
  parent_BC, token_BC = place_BC // V, place_BC % V
  tokens_BCN = hypotheses.take(beams.tokens_BWN, parent_BC)
  tokens_BCN = jax.lax.dynamic_update_slice_in_dim(
    tokens_BCN, token_BC[..., None].astype(jnp.int32), number, axis=2
  )
  is_end_BC = jnp.isin(token_BC, ends_E)
  stops_BC = is_end_BC | (number + 1 >= num_tokens)
  on_BW, keep_BW = jax.lax.top_k(sums_BC + stops_BC * hypotheses.NEVER, W)
  running = dataclasses.replace(
    beams, tokens_BWN=hypotheses.take(tokens_BCN, keep_BW), sums_BW=on_BW
  )
  # Only the first W candidates may end; the others replace those that do.
  stops_BC = stops_BC & (jnp.arange(num) < W)[None]
  running = hypotheses.ended(
    running,
    hypotheses.Candidates(tokens_BCN, sums_BC, stops_BC, is_end_BC),
    step,
    config,
  )
  at = lambda a: jnp.take_along_axis(a, keep_BW, axis=1)
  return running, at(parent_BC), at(token_BC).astype(jnp.int32)


def _any_open(
  groups: tuple[hypotheses.Beams, ...], live_B: jax.Array, config: BeamConfig
) -> jax.Array:
  """Whether the search continues for any prompt."""
  opens = [beams.open_B.any() for beams in groups]
  if config.early_stopping == 'first':
    opens = [
      is_open & ~(beams.is_done_BW | ~live_B[:, None]).all()
      for is_open, beams in zip(opens, groups)
    ]
  return functools.reduce(jnp.logical_or, opens)


def _map_rows(
  fn: Callable[[jax.Array], jax.Array],
  caches: decode_loop.Caches,
  cross: bool = True,
) -> decode_loop.Caches:
  """Applies `fn` to the rows of caches, whether stacked over layers or not.

  Without `cross`, the keys and values of the source are left as they are: they
  are the same for all beams of a prompt.
  """
  group, rest = caches

  def map_layer(
    cache: block.BlockCache, apply: Callable[[jax.Array], jax.Array]
  ) -> block.BlockCache:
    if cross:
      return jax.tree.map(apply, cache)
    return dataclasses.replace(cache, own=jax.tree.map(apply, cache.own))

  return (
    tuple(map_layer(cache, jax.vmap(fn)) for cache in group),
    tuple(map_layer(cache, fn) for cache in rest),
  )
