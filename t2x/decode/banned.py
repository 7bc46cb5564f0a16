"""Banned words: strings that a generated sequence never contains.

They are banned by their bytes, however a tokenizer splits them. The automaton
of Aho and Corasick (1975) follows the bytes of a sequence; its state says which
banned words have begun, and each state bans the tokens that would complete one.
A word is banned wherever its bytes follow each other: within longer words, and
across the boundaries of tokens, of the prompt and of characters.

Shape suffixes: B rows, S states, X values of a byte, V vocabulary, W words of
32 tokens.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2x.decode import pieces as pieces_lib
from t2x.decode import processors
from t2x.decode import prompts as prompts_lib

_MOST_BITS = 2**33  # Bits of the masks of all states: 1 GiB.


class Banned:
  """A list of banned words, as an automaton over the bytes of one vocabulary.

  >>> pieces = pieces_lib.TokenBytes([b'', b'he', b'llo', b' "', b'h', b'e'])
  >>> banned = Banned(['hello'], pieces)
  >>> state = banned.start([3, 4, 5])
  >>> banned.hidden(state)
  array([4], dtype=uint32)
  """

  def __init__(self, words: Sequence[str], pieces: pieces_lib.TokenBytes):
    """Makes the automaton.

    Args:
      words: strings to ban; upper and lower case differ.
      pieces: bytes of the vocabulary's tokens.

    Raises:
      ValueError: a word is empty or no valid Unicode, or there are too many
        words.
    """
    self.pieces = pieces
    encoded = sorted({_bytes(word) for word in words})
    self.words = tuple(encoded)
    prefixes = {word[:n] for word in encoded for n in range(len(word))} | {b''}
    self._prefixes = sorted(prefixes, key=len)
    self._rests: dict[bytes, list[bytes]] = {}
    for word in encoded:
      for n in range(1, len(word)):
        self._rests.setdefault(word[:n], []).append(word[n:])
    if len(prefixes) * self.num_tokens > _MOST_BITS:
      raise ValueError(
        f'{len(encoded)} banned words have {len(prefixes)} beginnings, too '
        f'many for a vocabulary of {self.num_tokens} tokens; ban fewer.'
      )
    self.table_SX = self._table()
    self._hidden: dict[int, np.ndarray] = {}
    self._completing: dict[bytes, np.ndarray] = {}

  def __repr__(self) -> str:
    return f'Banned({[word.decode() for word in self.words]})'

  @property
  def num_tokens(self) -> int:
    """Size of the vocabulary."""
    return len(self.pieces.token_bytes)

  def _table(self) -> np.ndarray:
    number = {prefix: i for i, prefix in enumerate(self._prefixes)}
    longer: dict[bytes, list[bytes]] = {}
    for prefix in self._prefixes[1:]:
      longer.setdefault(prefix[:-1], []).append(prefix)
    table_SX = np.zeros((len(number), 256), np.int32)
    # For each state, that of its longest proper suffix which is a state too.
    shorter = np.zeros(len(number), int)
    # From short to long, so that the state to fall back to is complete.
    for prefix, state in number.items():
      if len(prefix) > 1:
        shorter[state] = table_SX[shorter[number[prefix[:-1]]], prefix[-1]]
      if prefix:
        table_SX[state] = table_SX[shorter[state]]
      for other in longer.get(prefix, ()):
        table_SX[state, other[-1]] = number[other]
    return table_SX

  def start(self, prompt: Sequence[int] = ()) -> int:
    """Returns the automaton's state after the tokens of a prompt."""
    most = max(map(len, self.words), default=0)
    return pieces_lib.follow(self.table_SX, 0, self.pieces.last(prompt, most))

  def after(self, state: int, token: int) -> int:
    """Returns the state after one more token."""
    text = self.pieces.token_bytes[token]
    return pieces_lib.follow(self.table_SX, state, text)

  def hidden(self, state: int) -> np.ndarray:
    """Returns the banned tokens as bits of uint32 words, lowest bit first."""
    if state not in self._hidden:
      is_banned_V = self._containing.copy()
      begun = self._prefixes[state]
      for start in range(len(begun)):
        for rest in self._rests.get(begun[start:], ()):
          is_banned_V[self._beginning(rest)] = True
      bits = np.packbits(is_banned_V, bitorder='little')
      self._hidden[state] = bits.view(np.uint32)
    return self._hidden[state]

  @functools.cached_property
  def _containing(self) -> np.ndarray:
    """Whether each token contains a word, padded to a multiple of 32."""
    is_banned_V = np.zeros(-(-self.num_tokens // 32) * 32, bool)
    for word in self.words:
      is_banned_V[self.pieces.holding(word)] = True
    return is_banned_V

  def _beginning(self, rest: bytes) -> np.ndarray:
    if rest not in self._completing:
      self._completing[rest] = self.pieces.beginning(rest)
    return self._completing[rest]


def _bytes(word: str) -> bytes:
  if not word:
    raise ValueError('A banned word is empty; give a letter or more.')
  if not pieces_lib.is_text(word):
    raise ValueError(f'The banned word {word!r} is no valid Unicode.')
  return word.encode()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class BannedRows:
  """The banned words of each row of a batch, as arrays.

  The states of different lists are concatenated in one table.

  Attributes:
    reader: automaton that follows the bytes of each row's sequence.
    hidden_SW: bits of the tokens that each state bans, uint32.
    root_B: state of each row before its first token.
  """

  reader: pieces_lib.Reader
  hidden_SW: Any
  root_B: Any

  def __call__(self, logits_BV: jax.Array, state_B: jax.Array) -> jax.Array:
    """Bans the tokens that would complete a word, given each row's state."""
    hidden_BW = jnp.asarray(self.hidden_SW)[state_B]
    return processors.without_bits(logits_BV, hidden_BW)

  def start(self, prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the state of each row after its prompt (B,)."""
    reader = self.reader
    arrays = reader.flat_N, reader.start_V
    state_B = np.array(self.root_B)
    for row, prompt in enumerate(prompts):
      # A word that has begun has fewer bytes so far than there are states.
      text = pieces_lib.last(*arrays, prompt, len(reader.table_SX))
      state_B[row] = pieces_lib.follow(reader.table_SX, state_B[row], text)
    return state_B


def rows(row_words: Sequence[Banned | None]) -> BannedRows | None:
  """Joins the banned words of all rows; returns None if no row has any."""
  lists = list({id(banned): banned for banned in row_words if banned}.values())
  if not lists:
    return None
  pieces = lists[0].pieces
  sizes = [len(banned.table_SX) for banned in lists]
  # The next state is that of rows without words; the others are padding.
  first = np.cumsum([0, *sizes])
  num = prompts_lib.power_of_two(int(first[-1]) + 1)
  table_SX = np.full((num, 256), first[-1], np.int32)
  hidden_SW = np.zeros((num, len(lists[0].hidden(0))), np.uint32)
  for start, size, banned in zip(first, sizes, lists):
    table_SX[start : start + size] = banned.table_SX + start
    for state in range(size):
      hidden_SW[start + state] = banned.hidden(state)
  roots = {id(banned): start for start, banned in zip(first, lists)}
  return BannedRows(
    reader=pieces.reader(table_SX),
    hidden_SW=hidden_SW,
    root_B=np.array([roots.get(id(b), first[-1]) for b in row_words], np.int32),
  )
