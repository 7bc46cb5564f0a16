"""What encodes and decodes: `tokenizers`, or `sentencepiece`."""

import json
import re
from typing import Any
from typing import NamedTuple

import sentencepiece

from t2x.data import letters

_BYTE_OF = {letter: i for i, letter in enumerate(letters.byte_letters())}


class Whole(NamedTuple):
  """A text or a pair of texts as a model reads it.

  Attributes:
    ids: of its tokens, special ones included.
    types: 0 for tokens of the first text, 1 for those of the second.
    spans: where each token begins and ends in its text, in characters.
    is_text: False for special tokens.
  """

  ids: list[int]
  types: list[int]
  spans: list[tuple[int, int]]
  is_text: list[bool]


class Fast:
  """A tokenizer of the library `tokenizers`."""

  def __init__(self, tokenizer: Any, *, splits: bool, is_filed: bool = False):
    """`splits` says whether texts name special tokens as any other text."""
    self.library_form = tokenizer
    self.is_filed = is_filed  # Whether a tokenizer.json holds all of it.
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
    # As t2x writes its own: a text is the bytes of its tokens.
    self._is_joined = has_bytes and splits
    # Of others one byte that is wrong breaks all those beside it.
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
      # An added token is text, and not the letters that stand for its bytes.
      if all(letter in _BYTE_OF for letter in piece):
        return bytes(_BYTE_OF[letter] for letter in piece)
      return piece.encode()
    if self._is_joined or i in self.run_ids:
      return letters.piece_bytes(piece)
    # Beside others, as a decoder may clean up and drop the first space.
    text = self._tokenizer.decode([*self._beside, i])
    return text[len(self._text_beside) :].encode()

  def begins(self, piece: str) -> bool:
    if self._continues:
      return not piece.startswith('##')
    return piece.startswith(self._space)

  def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns what stands before and after a text, as the template says."""
    plain = self._tokenizer.encode('a', add_special_tokens=False).ids
    whole = self._tokenizer.encode('a').ids
    for start in range(len(whole) - len(plain) + 1):
      if whole[start : start + len(plain)] == plain:
        return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()

  def encode(self, texts: list[str]) -> list[list[int]]:
    found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in found]

  def encode_whole(self, texts: list[Any], length: int) -> list[Whole]:
    """Returns texts and pairs as a model reads them; the longer one is cut."""
    self._tokenizer.enable_truncation(length)
    try:
      found = self._tokenizer.encode_batch(texts)
    finally:
      self._tokenizer.no_truncation()
    return [
      Whole(
        e.ids, e.type_ids, e.offsets, [not s for s in e.special_tokens_mask]
      )
      for e in found
    ]

  def decode(self, ids: list[int]) -> str:
    if not self._is_joined:
      return self._tokenizer.decode(ids)
    data = b''.join(map(self.bytes_of, ids))
    return letters.decode(data)


class Pieces:
  """A SentencePiece model; T5 adds its sentinels behind the vocabulary."""

  run_ids = frozenset()  # Of bytes, whole characters are text.
  is_bytes_alone = False
  is_filed = True

  def __init__(self, model: bytes, num_extra: int, settings: dict[str, Any]):
    self.model = model
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if not model:
      raise RuntimeError('it is empty')
    own = self._processor.vocab_size()
    self.size = own + num_extra
    # The last id is <extra_id_0>.
    self._extra = {
      f'<extra_id_{i}>': self.size - 1 - i for i in range(num_extra)
    }
    named = {
      self._processor.id_to_piece(i): i
      for i in range(own)
      if self._processor.is_control(i) or self._processor.is_unknown(i)
    }
    self.named = named | self._extra
    self.special = set(self.named.values())
    self.added = set(self._extra.values())
    bos, eos = self._processor.bos_id(), self._processor.eos_id()
    # Llama begins a text with a token of its own; T5 has none and ends it.
    begins = settings.get('add_bos_token', bos >= 0)
    ends = settings.get('add_eos_token', bos < 0)
    self._around = (bos,) if begins else (), (eos,) if ends else ()
    found = sorted(self.named, key=len, reverse=True)
    self._pattern = re.compile(f'({"|".join(map(re.escape, found))})')

  def id_of(self, name: str) -> int | None:
    if name in self._extra:
      return self._extra[name]
    i = self._processor.piece_to_id(name)
    return i if self._processor.id_to_piece(i) == name else None

  def piece(self, i: int) -> str:
    own = self._processor.vocab_size()
    return self._processor.id_to_piece(i) if i < own else ''

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
