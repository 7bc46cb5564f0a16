"""How vocabularies write spaces and bytes as letters."""

import codecs
from collections.abc import Sequence
import re

import numpy as np

SPACE = '\u2581'  # Stands for a space inside of SentencePiece.
_EACH = 't2x_each_byte'


def byte_marks(
  special_V: np.ndarray, tokens: Sequence[bytes]
) -> dict[str, np.ndarray]:
  """Returns the marks of tokens of one byte: blanks stand between words."""
  among = lambda found: np.array([t != b'' and t in found for t in tokens])
  return {
    'begins_V': special_V,
    'breaks_V': special_V | among(b' \t\r\n'),
    'ends_V': among(b'.!?\n'),
  }


def byte_letters() -> list[str]:
  """Returns the letter that stands for each byte (Radford et al., 2019)."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = iter(range(256, 512))
  return [chr(b if b in plain else next(others)) for b in range(256)]


def is_byte(piece: str) -> bool:
  """Returns whether a piece of SentencePiece has the form of a byte."""
  return re.fullmatch('<0x[0-9A-Fa-f]{2}>', piece) is not None


def piece_bytes(piece: str) -> bytes:
  """Returns what a piece of SentencePiece adds to a text."""
  if is_byte(piece):
    return bytes([int(piece[3:5], 16)])
  return piece.replace(SPACE, ' ').encode()


def decode(data: bytes) -> str:
  """Returns UTF-8 as SentencePiece reads it: each byte that is none is U+FFFD.

  >>> [len(text) for text in (decode(b'\\xe6\\xbc'), decode(b'ab'))]
  [2, 2]
  """
  return data.decode(errors=_EACH)


def _each_byte(error: UnicodeError) -> tuple[str, int]:
  assert isinstance(error, UnicodeDecodeError)
  return '\ufffd' * (error.end - error.start), error.end


codecs.register_error(_EACH, _each_byte)
