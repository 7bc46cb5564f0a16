"""Finds words in a sequence by its bytes, however they are tokenized.

A word counts only where it starts: at the beginning of a sequence, or after a
character that is neither a letter nor a digit, in any script. Words that do not
begin with a letter or a digit count anywhere.

Shape suffixes: S states, X byte values, U states within characters, K words, B
sequences.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2x.decode import pieces as pieces_lib
from t2x.decode import prompts as prompts_lib

_LETTER = 1  # The state after a letter or a digit; 0 is that after others.
_MOST_BYTES = 8  # So many bytes of UTF-8 contain a whole character.


@functools.cache
def _characters() -> np.ndarray:
  """Returns the automaton of characters: the state after each byte (U, X).

  Invalid UTF-8 counts as a replacement character, after which a word may begin.
  """
  is_letter = np.array([chr(c).isalnum() for c in range(0x110000)])
  is_letter = np.concatenate([is_letter, np.zeros(0x140000 - 0x110000, bool)])
  rows: list[list[int]] = []
  known: dict[bytes, int] = {}

  def state_of(part: np.ndarray) -> int:
    """Returns the state whose possible characters are letters as in `part`."""
    if len(part) == 1:
      return int(part[0])
    key = part.tobytes()
    if key not in known:
      row = [state_of(p) for p in part.reshape(64, -1)]
      known[key] = 2 + len(rows)
      rows.append(row)
    return known[key]

  first_X = np.zeros(256, np.int32)
  first_X[:0x80] = is_letter[:0x80]
  # Range of first bytes, number of characters of each, least of that length.
  for low, high, size, least in (
    (0xC0, 0xDF, 64, 0x80),
    (0xE0, 0xEF, 64**2, 0x800),
    (0xF0, 0xF4, 64**3, 0x10000),
  ):
    of_size = np.where(np.arange(len(is_letter)) < least, False, is_letter)
    for number, byte in enumerate(range(low, high + 1)):
      part = of_size[number * size : (number + 1) * size]
      first_X[byte] = state_of(part)
  table_UX = np.tile(first_X, (2 + len(rows), 1))
  table_UX[2:, 0x80:0xC0] = rows
  return table_UX


def _table(word: bytes, characters_UX: np.ndarray) -> np.ndarray:
  """Returns the automaton that finds a word: the state after each byte (S, X).

  The first U states are those of the characters; the others are the matched
  prefixes of the word. The last one means that the word was found, and stays.
  """
  U, num = len(characters_UX), len(word)
  table_SX = np.zeros((U + num, 256), np.int32)
  table_SX[:U] = characters_UX
  # Also within a character, since a character that breaks off is invalid.
  table_SX[[u for u in range(U) if u != _LETTER], word[0]] = U
  table_SX[-1] = U + num - 1
  state, within = 0, [0]  # States of characters after each prefix of the word.
  for byte in word:
    state = int(characters_UX[state, byte])
    within.append(state)
  for place in range(1, num):
    row_X = characters_UX[within[place]].copy()
    # The longest prefix of the word that ends here is the next state.
    for start in range(place, -1, -1):
      size = place - start
      if word[:size] == word[start:place] and within[start] != _LETTER:
        row_X[word[size]] = U + size
    table_SX[U + place - 1] = row_X
  return table_SX


class WordFinder:
  """Words to find in sequences, as automata over bytes.

  >>> pieces = pieces_lib.TokenBytes([b'an "', b'o', b'x', b'en', b'f'])
  >>> words = WordFinder(['ox'], [True], pieces)
  >>> states = words.start()
  >>> for token in (0, 1, 2):
  ...   states = words.after(states, token)
  >>> words.found(states)
  {0}
  """

  def __init__(
    self,
    words: Sequence[str],
    from_start: Sequence[bool],
    pieces: pieces_lib.TokenBytes,
  ):
    """Builds an automaton for each word.

    Args:
      words: the words, as strings.
      from_start: whether each counts only where a word starts.
      pieces: bytes of the vocabulary's tokens.
    """
    anywhere = np.zeros((1, 256), np.int32)
    self._characters = [
      _characters() if start else anywhere for start in from_start
    ]
    self.tables = [
      _table(word.encode(), characters_UX)
      for word, characters_UX in zip(words, self._characters)
    ]
    self.pieces = pieces

  def start(self, prompt: Sequence[int] = ()) -> list[int]:
    """Returns the state of each word before the first new token.

    Args:
      prompt: tokens before the new ones, in which no word is found.
    """
    before = self.pieces.last(prompt, _MOST_BYTES)
    follow = pieces_lib.follow
    return [follow(table, 0, before) for table in self._characters]

  def after(self, states: Sequence[int], token: int) -> list[int]:
    """Returns the states after one more token."""
    text = self.pieces.token_bytes[token]
    follow = pieces_lib.follow
    return [follow(t, state, text) for t, state in zip(self.tables, states)]

  def found(self, states: Sequence[int]) -> set[int]:
    """Returns the indices of the words that were found."""
    pairs = enumerate(zip(self.tables, states))
    return {k for k, (table, state) in pairs if state == len(table) - 1}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Arrays:
  """The automata of words as padded arrays.

  The states of different words are concatenated in one table.

  Attributes:
    reader: automaton that follows the bytes of sequences.
    start_BK: state of each word after each prompt.
    whole_K: state of each word when it was found; -1 for padding.
  """

  reader: pieces_lib.Reader
  start_BK: Any
  whole_K: Any

  def after(self, state_K: jax.Array, token: jax.Array) -> jax.Array:
    """Returns the states of a sequence after one more token."""
    return self.reader.after(state_K, jnp.broadcast_to(token, state_K.shape))


def arrays(words: WordFinder, prompts: Sequence[Sequence[int]]) -> Arrays:
  """Returns the automata of words as arrays, and their states after prompts."""
  up = prompts_lib.power_of_two
  first = np.cumsum([0, *map(len, words.tables)])
  num, K = up(int(first[-1]) + 1), up(len(words.tables))
  table_SX = np.full((num, 256), num - 1, np.int32)
  for start, word_SX in zip(first, words.tables):
    table_SX[start : start + len(word_SX)] = word_SX + start
  start_BK = np.full((len(prompts), K), num - 1, np.int32)
  for row, prompt in zip(start_BK, prompts):
    row[: len(words.tables)] = words.start(prompt) + first[:-1]
  whole_K = np.full(K, -1, np.int32)
  whole_K[: len(words.tables)] = first[1:] - 1
  return Arrays(
    reader=words.pieces.reader(table_SX),
    start_BK=start_BK,
    whole_K=whole_K,
  )
