"""The letters by which vocabularies write spaces and bytes."""

import codecs
from collections.abc import Sequence
import re

import numpy as np

SPACE = '\u2581'  # Stands for a space in SentencePiece's pieces.
_EACH = 't2x_each_byte'


def byte_marks(
  special_V: np.ndarray, tokens: Sequence[bytes]
) -> dict[str, np.ndarray]:
  """Returns the marks of a vocabulary of single bytes; blanks separate words.

  Args:
    special_V: whether each id is special.
    tokens: byte of each id, nothing for special ids.

  Returns:
    The fields of `objectives.lexicon.Lexicon` of these names.
  """
  among = lambda found: np.array([t != b'' and t in found for t in tokens])
  return {
    'begins_V': special_V,
    'breaks_V': special_V | among(b' \t\r\n'),
    'ends_V': among(b'.!?\n'),
  }


def byte_letters() -> list[str]:
  """Returns the letter of each byte in GPT-2's BPE (Radford et al., 2019)."""
  plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = iter(range(256, 512))
  return [chr(b if b in plain else next(others)) for b in range(256)]


def is_byte(piece: str) -> bool:
  """Returns whether a SentencePiece piece stands for a byte, as <0x0A> does."""
  return re.fullmatch('<0x[0-9A-Fa-f]{2}>', piece) is not None


def piece_bytes(piece: str) -> bytes:
  """Returns the UTF-8 bytes of a SentencePiece piece in a decoded text."""
  if is_byte(piece):
    return bytes([int(piece[3:5], 16)])
  return piece.replace(SPACE, ' ').encode()


def decode(data: bytes) -> str:
  """Decodes UTF-8 as SentencePiece does: each invalid byte becomes U+FFFD.

  >>> [len(text) for text in (decode(b'\\xe6\\xbc'), decode(b'ab'))]
  [2, 2]
  """
  return data.decode(errors=_EACH)


def _each_byte(error: UnicodeError) -> tuple[str, int]:
  assert isinstance(error, UnicodeDecodeError)
  return '\ufffd' * (error.end - error.start), error.end


codecs.register_error(_EACH, _each_byte)
