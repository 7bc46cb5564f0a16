"""Beam search: the continuations of highest score, many at a time.

One compiled loop keeps for each prompt the running beams and the best of those
that ended. With one group the tokens are those of Hugging Face's `generate`,
whose rules of when to stop and what a longer text may cost are followed; with
several, groups search in turn and keep away from what earlier ones take
(Vijayakumar et al., 2018).

Shape suffixes: B prompts, G groups, W beams of a group, R = B * G * W rows, C
candidates, N new token, V vocabulary.
"""

import dataclasses
import functools
from typing import Any
from typing import Literal

import jax
import jax.numpy as jnp

from t2x.decode import decode_loop
from t2x.decode import hypotheses
from t2x.decode import required_words
from t2x.decode import sampling as sampling_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class BeamConfig:
  """How beams are kept, and when the search ends.

  Attributes:
    num_beams: beams of a prompt, over all groups.
    num_groups: groups of beams that differ from each other.
    diversity: what a token costs for each earlier group that takes it in the
      same step.
    length_penalty: the alpha of `length_form`; above 0 favours longer texts.
    length_form: `power` divides a sum of log-probabilities by length ** alpha
      (Hugging Face), `gnmt` by ((5 + length) / 6) ** alpha (Wu et al., 2016).
    early_stopping: `heuristic` ends when the best running beam, at its present
      length, is below the worst that ended; `first` when enough beams have
      ended; `never` when no running beam could become better.
  """

  num_beams: int = 4
  num_groups: int = 1
  diversity: float = 0.0
  length_penalty: float = 1.0
  length_form: Literal['power', 'gnmt'] = 'power'
  early_stopping: Literal['heuristic', 'first', 'never'] = 'heuristic'

  def __post_init__(self):
    if self.num_beams < 1 or self.num_groups < 1:
      raise ValueError(
        f'beams.num_beams={self.num_beams}, num_groups={self.num_groups}; both '
        'are 1 or more.'
      )
    if self.num_beams % self.num_groups:
      raise ValueError(
        f'beams.num_beams={self.num_beams} are not {self.num_groups} groups of '
        'as many beams. Let num_groups divide num_beams.'
      )
    if self.num_groups > 1 and self.diversity <= 0:
      raise ValueError(
        f'beams.diversity={self.diversity} with num_groups={self.num_groups}: '
        'the groups would all find the same. Set it above 0, such as 0.5.'
      )
    for name, values in (
      ('length_form', ('power', 'gnmt')),
      ('early_stopping', ('heuristic', 'first', 'never')),
    ):
      if getattr(self, name) not in values:
        raise ValueError(
          f'beams.{name}={getattr(self, name)!r}; it is one of '
          f'{", ".join(values)}.'
        )

  @property
  def group_size(self) -> int:
    return self.num_beams // self.num_groups

  def divisor(self, length: jax.Array) -> jax.Array:
    """Returns what a text of so many new tokens has its score divided by."""
    length = length.astype(jnp.float32)
    if self.length_form == 'gnmt':
      length = (5 + length) / 6
    return length**self.length_penalty


@functools.partial(jax.jit, static_argnames=('capacity', 'config'))
def search(
  model: decode_loop.Model,
  caches: Any,
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
  words: required_words.Words | None = None,
) -> hypotheses.Beams:
  """Searches; arguments are as of `decode_loop.decode`.

  Args:
    model: the model.
    caches: of the tokens before `token_B`.
    token_B: the token of each prompt to go on from.
    index_B: where it stands.
    live_B: prompts; the other rows pad the batch.
    num_tokens: the most new tokens, not above `capacity`.
    ends_E: tokens that end a text; -1 is none.
    capacity: of the caches.
    config: of the search.
    settings: of R rows; what is drawn from does not matter, what hides or
      weakens tokens does.
    history: of R rows.
    source_segments_BS: as of `decode_loop.decode`.
    words: that each text must hold; None for none.

  Returns:
    The beams of all groups; `done_BWN` is (B, G * W, N), best first.
  """
  B, G, W = len(token_B), config.num_groups, config.group_size
  rows = lambda a: jnp.repeat(a, G * W, axis=0)
  caches = _map_rows(rows, caches)
  segments_RS = None if source_segments_BS is None else rows(source_segments_BS)
  own = None if words is None else required_words.begin(words, (B, W))
  groups = tuple(hypotheses.empty(live_B, W, capacity, own) for _ in range(G))
  first = (jnp.int32(0), rows(token_B), rows(index_B), groups, caches, history)

  def goes_on(state):
    number, _, _, groups, _, _ = state
    return (number < num_tokens) & _any_open(groups, live_B, config)

  def extend(state):
    number, token_R, index_R, groups, caches, history = state
    logits_RV, caches = decode_loop.next_logits(
      model, token_R, index_R, caches, segments_RS
    )
    logits_RV = sampling_lib.calibrated(logits_RV, settings)
    log_probs_RV = jax.nn.log_softmax(logits_RV.astype(jnp.float32), axis=-1)
    ends_RE = jnp.broadcast_to(ends_E[None], (len(token_R), len(ends_E)))
    log_probs_RV = sampling_lib.shaped(
      log_probs_RV,
      settings,
      history,
      jnp.broadcast_to(number, token_R.shape),
      ends_RE,
    )
    log_probs_BGWV = log_probs_RV.reshape(B, G, W, -1)
    taken_BV = jnp.zeros_like(log_probs_BGWV[:, 0, 0])
    groups, parents, tokens = list(groups), [], []
    for g in range(G):
      log_probs_BWV = (
        log_probs_BGWV[:, g] - config.diversity * taken_BV[:, None]
      )
      step = number, num_tokens, ends_E
      parts = groups[g], log_probs_BWV, step, config
      groups[g], parent_BW, token_BW = (
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
    return number + 1, token_R, index_R + 1, tuple(groups), caches, history

  *_, groups, _, _ = jax.lax.while_loop(goes_on, extend, first)
  return hypotheses.whole(groups)


def _advance(beams: hypotheses.Beams, log_probs_BWV, step, config: BeamConfig):
  """Returns beams with one more token, which one each came from, its token."""
  number, num_tokens, ends_E = step
  B, W, V = log_probs_BWV.shape
  # Enough that W of them go on, whichever end.
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
  # Of candidates past the first W none ends: they only fill up the others.
  stops_BC = stops_BC & (jnp.arange(num) < W)[None]
  running = hypotheses.ended(
    running, (tokens_BCN, sums_BC, stops_BC, is_end_BC), step, config
  )
  at = lambda a: jnp.take_along_axis(a, keep_BW, axis=1)
  return running, at(parent_BC), at(token_BC).astype(jnp.int32)


def _any_open(groups, live_B, config: BeamConfig):
  """Whether any prompt's search goes on."""
  opens = [beams.open_B.any() for beams in groups]
  if config.early_stopping == 'first':
    opens = [
      is_open & ~(beams.is_done_BW | ~live_B[:, None]).all()
      for is_open, beams in zip(opens, groups)
    ]
  return functools.reduce(jnp.logical_or, opens)


def _map_rows(fn, caches, cross: bool = True):
  """Applies `fn` to the rows of caches, stacked over layers or not.

  Without `cross`, keys and values of a source stay: all beams of a prompt have
  the same.
  """
  group, rest = caches

  def of_layer(cache, apply):
    if cross:
      return jax.tree.map(apply, cache)
    own = jax.tree.map(apply, cache.own)
    return dataclasses.replace(cache, own=own)

  return (
    tuple(of_layer(cache, jax.vmap(fn)) for cache in group),
    tuple(of_layer(cache, fn) for cache in rest),
  )
