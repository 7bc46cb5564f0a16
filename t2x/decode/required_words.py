"""Words that every text of a beam search must hold.

A beam knows how far it is in each form of each word (the automaton of Knuth,
Morris and Pratt, 1977). Beside the likeliest tokens, those that go on with a
word are always candidates, and beams are shared out among the numbers of tokens
that are still missing, so that those that have begun late are not crowded out
(Post and Vilar, 2018, dynamic beam allocation). A beam that could not finish
its words in the tokens that are left is dropped; words are counted apart, as if
they could share no tokens. Where the texts of words are known, one is there as
soon as its text is, whatever the tokens (`word_starts`); its forms then say how
it may be written.

Shape suffixes: B prompts, W beams, C candidates, V vocabulary, N new token, F
forms, K words, S places in a form, A letters, the tokens that forms have.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2x.decode import hypotheses
from t2x.decode import processors
from t2x.decode import prompts as prompts_lib
from t2x.decode import word_starts

# A word: its forms, such as with and without a space before it.
Word = Sequence[Sequence[int]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
  """Words as automata; padded, so that few programs serve all.

  Attributes:
    shortest_K: tokens of each word's shortest form; 0 for padding.
    word_F: the word of each form.
    length_F: its tokens; 0 for padding.
    form_FS: its tokens, one by one.
    letter_A: the tokens that forms have.
    table_FSA: the place after a letter; that of the length is the end.
    texts: of the words; None where they are tokens alone.
  """

  shortest_K: Any
  word_F: Any
  length_F: Any
  form_FS: Any
  letter_A: Any
  table_FSA: Any
  texts: word_starts.Arrays | None = None


def borders(form: Sequence[int]) -> list[int]:
  """Returns for each prefix the longest proper one that also ends it."""
  result, place = [0], 0
  for token in form[1:]:
    place = after(form, result, place, token)
    place = 0 if place == len(form) else place
    result.append(place)
  return result


def after(
  form: Sequence[int], back: Sequence[int], place: int, token: int
) -> int:
  """Returns how much of a form a text ends with, one token on.

  Args:
    form: tokens of a word.
    back: its `borders`.
    place: how much of it the text ended with, less than all.
    token: that comes next.
  """
  while place and form[place] != token:
    place = back[place - 1]
  return place + (form[place] == token)


def check(words: Sequence[Word], num_tokens: int) -> None:
  """Raises ValueError for words that a text cannot hold."""
  if not all(words) or any(not len(form) for word in words for form in word):
    raise ValueError('A keyword has no tokens; give words of a letter or more.')
  least = sum(min(map(len, word)) for word in words)
  if least > num_tokens:
    raise ValueError(
      f'The {len(words)} keywords have {least} tokens, and the text may have '
      f'{num_tokens} new ones. Ask for fewer words or more tokens.'
    )


def make(
  words: Sequence[Word], texts: word_starts.Arrays | None = None
) -> Words:
  """Returns words as arrays."""
  up = prompts_lib.power_of_two
  forms = [(k, tuple(form)) for k, word in enumerate(words) for form in word]
  letters = sorted({token for _, form in forms for token in form})
  F, S = up(len(forms)), up(max(len(form) for _, form in forms))
  form_FS = np.full((F, S), processors.NONE, np.int32)
  table_FSA = np.zeros((F, S, up(len(letters))), np.int32)
  for f, (_, form) in enumerate(forms):
    form_FS[f, : len(form)] = form
    back = borders(form)
    for place in range(len(form)):
      for a, letter in enumerate(letters):
        table_FSA[f, place, a] = after(form, back, place, letter)
  padded = lambda values, size, fill=0: np.array(
    [*values, *[fill] * (size - len(values))], np.int32
  )
  return Words(
    shortest_K=padded([min(map(len, w)) for w in words], up(len(words))),
    word_F=padded([k for k, _ in forms], F),
    length_F=padded([len(form) for _, form in forms], F),
    form_FS=form_FS,
    letter_A=padded(letters, table_FSA.shape[2], processors.NONE),
    table_FSA=table_FSA,
    texts=texts,
  )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """What texts have of the words; leading dimensions are those of the texts.

  Attributes:
    place_F: how much of each form a text ends with.
    missing_K: which words it lacks.
    text_K: its state in the automata of `Words.texts`, if there are any.
  """

  place_F: jax.Array
  missing_K: jax.Array
  text_K: jax.Array | None


def begin(words: Words, shape: tuple[int, int]) -> State:
  """Returns the state of texts without a token: of prompts and beams."""
  missing_K = jnp.asarray(words.shortest_K > 0)
  text_K = None
  if words.texts is not None:
    start_BK = jnp.asarray(words.texts.start_BK)
    text_K = jnp.broadcast_to(start_BK[:, None], (*shape, start_BK.shape[1]))
  return State(
    place_F=jnp.zeros((*shape, len(words.word_F)), jnp.int32),
    missing_K=jnp.broadcast_to(missing_K, (*shape, len(missing_K))),
    text_K=text_K,
  )


def _after(words: Words, state: State, token: jax.Array) -> State:
  """Returns the state of a text after one more token."""
  is_letter_A = token == jnp.asarray(words.letter_A)
  letter = jnp.argmax(is_letter_A)
  forms = jnp.arange(len(words.word_F))
  place_F = jnp.asarray(words.table_FSA)[forms, state.place_F, letter]
  place_F = jnp.where(is_letter_A.any(), place_F, 0)
  is_found_F = (place_F == words.length_F) & (words.length_F > 0)
  of_word_FK = words.word_F[:, None] == jnp.arange(len(words.shortest_K))[None]
  is_found_K = (is_found_F[:, None] & of_word_FK).any(0)
  text_K = state.text_K
  if words.texts is not None:
    assert text_K is not None
    text_K = words.texts.after(text_K, token)
    is_found_K |= text_K == words.texts.whole_K
  return State(
    place_F=jnp.where(is_found_F, 0, place_F),
    missing_K=state.missing_K & ~is_found_K,
    text_K=text_K,
  )


def _needed(words: Words, state: State) -> jax.Array:
  """Returns the tokens that a text lacks, the word that is begun first."""
  whole = (state.missing_K * words.shortest_K).sum()
  shortest_F = jnp.asarray(words.shortest_K)[words.word_F]
  saved_F = shortest_F - (words.length_F - state.place_F)
  is_begun_F = _is_missing(words, state) & (state.place_F > 0)
  return whole - jnp.where(is_begun_F, saved_F, 0).max(initial=0)


def _is_missing(words: Words, state: State) -> jax.Array:
  """Returns which forms are of words that are missing."""
  missing_F = state.missing_K[jnp.asarray(words.word_F)]
  return missing_F & (words.length_F > 0)


def _forced(words: Words, state: State) -> jax.Array:
  """Returns tokens that go on with a word or begin one, -1 for none."""
  form_FS = jnp.asarray(words.form_FS)
  forms = jnp.arange(len(words.word_F))
  is_missing_F = _is_missing(words, state)
  hidden = lambda token_F: jnp.where(is_missing_F, token_F, processors.NONE)
  on_F, first_F = form_FS[forms, state.place_F], form_FS[:, 0]
  token_C = jnp.concatenate([hidden(on_F), hidden(first_F)])
  same_CC = token_C[:, None] == token_C[None]
  is_again_C = jnp.tril(same_CC, -1).any(-1)
  return jnp.where(is_again_C, processors.NONE, token_C)


def advance(beams, log_probs_BWV, step, config: Any, words: Words):
  """Returns beams with one more token, which one each came from, its token.

  As `beams._advance`, of beams that have a state of their words.
  """
  number, num_tokens, ends_E = step
  B, W, V = log_probs_BWV.shape
  state = beams.words
  is_done_BW = ~state.missing_K.any(-1)
  each = lambda fn: jax.vmap(jax.vmap(functools.partial(fn, words)))
  forced_BWC = each(_forced)(state)
  # Ends wait until all words are there; what is forced is drawn apart.
  ban = jax.vmap(
    jax.vmap(lambda row, at: row.at[at].set(-jnp.inf, mode='drop'))
  )
  placed = lambda tokens: jnp.where(tokens < 0, V, tokens)
  ends_BWE = jnp.where(
    is_done_BW[..., None], processors.NONE, ends_E[None, None]
  )
  free_BWV = ban(log_probs_BWV, placed(ends_BWE))
  free_BWV = ban(free_BWV, placed(forced_BWC)) + beams.sums_BW[..., None]
  num = min(max(2, 1 + len(ends_E)) * W, W * V)
  sums_BC, place_BC = jax.lax.top_k(free_BWV.reshape(B, -1), num)
  own_BWC = jnp.take_along_axis(
    log_probs_BWV, jnp.maximum(forced_BWC, 0), axis=2
  )
  own_BWC = jnp.where(forced_BWC < 0, -jnp.inf, own_BWC)
  own_BWC = own_BWC + beams.sums_BW[..., None]
  parents_BWC = jnp.broadcast_to(jnp.arange(W)[None, :, None], own_BWC.shape)
  join = lambda a, b: jnp.concatenate([a, b.reshape(B, -1)], axis=1)
  sums_BC = join(sums_BC, own_BWC)
  parent_BC = join(place_BC // V, parents_BWC)
  token_BC = join(place_BC % V, jnp.maximum(forced_BWC, 0)).astype(jnp.int32)
  pick = lambda a: hypotheses.take(a, parent_BC)
  state = each(_after)(jax.tree.map(pick, state), token_BC)
  needed_BC = each(_needed)(state)
  is_real_BC = (needed_BC < num_tokens - number) & jnp.isfinite(sums_BC)
  sums_BC = jnp.where(is_real_BC, sums_BC, 2 * hypotheses.NEVER)
  is_end_BC = jnp.isin(token_BC, ends_E)
  stops_BC = is_end_BC | (number + 1 >= num_tokens)
  keep_BW = _shared_out(sums_BC, needed_BC, is_real_BC & ~stops_BC, W)
  tokens_BCN = jax.lax.dynamic_update_slice_in_dim(
    pick(beams.tokens_BWN), token_BC[..., None], number, axis=2
  )
  kept = lambda a: hypotheses.take(a, keep_BW)
  goes_on_BW = kept(is_real_BC & ~stops_BC)
  running = dataclasses.replace(
    beams,
    tokens_BWN=kept(tokens_BCN),
    sums_BW=jnp.where(goes_on_BW, kept(sums_BC), hypotheses.NEVER),
    words=jax.tree.map(kept, state),
  )
  stops_BC = stops_BC & is_real_BC & (needed_BC <= 0)
  running = hypotheses.ended(
    running, (tokens_BCN, sums_BC, stops_BC, is_end_BC), step, config
  )
  return running, kept(parent_BC), kept(token_BC)


def _shared_out(sums_BC, needed_BC, goes_on_BC, num: int) -> jax.Array:
  """Returns `num` candidates: the best of each number of missing tokens.

  Then the second of each, and so on; those that lack the fewest come first.
  """
  alike = needed_BC[:, :, None] == needed_BC[:, None, :]
  better = sums_BC[:, None, :] > sums_BC[:, :, None]
  C = sums_BC.shape[1]
  earlier = jnp.arange(C)[None, None, :] < jnp.arange(C)[None, :, None]
  better |= (sums_BC[:, None, :] == sums_BC[:, :, None]) & earlier
  rank_BC = (alike & better & goes_on_BC[:, None, :]).sum(-1)
  most = needed_BC.max() + 1
  order_BC = rank_BC * most + needed_BC
  order_BC = jnp.where(goes_on_BC, order_BC, jnp.iinfo(jnp.int32).max)
  return jax.lax.top_k(-order_BC, num)[1]
