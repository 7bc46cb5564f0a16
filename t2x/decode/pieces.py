"""What tokens add to a text, as looking for words in texts needs it.

Shape suffixes: B texts, S states, X values of a byte, N bytes, V vocabulary.
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


class Pieces:
  """The bytes of every token of a vocabulary.

  >>> pieces = Pieces([b'', b'he', b'hello', b'lo'])
  >>> pieces.beginning(b'he').tolist(), pieces.holding(b'lo').tolist()
  ([1, 2], [2, 3])
  """

  def __init__(self, token_bytes: Sequence[bytes]):
    """Sorts them; `token_bytes` has one entry a token, empty if special."""
    self.token_bytes = tuple(token_bytes)
    self.start_V = np.cumsum([0, *map(len, token_bytes)], dtype=np.int32)
    self._joined = b''.join(token_bytes)
    # Never empty, so that it can be looked up in.
    self.flat_N = np.frombuffer(self._joined + b'\0', np.uint8)

  @functools.cached_property
  def _order(self) -> tuple[np.ndarray, list[bytes]]:
    size = len(self.token_bytes)
    order_V = sorted(range(size), key=self.token_bytes.__getitem__)
    return np.array(order_V, int), [self.token_bytes[i] for i in order_V]

  def beginning(self, text: bytes) -> np.ndarray:
    """Returns the tokens that begin with some bytes."""
    order_V, ranked = self._order
    low = bisect.bisect_left(ranked, text)
    cut = lambda piece: piece[: len(text)]
    return order_V[low : bisect.bisect_right(ranked, text, low, key=cut)]

  def holding(self, text: bytes) -> np.ndarray:
    """Returns the tokens that hold some bytes."""
    overlapping = re.finditer(b'(?=' + re.escape(text) + b')', self._joined)
    at = np.array([found.start() for found in overlapping], int)
    token = np.searchsorted(self.start_V, at, side='right') - 1
    return np.unique(token[at + len(text) <= self.start_V[token + 1]])

  def last(self, tokens: Sequence[int], num: int) -> bytes:
    """Returns what tokens end with: `num` bytes, or a token's more."""
    return last(self.flat_N, self.start_V, tokens, num)

  def reader(self, table_SX: np.ndarray) -> 'Reader':
    """Returns what follows texts of these tokens on the devices."""
    return Reader(table_SX=table_SX, flat_N=self.flat_N, start_V=self.start_V)


def follow(table_SX: np.ndarray, state: int, text: bytes) -> int:
  """Returns the state of an automaton after some bytes more."""
  for byte in text:
    state = int(table_SX[state, byte])
  return state


def is_text(word: str) -> bool:
  """Whether a word is Unicode, without the sign for what is broken."""
  return not re.search('[\ud800-\udfff\ufffd]', word)


def last(
  flat_N: np.ndarray, start_V: np.ndarray, tokens: Sequence[int], num: int
) -> bytes:
  """As `Pieces.last`, of its arrays."""
  found, size = [], 0
  for token in reversed(tokens):
    if size >= num:
      break
    found.append(flat_N[start_V[token] : start_V[token + 1]].tobytes())
    size += len(found[-1])
  return b''.join(reversed(found))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
  """Follows texts on the devices, byte by byte.

  Attributes:
    table_SX: the state after a byte.
    flat_N: the bytes of all tokens.
    start_V: where each token's begin; one more for the end of the last.
  """

  table_SX: Any
  flat_N: Any
  start_V: Any

  def after(self, state_B: jax.Array, token_B: jax.Array) -> jax.Array:
    """Returns the states of texts after one more token; B of any dims."""
    table_SX, flat_N, start_V = map(
      jnp.asarray, (self.table_SX, self.flat_N, self.start_V)
    )
    start_B = start_V[token_B]
    length_B = start_V[token_B + 1] - start_B

    def read(place, state_B):
      byte_B = flat_N[start_B + jnp.minimum(place, length_B)]
      new_B = table_SX[state_B, byte_B].astype(state_B.dtype)
      return jnp.where(place < length_B, new_B, state_B)

    return jax.lax.fori_loop(0, length_B.max(), read, state_B)
