"""Text to ids and back: SentencePiece BPE, plain bytes, or one of others.

The first two give back the text that they were given, whitespace included, and
share their special ids (see `objectives.vocab`).
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
  """Byte-pair encoding with byte fallback (Kudo and Richardson, 2018)."""

  vocab_size: int = 8192
  num_sentinels: int = 100

  kind: ClassVar[str] = 'sentencepiece'

  def __post_init__(self):
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
  """One id a UTF-8 byte (ByT5, Xue et al., 2022)."""

  num_sentinels: int = 100

  kind: ClassVar[str] = 'bytes'

  def __post_init__(self):
    field_checks.least(self, 'data.tokenizer.', num_sentinels=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pretrained:
  """The tokenizer of a checkpoint of others; see `t2x.data.pretrained`.

  Attributes:
    directory: with its files, as Hugging Face keeps them.
    start: the token that an encoder-decoder's targets go on from; None for
      T5's, the id 0.
  """

  directory: str = ''
  start: int | None = None

  kind: ClassVar[str] = 'pretrained'


Config = SentencePiece | Bytes | Pretrained

FILES = 'files'  # Where `save` puts those of others.


class Tokenizer:
  """What all tokenizers share.

  Attributes:
    config: the settings it was made with.
    vocab: its size and special ids.
  """

  pad_id: int = vocab_lib.PAD
  eos_id: int = vocab_lib.EOS
  bos_id: int = vocab_lib.BOS
  mask_id: int | None = vocab_lib.MASK
  # What stands before and after a text that a model reads.
  prefix_ids: tuple[int, ...] = (vocab_lib.BOS,)
  suffix_ids: tuple[int, ...] = (vocab_lib.EOS,)

  # Bytes that are text, or broken, by whole runs of them.
  run_ids: frozenset[int] = frozenset()

  config: Config
  vocab: vocab_lib.Vocab

  @property
  def vocab_size(self) -> int:
    return self.vocab.size

  @property
  def sentinel_ids(self) -> tuple[int, ...]:
    return self.vocab.sentinel_ids

  @property
  def fingerprint(self) -> str:
    """A hash of everything that decides which ids a text gets."""
    raise NotImplementedError

  def marks(self) -> dict[str, np.ndarray]:
    """Returns which ids begin a word, are words of their own, end a sentence.

    As the fields of `objectives.lexicon.Lexicon` of these names.
    """
    raise NotImplementedError

  def encode(self, text: str) -> list[int]:
    """Returns the ids of `text`, without a start or an end."""
    return self.encode_batch([text])[0]

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text."""
    raise NotImplementedError

  def shown(self, ids: Iterable[int]) -> list[int]:
    """Returns those of `ids` that have text: none special or out of range."""
    raise NotImplementedError

  def decode(self, ids: Iterable[int]) -> str:
    """Returns the text of `ids`, which is that of `shown`."""
    raise NotImplementedError

  def token_bytes(self) -> list[bytes]:
    """Returns what each id adds to a text, in UTF-8; nothing if special."""
    raise NotImplementedError

  def encode_marked(self, text: str) -> list[int]:
    """Returns the ids of `text`, where <extra_id_N> is the N-th sentinel.

    Raises:
      ValueError: there is no such sentinel.
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
    """Inverse of `encode_marked`, but for spaces that a tokenizer drops."""
    parts, before, sentinels = [], [], self.sentinel_ids
    for is_mark, run in itertools.groupby(ids, lambda i: i in sentinels):
      if is_mark:
        parts += [f'<extra_id_{sentinels.index(i)}>' for i in run]
      else:
        parts.append(self.decode([*before, *run])[len(self.decode(before)) :])
      before = self.encode('a')  # Alone, a run may lose its first space.
    return ''.join(parts)

  def save(self, directory: epath.PathLike) -> None:
    """Writes the tokenizer to a directory, which may be remote."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    settings = {'kind': self.config.kind, **dataclasses.asdict(self.config)}
    (directory / 'tokenizer.json').write_text(json.dumps(settings))


class BytesTokenizer(Tokenizer):
  """Ids of UTF-8 bytes.

  >>> tokenizer = BytesTokenizer(Bytes())
  >>> tokenizer.encode('hi'), tokenizer.decode([3, 209, 210, 1])
  ([209, 210], 'hi')
  """

  def __init__(self, config: Bytes):
    self.config: Bytes = config
    self._first = vocab_lib.NUM_NAMED + config.num_sentinels
    self.vocab = vocab_lib.Vocab(
      size=self._first + 256, num_sentinels=config.num_sentinels
    )

  @property
  def fingerprint(self) -> str:
    return f'bytes-{self.config.num_sentinels}'

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
  """A trained SentencePiece model."""

  def __init__(self, config: SentencePiece, model: bytes):
    self.config = config
    self._model = model
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    self.vocab = vocab_lib.Vocab(
      size=self._processor.vocab_size(), num_sentinels=config.num_sentinels
    )
    # Piece by piece this character would come back as a space.
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
