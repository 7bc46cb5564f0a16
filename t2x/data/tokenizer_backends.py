"""Backends of pretrained tokenizers: `tokenizers` and `sentencepiece`."""

from collections.abc import Sequence
import json
import re
from typing import Any
from typing import NamedTuple

import sentencepiece

from t2x.data import letters

_BYTE_OF = {letter: i for i, letter in enumerate(letters.byte_letters())}


class Whole(NamedTuple):
  """A text or a pair of texts, encoded with its special tokens.

  Attributes:
    ids: token ids, special ones included.
    types: token types, 0 in the first text and 1 in the second.
    spans: start and end of each token in its text, in characters.
    is_text: whether each token is part of a text, and not special.
  """

  ids: list[int]
  types: list[int]
  spans: list[tuple[int, int]]
  is_text: list[bool]


class Backend:
  """The interface of a library's tokenizer.

  Attributes:
    size: number of ids.
    special: ids of special tokens.
    added: ids of tokens that were added to the vocabulary.
    run_ids: ids of bytes that decode by whole runs only.
    is_bytes_alone: whether every token of text is one byte.
    is_filed: whether the files alone hold every setting of the tokenizer.
  """

  size: int
  special: set[int]
  added: set[int]
  run_ids: frozenset[int] = frozenset()
  is_bytes_alone: bool = False
  is_filed: bool = False

  def id_of(self, name: str) -> int | None:
    """Returns the id of a token; None if the vocabulary lacks it."""
    raise NotImplementedError

  def piece(self, i: int) -> str:
    """Returns the piece of an id, as the vocabulary writes it; '' for a gap."""
    raise NotImplementedError

  def bytes_of(self, i: int) -> bytes:
    """Returns the UTF-8 bytes of an id in a decoded text."""
    raise NotImplementedError

  def begins(self, piece: str) -> bool:
    """Returns whether a piece begins a word."""
    raise NotImplementedError

  def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids that the library puts before and after a text."""
    raise NotImplementedError

  def encode(self, texts: list[str]) -> list[list[int]]:
    """Returns the ids of each text, without special tokens around it."""
    raise NotImplementedError

  def decode(self, ids: list[int]) -> str:
    """Returns the text of ids, none of which is special."""
    raise NotImplementedError


class Fast(Backend):
  """A tokenizer of the library `tokenizers`.

  Attributes:
    library_form: the `tokenizers.Tokenizer`.
  """

  def __init__(self, tokenizer: Any, *, splits: bool, is_filed: bool = False):
    """Wraps a tokenizer.

    Args:
      tokenizer: the `tokenizers.Tokenizer`.
      splits: whether names of special tokens in a text are ordinary text.
      is_filed: whether a tokenizer.json holds every setting of it.
    """
    self.library_form = tokenizer
    self.is_filed = is_filed
    self._tokenizer = tokenizer
    pieces = tokenizer.get_vocab()
    # Ids may have gaps, such as an empty line of vocab.txt.
    self.size = max(pieces.values()) + 1
    added = tokenizer.get_added_tokens_decoder()
    self.special = {i for i, token in added.items() if token.special}
    self.added = set(added)
    parts = json.loads(tokenizer.to_str())
    self._continues = parts['model'].get('type') == 'WordPiece'
    decoder = json.dumps(parts.get('decoder'))
    self._is_bytes = '"ByteLevel"' in decoder
    self.is_bytes_alone = self._is_bytes and not parts['model'].get('merges')
    has_bytes = '"ByteFallback"' in decoder
    # As in the files that t2x writes: a text is the bytes of its tokens.
    self._is_joined = has_bytes and splits
    # In other files one invalid byte makes the whole run of bytes invalid.
    runs = has_bytes and not self._is_joined
    self._beside = tokenizer.encode('a', add_special_tokens=False).ids
    self._text_beside = tokenizer.decode(self._beside)
    self.run_ids = frozenset(
      i for piece, i in pieces.items() if runs and letters.is_byte(piece)
    )
    self._space = '\u0120' if self._is_bytes else letters.SPACE
    self._space = ' ' if self._is_joined else self._space

  def id_of(self, name: str) -> int | None:
    return self._tokenizer.token_to_id(name)

  def piece(self, i: int) -> str:
    return self._tokenizer.id_to_token(i) or ''

  def bytes_of(self, i: int) -> bytes:
    piece = self.piece(i)
    if self._is_bytes:
      # An added token is plain text, not letters that stand for bytes.
      if all(letter in _BYTE_OF for letter in piece):
        return bytes(_BYTE_OF[letter] for letter in piece)
      return piece.encode()
    if self._is_joined or i in self.run_ids:
      return letters.piece_bytes(piece)
    # Decoded after other ids, since a decoder may drop the first space.
    text = self._tokenizer.decode([*self._beside, i])
    return text[len(self._text_beside) :].encode()

  def begins(self, piece: str) -> bool:
    if self._continues:
      return not piece.startswith('##')
    return piece.startswith(self._space)

  def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    plain = self._tokenizer.encode('a', add_special_tokens=False).ids
    whole = self._tokenizer.encode('a').ids
    for start in range(len(whole) - len(plain) + 1):
      if whole[start : start + len(plain)] == plain:
        return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()

  def encode(self, texts: list[str]) -> list[list[int]]:
    encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in encodings]

  def encode_whole(
    self, texts: Sequence[str | tuple[str, str]], length: int
  ) -> list[Whole]:
    """Returns texts or pairs of texts, encoded with their special tokens.

    Args:
      texts: single texts, or pairs of texts that a model reads together.
      length: largest number of tokens, special ones included; the longer text
        of a pair is cut.
    """
    self._tokenizer.enable_truncation(length)
    try:
      encodings = self._tokenizer.encode_batch(list(texts))
    finally:
      self._tokenizer.no_truncation()
    return [
      Whole(
        e.ids, e.type_ids, e.offsets, [not s for s in e.special_tokens_mask]
      )
      for e in encodings
    ]

  def decode(self, ids: list[int]) -> str:
    if not self._is_joined:
      return self._tokenizer.decode(ids)
    data = b''.join(map(self.bytes_of, ids))
    return letters.decode(data)


class SentencePieceBackend(Backend):
  """A SentencePiece model; T5 adds its sentinels after the vocabulary.

  Attributes:
    model: the serialised SentencePiece model.
    named: ids of the special tokens, by their names.
  """

  is_filed = True

  def __init__(self, model: bytes, num_extra: int, settings: dict[str, Any]):
    """Loads a model.

    Args:
      model: the serialised SentencePiece model.
      num_extra: number of sentinels after its vocabulary.
      settings: the settings in tokenizer_config.json.

    Raises:
      RuntimeError: if the model is empty or damaged.
    """
    self.model = model
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if not model:
      raise RuntimeError('it is empty')
    num_pieces = self._processor.vocab_size()
    self.size = num_pieces + num_extra
    # The last id is <extra_id_0>.
    self._extra = {
      f'<extra_id_{i}>': self.size - 1 - i for i in range(num_extra)
    }
    named = {
      self._processor.id_to_piece(i): i
      for i in range(num_pieces)
      if self._processor.is_control(i) or self._processor.is_unknown(i)
    }
    self.named = named | self._extra
    self.special = set(self.named.values())
    self.added = set(self._extra.values())
    bos, eos = self._processor.bos_id(), self._processor.eos_id()
    # Llama begins a text with its bos token; T5 has none and ends a text.
    begins = settings.get('add_bos_token', bos >= 0)
    ends = settings.get('add_eos_token', bos < 0)
    self._around = (bos,) if begins else (), (eos,) if ends else ()
    names = sorted(self.named, key=len, reverse=True)
    self._pattern = re.compile(f'({"|".join(map(re.escape, names))})')

  def id_of(self, name: str) -> int | None:
    if name in self._extra:
      return self._extra[name]
    i = self._processor.piece_to_id(name)
    return i if self._processor.id_to_piece(i) == name else None

  def piece(self, i: int) -> str:
    num_pieces = self._processor.vocab_size()
    return self._processor.id_to_piece(i) if i < num_pieces else ''

  def bytes_of(self, i: int) -> bytes:
    return letters.piece_bytes(self.piece(i))

  def begins(self, piece: str) -> bool:
    return piece.startswith(letters.SPACE)

  def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return self._around

  def encode(self, texts: list[str]) -> list[list[int]]:
    return [self._encode(text) for text in texts]

  def _encode(self, text: str) -> list[int]:
    parts = self._pattern.split(text)
    ids = self._processor.encode(parts[0])
    for name, part in zip(parts[1::2], parts[2::2]):
      ids += [self.named[name], *self._processor.encode(part)]
    return ids

  def decode(self, ids: list[int]) -> str:
    return self._processor.decode(ids)
