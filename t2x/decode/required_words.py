"""Required words: words that every sequence of a beam search must contain.

Each word has one or more forms, which are lists of tokens, such as the word
with and without a space before it. The automaton of Knuth, Morris and Pratt
(1977) follows each form: its state is the number of tokens of the form with
which the beam ends. The tokens that continue or begin a missing word are always
candidates, beside the likeliest ones. The beams are divided evenly among the
numbers of tokens that are still missing, so that beams which begin their words
late are not crowded out (Post and Vilar, 2018, dynamic beam allocation). A beam
that cannot complete its words in the remaining tokens is dropped; the count
assumes that words share no tokens. If the strings of the words are given, a
word counts as soon as its string appears, however it is tokenized
(`word_starts`); its forms then only guide the search.

Shape suffixes: B prompts, W beams, C candidates, V vocabulary, N new token, F
forms, K words, S positions in a form, A alphabet (the tokens of all forms).
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2x.decode import beam_config
from t2x.decode import hypotheses
from t2x.decode import processors
from t2x.decode import prompts as prompts_lib
from t2x.decode import word_starts

# A word as the token ids of its forms.
Word = Sequence[Sequence[int]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RequiredWords:
  """Required words as automata, padded so that few shapes are compiled.

  Attributes:
    shortest_K: number of tokens of each word's shortest form; 0 for padding.
    word_F: index of the word of each form.
    length_F: number of tokens of each form; 0 for padding.
    form_FS: token ids of each form.
    letter_A: token ids that occur in forms; -1 for padding.
    table_FSA: number of matched tokens after one more token of the alphabet;
      a form is complete when it equals the form's length.
    texts: strings of the words, as automata over bytes; None if the words are
      given by tokens alone.
  """

  shortest_K: Any
  word_F: Any
  length_F: Any
  form_FS: Any
  letter_A: Any
  table_FSA: Any
  texts: word_starts.Arrays | None = None


def borders(form: Sequence[int]) -> list[int]:
  """Returns the length of the longest border of each prefix.

  A border is a proper prefix that is also a suffix.
  """
  result, place = [0], 0
  for token in form[1:]:
    place = after(form, result, place, token)
    place = 0 if place == len(form) else place
    result.append(place)
  return result


def after(
  form: Sequence[int], back: Sequence[int], place: int, token: int
) -> int:
  """Returns how many tokens of a form match after one more token.

  Args:
    form: token ids of the form.
    back: lengths of its borders; see `borders`.
    place: number of tokens that matched before, less than all.
    token: token id that comes next.
  """
  while place and form[place] != token:
    place = back[place - 1]
  return place + (form[place] == token)


def check(words: Sequence[Word], num_tokens: int) -> None:
  """Raises ValueError for words that do not fit into `num_tokens` tokens."""
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
) -> RequiredWords:
  """Builds the automata of required words.

  Args:
    words: the forms of each word, as token ids.
    texts: strings of the words; None if the tokens alone count.
  """
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
  return RequiredWords(
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
class WordsProgress:
  """Progress of sequences in their required words.

  Leading dimensions are those of the sequences.

  Attributes:
    place_F: number of tokens of each form with which a sequence ends.
    missing_K: whether each word is still missing.
    text_K: state in the automaton of each word's string; None if there are no
      `RequiredWords.texts`.
  """

  place_F: jax.Array
  missing_K: jax.Array
  text_K: jax.Array | None


def begin(words: RequiredWords, shape: tuple[int, int]) -> WordsProgress:
  """Returns the state before the first token, of leading dimensions `shape`."""
  missing_K = jnp.asarray(words.shortest_K > 0)
  text_K = None
  if words.texts is not None:
    start_BK = jnp.asarray(words.texts.start_BK)
    text_K = jnp.broadcast_to(start_BK[:, None], (*shape, start_BK.shape[1]))
  return WordsProgress(
    place_F=jnp.zeros((*shape, len(words.word_F)), jnp.int32),
    missing_K=jnp.broadcast_to(missing_K, (*shape, len(missing_K))),
    text_K=text_K,
  )


def _after(
  words: RequiredWords, state: WordsProgress, token: jax.Array
) -> WordsProgress:
  """Returns the state of a sequence after one more token."""
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
  return WordsProgress(
    place_F=jnp.where(is_found_F, 0, place_F),
    missing_K=state.missing_K & ~is_found_K,
    text_K=text_K,
  )


def _needed(words: RequiredWords, state: WordsProgress) -> jax.Array:
  """Returns the number of tokens still needed for the missing words.

  The word that has been begun furthest is completed first.
  """
  total = (state.missing_K * words.shortest_K).sum()
  shortest_F = jnp.asarray(words.shortest_K)[words.word_F]
  saved_F = shortest_F - (words.length_F - state.place_F)
  is_begun_F = _is_missing(words, state) & (state.place_F > 0)
  return total - jnp.where(is_begun_F, saved_F, 0).max(initial=0)


def _is_missing(words: RequiredWords, state: WordsProgress) -> jax.Array:
  """Returns whether each form belongs to a missing word (F,)."""
  missing_F = state.missing_K[jnp.asarray(words.word_F)]
  return missing_F & (words.length_F > 0)


def _forced(words: RequiredWords, state: WordsProgress) -> jax.Array:
  """Returns tokens that continue or begin a missing word, -1 for padding."""
  form_FS = jnp.asarray(words.form_FS)
  forms = jnp.arange(len(words.word_F))
  is_missing_F = _is_missing(words, state)
  hidden = lambda token_F: jnp.where(is_missing_F, token_F, processors.NONE)
  on_F, first_F = form_FS[forms, state.place_F], form_FS[:, 0]
  token_C = jnp.concatenate([hidden(on_F), hidden(first_F)])
  same_CC = token_C[:, None] == token_C[None]
  is_again_C = jnp.tril(same_CC, -1).any(-1)
  return jnp.where(is_again_C, processors.NONE, token_C)


def advance(
  beams: hypotheses.Beams,
  log_probs_BWV: jax.Array,
  step: hypotheses.BeamStep,
  config: beam_config.BeamConfig,
  words: RequiredWords,
) -> tuple[hypotheses.Beams, jax.Array, jax.Array]:
  """Extends the beams of one group by a token, with required words.

  Args:
    beams: beams of the group; `beams.words` is their `WordsProgress`.
    log_probs_BWV: log-probabilities of each beam's next token.
    step: the step of the search.
    config: settings of the search.
    words: the required words.

  Returns:
    The new beams; the beam that each continues (B, W); its new token (B, W).
  """
  number, num_tokens, ends_E = step
  B, W, V = log_probs_BWV.shape
  state = beams.words
  is_done_BW = ~state.missing_K.any(-1)
  each = lambda fn: jax.vmap(jax.vmap(functools.partial(fn, words)))
  forced_BWC = each(_forced)(state)
  # No beam ends before it has all words; forced tokens are separate candidates.
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
  forced_sums_BWC = jnp.take_along_axis(
    log_probs_BWV, jnp.maximum(forced_BWC, 0), axis=2
  )
  forced_sums_BWC = jnp.where(forced_BWC < 0, -jnp.inf, forced_sums_BWC)
  forced_sums_BWC = forced_sums_BWC + beams.sums_BW[..., None]
  parents_BWC = jnp.broadcast_to(
    jnp.arange(W)[None, :, None], forced_sums_BWC.shape
  )
  join = lambda a, b: jnp.concatenate([a, b.reshape(B, -1)], axis=1)
  sums_BC = join(sums_BC, forced_sums_BWC)
  parent_BC = join(place_BC // V, parents_BWC)
  token_BC = join(place_BC % V, jnp.maximum(forced_BWC, 0)).astype(jnp.int32)
  pick = lambda a: hypotheses.take(a, parent_BC)
  state = each(_after)(jax.tree.map(pick, state), token_BC)
  needed_BC = each(_needed)(state)
  is_real_BC = (needed_BC < num_tokens - number) & jnp.isfinite(sums_BC)
  sums_BC = jnp.where(is_real_BC, sums_BC, 2 * hypotheses.NEVER)
  is_end_BC = jnp.isin(token_BC, ends_E)
  stops_BC = is_end_BC | (number + 1 >= num_tokens)
  keep_BW = _allocate(sums_BC, needed_BC, is_real_BC & ~stops_BC, W)
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
    running,
    hypotheses.Candidates(tokens_BCN, sums_BC, stops_BC, is_end_BC),
    step,
    config,
  )
  return running, kept(parent_BC), kept(token_BC)


def _allocate(
  sums_BC: jax.Array, needed_BC: jax.Array, goes_on_BC: jax.Array, num: int
) -> jax.Array:
  """Chooses `num` candidates by dynamic beam allocation (B, num).

  The best candidate of each number of missing tokens is taken, then the second
  best of each, and so on; those that miss the fewest come first.
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
