"""The bytes of tokens, and byte automata that follow sequences of tokens.

Shape suffixes: B sequences, S states, X byte values, N bytes, V vocabulary.
"""

import bisect
from collections.abc import Sequence
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class TokenBytes:
  """The bytes of every token of a vocabulary.

  >>> pieces = TokenBytes([b'', b'he', b'hello', b'lo'])
  >>> pieces.beginning(b'he').tolist(), pieces.holding(b'lo').tolist()
  ([1, 2], [2, 3])
  """

  def __init__(self, token_bytes: Sequence[bytes]):
    """Indexes the bytes of each token, which are empty for special tokens."""
    self.token_bytes = tuple(token_bytes)
    self.start_V = np.cumsum([0, *map(len, token_bytes)], dtype=np.int32)
    self._joined = b''.join(token_bytes)
    # Never empty, so that indexing works.
    self.flat_N = np.frombuffer(self._joined + b'\0', np.uint8)

  @functools.cached_property
  def _order(self) -> tuple[np.ndarray, list[bytes]]:
    size = len(self.token_bytes)
    order_V = sorted(range(size), key=self.token_bytes.__getitem__)
    return np.array(order_V, int), [self.token_bytes[i] for i in order_V]

  def beginning(self, text: bytes) -> np.ndarray:
    """Returns the tokens whose bytes begin with `text`."""
    order_V, ranked = self._order
    low = bisect.bisect_left(ranked, text)
    cut = lambda piece: piece[: len(text)]
    return order_V[low : bisect.bisect_right(ranked, text, low, key=cut)]

  def holding(self, text: bytes) -> np.ndarray:
    """Returns the tokens whose bytes contain `text`."""
    overlapping = re.finditer(b'(?=' + re.escape(text) + b')', self._joined)
    starts = np.array([match.start() for match in overlapping], int)
    token = np.searchsorted(self.start_V, starts, side='right') - 1
    return np.unique(token[starts + len(text) <= self.start_V[token + 1]])

  def last(self, tokens: Sequence[int], num: int) -> bytes:
    """Returns the last `num` bytes of tokens or more, up to whole tokens."""
    return last(self.flat_N, self.start_V, tokens, num)

  def reader(self, table_SX: np.ndarray) -> 'Reader':
    """Returns an automaton with these tokens, as arrays for devices.

    Args:
      table_SX: next state of the automaton, by state and byte.
    """
    return Reader(table_SX=table_SX, flat_N=self.flat_N, start_V=self.start_V)


def follow(table_SX: np.ndarray, state: int, text: bytes) -> int:
  """Returns the state of an automaton after the bytes of `text`."""
  for byte in text:
    state = int(table_SX[state, byte])
  return state


def is_text(word: str) -> bool:
  """Whether a string is valid Unicode, without replacement characters."""
  return not re.search('[\ud800-\udfff\ufffd]', word)


def last(
  flat_N: np.ndarray, start_V: np.ndarray, tokens: Sequence[int], num: int
) -> bytes:
  """Returns the last bytes of tokens; see `TokenBytes.last`.

  Args:
    flat_N: bytes of all tokens, concatenated.
    start_V: start of each token in `flat_N`, and the end of the last.
    tokens: token ids.
    num: least number of bytes, if there are so many.
  """
  pieces, size = [], 0
  for token in reversed(tokens):
    if size >= num:
      break
    pieces.append(flat_N[start_V[token] : start_V[token + 1]].tobytes())
    size += len(pieces[-1])
  return b''.join(reversed(pieces))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
  """An automaton that follows sequences on devices, byte by byte.

  Attributes:
    table_SX: next state, by state and byte.
    flat_N: bytes of all tokens, concatenated.
    start_V: start of each token in `flat_N`, and the end of the last.
  """

  table_SX: Any
  flat_N: Any
  start_V: Any

  def after(self, state_B: jax.Array, token_B: jax.Array) -> jax.Array:
    """Returns the states after one more token; B may be any dimensions."""
    table_SX, flat_N, start_V = map(
      jnp.asarray, (self.table_SX, self.flat_N, self.start_V)
    )
    start_B = start_V[token_B]
    length_B = start_V[token_B + 1] - start_B

    def advance(place: jax.Array, state_B: jax.Array) -> jax.Array:
      byte_B = flat_N[start_B + jnp.minimum(place, length_B)]
      new_B = table_SX[state_B, byte_B].astype(state_B.dtype)
      return jnp.where(place < length_B, new_B, state_B)

    return jax.lax.fori_loop(0, length_B.max(), advance, state_B)
