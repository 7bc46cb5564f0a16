"""Tokenizers and their settings: SentencePiece BPE, bytes, or pretrained.

Decoding with the first two gives back exactly the text that was encoded,
whitespace included. They share their special ids (see `objectives.vocab`).
"""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import hashlib
import itertools
import json
import re
from typing import ClassVar

from etils import epath
import numpy as np
import sentencepiece

from t2x import field_checks
from t2x.data import letters
from t2x.objectives import vocab as vocab_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePiece:
  """Byte-pair encoding with byte fallback (Kudo and Richardson, 2018).

  Attributes:
    vocab_size: number of ids, special ones included.
    num_sentinels: number of the sentinels <extra_id_0>, <extra_id_1>, ...
  """

  vocab_size: int = 8192
  num_sentinels: int = 100

  kind: ClassVar[str] = 'sentencepiece'

  def __post_init__(self) -> None:
    field_checks.least(self, 'data.tokenizer.', num_sentinels=0)
    smallest = vocab_lib.NUM_NAMED + self.num_sentinels + 256
    if self.vocab_size <= smallest:
      raise ValueError(
        f'data.tokenizer.vocab_size={self.vocab_size} must be more than '
        f'{smallest}: {vocab_lib.NUM_NAMED} special tokens, '
        f'{self.num_sentinels} sentinels and 256 bytes. Raise it, or use the '
        'tokenizer of kind "bytes".'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bytes:
  """One id for each UTF-8 byte (ByT5, Xue et al., 2022).

  Attributes:
    num_sentinels: number of the sentinels <extra_id_0>, <extra_id_1>, ...
  """

  num_sentinels: int = 100

  kind: ClassVar[str] = 'bytes'

  def __post_init__(self) -> None:
    field_checks.least(self, 'data.tokenizer.', num_sentinels=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
  """The tokenizer of a pretrained checkpoint; see `t2x.data.pretrained`.

  Attributes:
    directory: directory of its files, in Hugging Face's form.
    start: id of the first decoder input of an encoder-decoder; None for T5's,
      which is 0.
  """

  directory: str = ''
  start: int | None = None

  kind: ClassVar[str] = 'pretrained'


Config = SentencePiece | Bytes | Pretrained

FILES = 'files'  # Folder in which `save` puts a pretrained tokenizer's files.


class Tokenizer:
  """The interface of a tokenizer.

  Attributes:
    config: the tokenizer's settings.
    vocab: size of the vocabulary, and its special ids.
    pad_id: id of padding.
    eos_id: id of the token that ends a text.
    bos_id: id of the token that begins a text.
    mask_id: id of the mask token; None if there is none.
    prefix_ids: ids before a text, as a model reads it.
    suffix_ids: ids after a text.
    run_ids: ids of bytes that decode by whole runs only: one invalid byte makes
      the run invalid.
  """

  pad_id: int = vocab_lib.PAD
  eos_id: int = vocab_lib.EOS
  bos_id: int = vocab_lib.BOS
  mask_id: int | None = vocab_lib.MASK
  prefix_ids: tuple[int, ...] = (vocab_lib.BOS,)
  suffix_ids: tuple[int, ...] = (vocab_lib.EOS,)
  run_ids: frozenset[int] = frozenset()

  config: Config
  vocab: vocab_lib.Vocab

  @property
  def vocab_size(self) -> int:
    """Number of ids."""
    return self.vocab.size

  @property
  def sentinel_ids(self) -> tuple[int, ...]:
    """Ids of <extra_id_0>, <extra_id_1>, ..."""
    return self.vocab.sentinel_ids

  @property
  def fingerprint(self) -> str:
    """A hash of everything that decides which ids a text gets."""
    raise NotImplementedError

  def marks(self) -> dict[str, np.ndarray]:
    """Returns masks of the ids that begin a word, are one, or end a sentence.

    They are the fields `begins_V`, `breaks_V` and `ends_V` of
    `objectives.lexicon.Lexicon`.
    """
    raise NotImplementedError

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without special tokens around it."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text, without special tokens around it."""
    raise NotImplementedError

  def shown(self, ids: Iterable[int]) -> list[int]:
    """Returns the ids that stand for text: none special or out of range."""
    raise NotImplementedError

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of ids; ids that `shown` leaves out add nothing."""
    raise NotImplementedError

  def token_bytes(self) -> list[bytes]:
    """Returns the UTF-8 bytes of each id in a text, none if it is special."""
    raise NotImplementedError

  def encode_marked(self, text: str) -> list[int]:
    """Returns the ids of a text, in which <extra_id_N> is the N-th sentinel.

    Raises:
      ValueError: if there is no such sentinel.
    """
    first, *rest = re.split('<extra_id_(0|[1-9][0-9]*)>', text)
    marks = {str(number): i for number, i in enumerate(self.sentinel_ids)}
    ids = self.encode(first)
    for number, part in zip(rest[0::2], rest[1::2]):
      if number not in marks:
        raise ValueError(
          f'<extra_id_{number:.20}>: the tokenizer has {len(marks)} '
          'sentinels, counted from 0. Name one of these, or train with more: '
          'data.tokenizer.num_sentinels.'
        )
      ids += [marks[number], *self.encode(part)]
    return ids

  def decode_marked(self, ids: Iterable[int]) -> str:
    """Returns the text of ids, with sentinels as <extra_id_N>.

    The inverse of `encode_marked`, except for spaces that a tokenizer drops.
    """
    parts, before, sentinels = [], [], self.sentinel_ids
    for is_mark, run in itertools.groupby(ids, lambda i: i in sentinels):
      if is_mark:
        parts += [f'<extra_id_{sentinels.index(i)}>' for i in run]
      else:
        parts.append(self.decode([*before, *run])[len(self.decode(before)) :])
      before = self.encode('a')  # Alone, a run could lose its first space.
    return ''.join(parts)

  def save(self, directory: epath.PathLike) -> None:
    """Writes the tokenizer to a directory, which may be remote."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings = {'kind': self.config.kind, **dataclasses.asdict(self.config)}
    (directory / 'tokenizer.json').write_text(json.dumps(settings))


class BytesTokenizer(Tokenizer):
  """A tokenizer with one id for each UTF-8 byte.

  >>> tokenizer = BytesTokenizer(Bytes())
  >>> tokenizer.encode('hi'), tokenizer.decode([3, 209, 210, 1])
  ([209, 210], 'hi')
  """

  def __init__(self, config: Bytes):
    self.config = config
    self._num_sentinels = config.num_sentinels
    self._first = vocab_lib.NUM_NAMED + config.num_sentinels
    self.vocab = vocab_lib.Vocab(
      size=self._first + 256, num_sentinels=config.num_sentinels
    )

  @property
  def fingerprint(self) -> str:
    return f'bytes-{self._num_sentinels}'

  def marks(self) -> dict[str, np.ndarray]:
    special_V = np.arange(self.vocab.size) < self._first
    return letters.byte_marks(special_V, self.token_bytes())

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return [[b + self._first for b in t.encode()] for t in texts]

  def shown(self, ids: Iterable[int]) -> list[int]:
    return [int(i) for i in ids if self._first <= i < self._first + 256]

  def decode(self, ids: Iterable[int]) -> str:
    data = bytes(i - self._first for i in self.shown(ids))
    return data.decode(errors='replace')

  def token_bytes(self) -> list[bytes]:
    return [b''] * self._first + [bytes([b]) for b in range(256)]


class SentencePieceTokenizer(Tokenizer):
  """A tokenizer with a trained SentencePiece model.

  Args:
    config: the tokenizer's settings.
    model: the serialised SentencePiece model.
  """

  def __init__(self, config: SentencePiece, model: bytes):
    self.config = config
    self._model = model
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    self.vocab = vocab_lib.Vocab(
      size=self._processor.vocab_size(), num_sentinels=config.num_sentinels
    )
    # As a piece, this character would be decoded to a space.
    self._space_ids = [
      self.vocab.first_text_id + b for b in letters.SPACE.encode('utf-8')
    ]

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(self._model).hexdigest()[:16]

  def marks(self) -> dict[str, np.ndarray]:
    size, first = self.vocab.size, self.vocab.first_text_id
    pieces = self.pieces()
    is_special = np.arange(size) < first
    begins_V = np.array([piece.startswith(letters.SPACE) for piece in pieces])
    ends_V = np.array([piece.endswith(('.', '!', '?')) for piece in pieces])
    return {
      'begins_V': begins_V | is_special,
      'breaks_V': is_special,
      'ends_V': ends_V,
    }

  def pieces(self) -> list[str]:
    """Returns the piece of each id."""
    return [self._processor.id_to_piece(i) for i in range(self.vocab.size)]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    all_ids = self._processor.encode(list(texts), num_threads=2)
    for i, text in enumerate(texts):
      if letters.SPACE in text:
        all_ids[i] = self._encode_around_space(text)
    return all_ids

  def _encode_around_space(self, text: str) -> list[int]:
    first, *rest = self._processor.encode(text.split(letters.SPACE))
    return first + [i for ids in rest for i in self._space_ids + ids]

  def shown(self, ids: Iterable[int]) -> list[int]:
    first, size = self.vocab.first_text_id, self.vocab.size
    return [int(i) for i in ids if first <= i < size]

  def decode(self, ids: Iterable[int]) -> str:
    return self._processor.decode(self.shown(ids))

  def token_bytes(self) -> list[bytes]:
    first = self.vocab.first_text_id
    return [b''] * first + [
      letters.piece_bytes(p) for p in self.pieces()[first:]
    ]

  def save(self, directory: epath.PathLike) -> None:
    super().save(directory)
    (epath.Path(directory) / 'tokenizer.model').write_bytes(self._model)
