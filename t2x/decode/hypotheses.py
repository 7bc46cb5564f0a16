"""The state of a beam search: running beams, and the best that ended.

Shape suffixes: B prompts, W beams of a group, C candidates, N new token, F
forms of words, K words.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t2x.decode import beam_config
from t2x.decode import decode_loop

NEVER = -1e9  # Score of an empty place; finite, since scores are summed.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Beams:
  """The running beams and the finished hypotheses of one group, by prompt.

  Attributes:
    tokens_BWN: new tokens of the running beams.
    sums_BW: sums of their log-probabilities.
    done_BWN: new tokens of the best hypotheses that ended.
    scores_BW: their scores: sums of log-probabilities over the length divisor.
    counts_BW: number of their tokens, without the end token.
    is_done_BW: whether each place holds a hypothesis.
    ended_BW: whether each hypothesis ended with an end token.
    open_B: whether a running beam could still become one of the best.
    words: progress of the running beams in the words that they must contain;
      None if there are none.
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
  """Returns the beams of a group before the first step.

  Args:
    live_B: whether each row is a prompt; the others pad the batch.
    width: number of beams.
    length: the most new tokens of a beam.
    words: progress in required words, a tree of arrays with leading dimensions
      (B, W); None if there are none.
  """
  shape = len(live_B), width
  never = jnp.full(shape, NEVER)
  return Beams(
    tokens_BWN=jnp.zeros((*shape, length), jnp.int32),
    # All beams are equal at first, so only the first of them counts.
    sums_BW=never.at[:, 0].set(0.0),
    done_BWN=jnp.zeros((*shape, length), jnp.int32),
    scores_BW=never,
    counts_BW=jnp.zeros(shape, jnp.int32),
    is_done_BW=jnp.zeros(shape, bool),
    ended_BW=jnp.zeros(shape, bool),
    open_B=live_B,
    words=words,
  )


class BeamStep(NamedTuple):
  """One step of the search.

  Attributes:
    number: index of the step, from 0; new tokens of each beam before it.
    num_tokens: the most new tokens.
    ends_E: tokens that end a sequence; -1 is padding.
  """

  number: jax.Array
  num_tokens: jax.Array
  ends_E: jax.Array


class Candidates(NamedTuple):
  """Beams that are extended by a token, more than the search keeps.

  Attributes:
    tokens_BCN: new tokens.
    sums_BC: sums of their log-probabilities.
    stops_BC: whether each ends here, with an end token or at the last step.
    is_end_BC: whether its last token is an end token.
  """

  tokens_BCN: jax.Array
  sums_BC: jax.Array
  stops_BC: jax.Array
  is_end_BC: jax.Array


def ended(
  beams: Beams,
  candidates: Candidates,
  step: BeamStep,
  config: beam_config.BeamConfig,
) -> Beams:
  """Adds the candidates that end to the hypotheses, and keeps the best.

  Args:
    beams: beams of a group, those that run already extended by this step.
    candidates: all candidates of the step.
    step: the step.
    config: settings of the search.
  """
  tokens_BCN, sums_BC, stops_BC, is_end_BC = candidates
  length = step.number + 1
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
  return _close(beams, length, step.num_tokens, config)


def _close(
  beams: Beams,
  length: jax.Array,
  num_tokens: jax.Array,
  config: beam_config.BeamConfig,
) -> Beams:
  """Ends the search of prompts whose running beams cannot become better."""
  longest = config.early_stopping == 'never' and config.length_penalty > 0
  most = config.divisor(num_tokens if longest else length)
  best_B = beams.sums_BW.max(-1) / most
  worst_BW = jnp.where(
    beams.is_done_BW, beams.scores_BW.min(-1, keepdims=True), NEVER
  )
  may_B = (best_B[:, None] > worst_BW).any(-1)
  return dataclasses.replace(beams, open_B=beams.open_B & may_B)


def whole(groups: Sequence[Beams]) -> Beams:
  """Joins the hypotheses of groups, best first, replicated on every device."""
  join = lambda *leaves: jnp.concatenate(leaves, axis=1)
  named = lambda name: [getattr(beams, name) for beams in groups]
  skipped = 'open_B', 'words'
  fields = [f.name for f in dataclasses.fields(Beams) if f.name not in skipped]
  joined = {name: join(*named(name)) for name in fields}
  order_BW = jnp.argsort(-joined['scores_BW'], axis=1, stable=True)
  joined = {name: take(a, order_BW) for name, a in joined.items()}
  joined = {name: decode_loop.replicated(a) for name, a in joined.items()}
  return Beams(open_B=groups[0].open_B, **joined)


def take(a: jax.Array, index_BC: jax.Array) -> jax.Array:
  """Takes entries along the second dimension, by indices of each row."""
  return jax.vmap(lambda row, index: row[index])(a, index_BC)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hypotheses:
  """Result of a beam search: the hypotheses of each prompt, best first.

  Attributes:
    tokens: new tokens, without the prompt and the end token.
    scores: sums of log-probabilities over the length divisor.
    ended: whether each hypothesis ended with an end token within `num_tokens`.
  """

  tokens: list[list[list[int]]]
  scores: list[list[float]]
  ended: list[list[bool]]


def to_lists(beams: Beams, num_prompts: int, num: int) -> Hypotheses:
  """Returns the best `num` hypotheses of each prompt, or fewer if host."""
  host = jax.device_get(beams)
  prompts = range(num_prompts)
  counts, tokens = host.counts_BW, host.done_BWN
  # There may be fewer: few short sequences exist, and tokens may be banned.
  places = [np.flatnonzero(host.is_done_BW[b])[:num] for b in prompts]
  of = lambda array_BW: [array_BW[b, places[b]].tolist() for b in prompts]
  return Hypotheses(
    tokens=[
      [tokens[b, w, : counts[b, w]].tolist() for w in places[b]]
      for b in prompts
    ],
    scores=of(host.scores_BW),
    ended=of(host.ended_BW),
  )
