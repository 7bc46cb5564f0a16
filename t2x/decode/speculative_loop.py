"""The compiled loop of speculative decoding: draft, verify, accept.

Shape suffixes: B batch, K drafted tokens, C = K + 1 tokens of a pass, S
positions, D embed, V vocabulary, E ends.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from t2x.decode import decode_loop
from t2x.decode import drafts
from t2x.decode import processors
from t2x.decode import sampling as sampling_lib
from t2x.models import decoder


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeState:
  """State of the loop.

  Attributes:
    passes: number of passes of the model so far.
    token_B: latest token of each row, which is not in the caches yet.
    index_B: position of the latest token in its row.
    ended_B: whether each row is done.
    count_B: number of new tokens of each row, without the end token.
    text_BS: prompt and new tokens of each row.
    log_probs_BS: log-probabilities of the new tokens under the model itself, at
      the same positions as in `text_BS`.
    proposed_B: number of drafted tokens of each row that were verified.
    accepted_B: number of those that were accepted.
    caches: keys and values of the model.
    draft: state of the draft.
  """

  passes: jax.Array
  token_B: jax.Array
  index_B: jax.Array
  ended_B: jax.Array
  count_B: jax.Array
  text_BS: jax.Array
  log_probs_BS: jax.Array
  proposed_B: jax.Array
  accepted_B: jax.Array
  caches: decode_loop.Caches
  draft: Any


@functools.partial(
  jax.jit,
  static_argnames=('capacity', 'chunk', 'forced'),
  donate_argnames='caches',
)
def decode(
  model: decoder.Decoder,
  caches: decode_loop.Caches,
  *,
  draft: drafts.Proposer[Any],
  prompt_BS: jax.Array,
  token_B: jax.Array,
  index_B: jax.Array,
  ended_B: jax.Array,
  keys_B: jax.Array,
  num_tokens: jax.Array,
  ends_BE: jax.Array,
  capacity: int,
  chunk: int,
  settings: sampling_lib.Rows,
  forced: float | None = None,
) -> SpeculativeState:
  """Draws up to `num_tokens` tokens for each row, several in each pass.

  Args:
    model: the decoder.
    caches: keys and values of the tokens before `token_B`, with slack for a
      draft.
    draft: proposer of tokens.
    prompt_BS: prompts, padded on the right to the capacity.
    token_B: token of each row that decoding continues from.
    index_B: position of `token_B` in its row.
    ended_B: whether each row is padding of the batch.
    keys_B: random key of each row.
    num_tokens: the most new tokens, at most `capacity`.
    ends_BE: tokens that end each row; -1 is padding.
    capacity: number of positions in the caches.
    chunk: number of tokens in a chunk of the draft's prefill.
    settings: sampling settings of each row, without those that depend on the
      tokens so far: penalties, banned words and least length.
    forced: probability with which drafted tokens are accepted, whatever the
      model says; only for timings, since the output has no meaning. None for
      the test of Leviathan et al. (2023).

  Returns:
    The last state; its arrays over rows but `token_B` are replicated on every
    device.
  """
  num = drafts.num_drafted(draft, model)
  state = SpeculativeState(
    passes=jnp.int32(0),
    token_B=token_B,
    index_B=index_B,
    ended_B=ended_B,
    count_B=jnp.zeros_like(index_B),
    text_BS=prompt_BS,
    log_probs_BS=jnp.zeros(prompt_BS.shape, jnp.float32),
    proposed_B=jnp.zeros_like(index_B),
    accepted_B=jnp.zeros_like(index_B),
    caches=caches,
    draft=draft.begin(model, prompt_BS, index_B, chunk),
  )

  def goes_on(state: SpeculativeState) -> jax.Array:
    return ~state.ended_B.all()

  def extend(state: SpeculativeState) -> SpeculativeState:
    # Keys depend on the row's own count, so other rows do not change its draws.
    fold = jax.vmap(jax.random.fold_in)
    step_keys_B = fold(keys_B, state.count_B)
    uniform = lambda number: jax.vmap(
      lambda key: jax.random.uniform(jax.random.fold_in(key, number))
    )(step_keys_B)
    tokens_BK, q_BKV, draft_state = draft.draft(
      state.draft,
      uniform,
      state.text_BS,
      state.token_B,
      state.index_B,
      settings,
    )
    inputs_BC = jnp.concatenate([state.token_B[:, None], tokens_BK], axis=1)
    index_BC = state.index_B[:, None] + jnp.arange(num + 1)[None]
    x_BCD, caches = model.step_below(inputs_BC, index_BC, state.caches)
    logits_BCV = model.head(model.tower.end(x_BCD))
    logits_BCV = sampling_lib.calibrated(logits_BCV, settings)
    of = lambda fn: jnp.stack(
      [fn(logits_BCV[:, c], settings) for c in range(num + 1)], axis=1
    )
    if settings.temperature_B is None:
      best_BC = of(drafts.best)
      chance_BK = (tokens_BK == best_BC[:, :-1]).astype(jnp.float32)
      draw_next = lambda num_B: jnp.take_along_axis(
        best_BC, num_B[:, None], axis=1
      )[:, 0]
    else:
      p_BCV = of(drafts.probs)
      chance_BK = _acceptance(p_BCV, q_BKV, tokens_BK)
      draw_next = lambda num_B: _next(
        p_BCV, q_BKV, tokens_BK, num_B, uniform(99)
      )
    if forced is not None:
      chance_BK = jnp.full_like(chance_BK, forced)
    uniform_BK = jnp.stack([uniform(100 + k) for k in range(num)], axis=1)
    is_kept_BK = jnp.cumprod(uniform_BK < chance_BK, axis=1).astype(bool)
    num_B = is_kept_BK.sum(1)
    next_B = draw_next(num_B)
    draft_state = draft.after(draft_state, model, x_BCD, index_BC, num_B)
    new_BC = jnp.concatenate([tokens_BK, tokens_BK[:, -1:]], axis=1)
    new_BC = jnp.where(
      jnp.arange(num + 1)[None] == num_B[:, None], next_B[:, None], new_BC
    )
    state = dataclasses.replace(state, caches=caches, draft=draft_state)
    return _append(state, new_BC, num_B, logits_BCV, ends_BE, num_tokens)

  state = jax.lax.while_loop(goes_on, extend, state)
  names = ('text_BS', 'log_probs_BS', 'count_B', 'ended_B', 'index_B')
  names += ('proposed_B', 'accepted_B')
  return dataclasses.replace(
    state, **{n: decode_loop.replicated(getattr(state, n)) for n in names}
  )


def _acceptance(
  p_BCV: jax.Array, q_BKV: jax.Array | None, tokens_BK: jax.Array
) -> jax.Array:
  """Returns p / q, above which a uniform number rejects a drafted token."""
  of = lambda a: jnp.take_along_axis(a, tokens_BK[..., None], axis=2)[..., 0]
  p_BK = of(p_BCV[:, :-1])
  if q_BKV is None:
    return p_BK
  # A token that was drawn has q > 0.
  return p_BK / jnp.maximum(of(q_BKV), 1e-30)


def _next(
  p_BCV: jax.Array,
  q_BKV: jax.Array | None,
  tokens_BK: jax.Array,
  num_B: jax.Array,
  uniform_B: jax.Array,
) -> jax.Array:
  """Draws the token after the `num_B` accepted ones.

  From the positive part of p - q if a token was rejected, otherwise from p.
  """
  B, C, V = p_BCV.shape
  at = lambda a: jnp.take_along_axis(a, num_B[:, None, None], axis=1)[:, 0]
  if q_BKV is None:
    q_BKV = jax.nn.one_hot(tokens_BK, V)
  # After the last drafted token there is none to reject.
  q_BCV = jnp.concatenate([q_BKV, jnp.zeros((B, 1, V))], axis=1)
  p_BV, rest_BV = at(p_BCV), jnp.maximum(at(p_BCV) - at(q_BCV), 0.0)
  # Rounding can leave nothing where both are the same.
  has_B1 = rest_BV.sum(-1, keepdims=True) > 0
  return processors.draw(jnp.log(jnp.where(has_B1, rest_BV, p_BV)), uniform_B)


def _append(
  state: SpeculativeState,
  new_BC: jax.Array,
  num_B: jax.Array,
  logits_BCV: jax.Array,
  ends_BE: jax.Array,
  num_tokens: jax.Array,
) -> SpeculativeState:
  """Appends each row's new tokens, up to an end token or the limit."""
  C, S = new_BC.shape[1], state.text_BS.shape[1]
  place_1C = jnp.arange(C)[None]
  is_end_BC = (new_BC[..., None] == ends_BE[:, None]).any(-1)
  left_B1 = (num_tokens - state.count_B)[:, None]
  is_new_BC = (place_1C <= num_B[:, None]) & (place_1C < left_B1)
  before_BC = jnp.cumsum(is_end_BC, axis=1) - is_end_BC
  is_new_BC &= (before_BC == 0) & ~state.ended_B[:, None]
  log_probs_BC = jnp.take_along_axis(logits_BCV, new_BC[..., None], axis=2)[
    ..., 0
  ] - jax.nn.logsumexp(logits_BCV, axis=-1)
  target_BC = state.index_B[:, None] + 1 + place_1C
  target_BC = jnp.where(is_new_BC, target_BC, S)
  put = jax.vmap(lambda row, i, new: row.at[i].set(new, mode='drop'))
  count_B = state.count_B + (is_new_BC & ~is_end_BC).sum(1)
  ended_B = state.ended_B | (is_new_BC & is_end_BC).any(1)
  is_live_B = ~state.ended_B
  move_B = is_new_BC.sum(1)
  last_B1 = jnp.maximum(move_B - 1, 0)[:, None]
  token_B = jnp.take_along_axis(new_BC, last_B1, axis=1)[:, 0]
  return dataclasses.replace(
    state,
    passes=state.passes + 1,
    token_B=jnp.where(move_B > 0, token_B, state.token_B),
    index_B=state.index_B + move_B,
    ended_B=ended_B | (count_B >= num_tokens),
    count_B=count_B,
    text_BS=put(state.text_BS, target_BC, new_BC),
    log_probs_BS=put(state.log_probs_BS, target_BC, log_probs_BC),
    proposed_B=state.proposed_B + is_live_B * (C - 1),
    # Accepted tokens past an end token or the limit do not count.
    accepted_B=state.accepted_B + is_live_B * jnp.minimum(num_B, move_B),
  )
