"""The beams of a search: those that run, and the best of those that ended.

Shape suffixes: B prompts, W beams of a group, C candidates, N new token, F
forms of words, K words.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2x.parallel import sharding

NEVER = -1e9  # The score of what is not there; finite, as it is summed.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Beams:
  """Beams of one group, of every prompt.

  Attributes:
    tokens_BWN: of the running beams.
    sums_BW: their log-probabilities.
    done_BWN: the best texts that ended.
    scores_BW: theirs, divided by their length.
    counts_BW: their tokens, the end left out.
    is_done_BW: which of them are there.
    ended_BW: whether they met an end token.
    open_B: whether a running beam may still become one of them.
    words: what running beams have of the words that they must hold; None where
      there are none.
  """

  tokens_BWN: jax.Array
  sums_BW: jax.Array
  done_BWN: jax.Array
  scores_BW: jax.Array
  counts_BW: jax.Array
  is_done_BW: jax.Array
  ended_BW: jax.Array
  open_B: jax.Array
  words: Any = None


def empty(
  live_B: jax.Array, width: int, length: int, words: Any = None
) -> Beams:
  """Returns beams that are their prompts."""
  shape = len(live_B), width
  none = jnp.full(shape, NEVER)
  return Beams(
    tokens_BWN=jnp.zeros((*shape, length), jnp.int32),
    # All beams are the prompt, so that only one of them counts at first.
    sums_BW=none.at[:, 0].set(0.0),
    done_BWN=jnp.zeros((*shape, length), jnp.int32),
    scores_BW=none,
    counts_BW=jnp.zeros(shape, jnp.int32),
    is_done_BW=jnp.zeros(shape, bool),
    ended_BW=jnp.zeros(shape, bool),
    open_B=live_B,
    words=words,
  )


def ended(beams: Beams, candidates, step, config: Any) -> Beams:
  """Puts candidates that end among the best that have.

  Args:
    beams: after the step.
    candidates: tokens (B, C, N), sums of log-probabilities, whether each stops
      here, and whether with an end token, (B, C).
    step: its number, the most tokens, the tokens that end a text.
    config: of the search.
  """
  tokens_BCN, sums_BC, stops_BC, is_end_BC = candidates
  number, num_tokens, _ = step
  length = number + 1
  scores_BC = sums_BC / config.divisor(length)
  if config.early_stopping == 'first':
    scores_BC += beams.is_done_BW.all(-1, keepdims=True) * NEVER
  scores_BC += ~beams.open_B[:, None] * NEVER + ~stops_BC * NEVER
  W = beams.scores_BW.shape[1]
  join = lambda a, b: jnp.concatenate([a, b], axis=1)
  scores_BW, best_BW = jax.lax.top_k(join(beams.scores_BW, scores_BC), W)
  at = lambda a, b: jnp.take_along_axis(join(a, b), best_BW, axis=1)
  beams = dataclasses.replace(
    beams,
    done_BWN=take(join(beams.done_BWN, tokens_BCN), best_BW),
    scores_BW=scores_BW,
    counts_BW=at(beams.counts_BW, length - is_end_BC.astype(jnp.int32)),
    is_done_BW=at(beams.is_done_BW, stops_BC),
    ended_BW=at(beams.ended_BW, is_end_BC),
  )
  return _closed(beams, length, num_tokens, config)


def _closed(beams, length, num_tokens, config: Any) -> Beams:
  """Tells whether a running beam may still become one of the best."""
  longest = config.early_stopping == 'never' and config.length_penalty > 0
  most = config.divisor(num_tokens if longest else length)
  best_B = beams.sums_BW.max(-1) / most
  worst_BW = jnp.where(
    beams.is_done_BW, beams.scores_BW.min(-1, keepdims=True), NEVER
  )
  may_B = (best_B[:, None] > worst_BW).any(-1)
  return dataclasses.replace(beams, open_B=beams.open_B & may_B)


def whole(groups) -> Beams:
  """Joins groups, best first; whole on every device."""
  join = lambda *leaves: jnp.concatenate(leaves, axis=1)
  named = lambda name: [getattr(beams, name) for beams in groups]
  left = 'open_B', 'words'
  fields = [f.name for f in dataclasses.fields(Beams) if f.name not in left]
  joined = {name: join(*named(name)) for name in fields}
  order_BW = jnp.argsort(-joined['scores_BW'], axis=1, stable=True)
  joined = {name: take(a, order_BW) for name, a in joined.items()}
  joined = {
    name: sharding.constrain(a, *[None] * a.ndim) for name, a in joined.items()
  }
  return Beams(open_B=groups[0].open_B, **joined)


def take(a: jax.Array, index_BC: jax.Array) -> jax.Array:
  """Takes entries of the second dimension, each prompt its own."""
  return jax.vmap(lambda row, index: row[index])(a, index_BC)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hypotheses:
  """What a search returns, for each prompt its texts, best first.

  Attributes:
    tokens: new tokens, without prompt and end.
    scores: sums of log-probabilities divided by what their length costs.
    ended: whether each met an end token before `num_tokens`.
  """

  tokens: list[list[list[int]]]
  scores: list[list[float]]
  ended: list[list[bool]]


def to_lists(beams: Beams, num_prompts: int, num: int) -> Hypotheses:
  """Returns the best `num` texts of each prompt, or as many as there are."""
  found = jax.device_get(beams)
  prompts = range(num_prompts)
  counts, tokens = found.counts_BW, found.done_BWN
  # There may be fewer: a short text has few forms, and tokens may be banned.
  there = [np.flatnonzero(found.is_done_BW[b])[:num] for b in prompts]
  of = lambda array_BW: [array_BW[b, there[b]].tolist() for b in prompts]
  return Hypotheses(
    tokens=[
      [tokens[b, w, : counts[b, w]].tolist() for w in there[b]] for b in prompts
    ],
    scores=of(found.scores_BW),
    ended=of(found.ended_BW),
  )
