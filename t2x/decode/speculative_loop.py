"""The loop of speculative decoding: draft, read at once, keep what fits.

Shape suffixes: B batch, K drafted tokens, C = K + 1 of a pass, S positions, D
embed, V vocabulary, E ends.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from t2x.decode import drafts
from t2x.decode import processors
from t2x.decode import sampling as sampling_lib
from t2x.models import decoder
from t2x.parallel import sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """What the loop carries.

  Attributes:
    passes: of the model so far.
    token_B: the latest token of each row, which no cache holds yet.
    index_B: where it stands.
    ended_B: rows that are done.
    count_B: new tokens of each row, the end left out.
    text_BS: prompt and new tokens.
    log_probs_BS: of the new tokens, under the model itself, where they stand.
    proposed_B: drafted tokens that were checked.
    accepted_B: those that stayed.
    caches: of the model.
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
  caches: Any
  draft: Any


@functools.partial(
  jax.jit,
  static_argnames=('capacity', 'chunk', 'forced'),
  donate_argnames='caches',
)
def decode(
  model: decoder.Decoder,
  caches: Any,
  *,
  draft: drafts.Draft,
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
) -> State:
  """Writes up to `num_tokens` tokens a row, several for each pass.

  Args:
    model: the model.
    caches: of the tokens before `token_B`, with room for a draft.
    draft: what proposes tokens.
    prompt_BS: the prompts, padded to the capacity.
    token_B: as for `decode_loop.decode`, and so are the other arguments.
    index_B: likewise.
    ended_B: likewise.
    keys_B: likewise.
    num_tokens: likewise.
    ends_BE: likewise.
    capacity: likewise.
    chunk: of the draft's prefill.
    settings: without penalties, banned words and least length.
    forced: accept drafted tokens with this probability instead: for timings, as
      the text means nothing then.
  """
  num = drafts.num_drafted(draft, model)
  state = State(
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

  def goes_on(state):
    return ~state.ended_B.all()

  def extend(state):
    # By where a row stands, so that neighbours do not change what it draws.
    fold = jax.vmap(jax.random.fold_in)
    own_B = fold(keys_B, state.count_B)
    uniform = lambda number: jax.vmap(
      lambda key: jax.random.uniform(jax.random.fold_in(key, number))
    )(own_B)
    tokens_BK, q_BKV, own = draft.draft(
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
    else:
      p_BCV = of(drafts.probs)
      chance_BK = _chances(p_BCV, q_BKV, tokens_BK)
    if forced is not None:
      chance_BK = jnp.full_like(chance_BK, forced)
    uniform_BK = jnp.stack([uniform(100 + k) for k in range(num)], axis=1)
    is_kept_BK = jnp.cumprod(uniform_BK < chance_BK, axis=1).astype(bool)
    num_B = is_kept_BK.sum(1)
    if settings.temperature_B is None:
      next_B = jnp.take_along_axis(best_BC, num_B[:, None], axis=1)[:, 0]
    else:
      next_B = _next(p_BCV, q_BKV, tokens_BK, num_B, uniform(99))
    own = draft.after(own, model, x_BCD, index_BC, num_B)
    new_BC = jnp.concatenate([tokens_BK, tokens_BK[:, -1:]], axis=1)
    new_BC = jnp.where(
      jnp.arange(num + 1)[None] == num_B[:, None], next_B[:, None], new_BC
    )
    state = dataclasses.replace(state, caches=caches, draft=own)
    return _written(state, new_BC, num_B, logits_BCV, ends_BE, num_tokens)

  state = jax.lax.while_loop(goes_on, extend, state)
  whole = ('text_BS', 'log_probs_BS', 'count_B', 'ended_B', 'index_B')
  whole += ('proposed_B', 'accepted_B')
  arrays = {name: getattr(state, name) for name in whole}
  return dataclasses.replace(
    state,
    **{n: sharding.constrain(a, *[None] * a.ndim) for n, a in arrays.items()},
  )


def _chances(p_BCV, q_BKV, tokens_BK):
  """Returns how likely each drafted token stays: min(1, p / q)."""
  of = lambda a: jnp.take_along_axis(a, tokens_BK[..., None], axis=2)[..., 0]
  p_BK = of(p_BCV[:, :-1])
  if q_BKV is None:
    return p_BK
  # What is drawn has a chance above 0.
  return p_BK / jnp.maximum(of(q_BKV), 1e-30)


def _next(p_BCV, q_BKV, tokens_BK, num_B, uniform_B):
  """Draws the token after those that stayed.

  From what p has more than q where a token was refused, else from p.
  """
  B, C, V = p_BCV.shape
  at = lambda a: jnp.take_along_axis(a, num_B[:, None, None], axis=1)[:, 0]
  if q_BKV is None:
    q_BKV = jax.nn.one_hot(tokens_BK, V)
  # After the last drafted token nothing was refused.
  q_BCV = jnp.concatenate([q_BKV, jnp.zeros((B, 1, V))], axis=1)
  p_BV, rest_BV = at(p_BCV), jnp.maximum(at(p_BCV) - at(q_BCV), 0.0)
  # Rounding can leave nothing where both are the same.
  has_B1 = rest_BV.sum(-1, keepdims=True) > 0
  return processors.draw(jnp.log(jnp.where(has_B1, rest_BV, p_BV)), uniform_B)


def _written(state, new_BC, num_B, logits_BCV, ends_BE, num_tokens) -> State:
  """Returns the state with each row's new tokens, up to an end or the limit."""
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
    # Those past an end or the limit were for nothing.
    accepted_B=state.accepted_B + is_live_B * jnp.minimum(num_B, move_B),
  )
