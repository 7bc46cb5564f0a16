"""Text to ids and back: SentencePiece BPE, plain bytes, or one of others.

The first two give back the text that they were given, whitespace included, and
share their special ids (see `objectives.vocab`).
"""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
import hashlib
import io
import itertools
import json
import re
from typing import ClassVar

from etils import epath
import numpy as np
import sentencepiece

from t2x import checks
from t2x.objectives import vocab as vocab_lib

_SAMPLE_BYTES = 5_000_000  # More text hardly changes 8k pieces.
_CHUNK = 2_000  # Characters; the trainer skips very long sentences.
_SPACE = '\u2581'  # Stands for a space inside of SentencePiece.


@dataclasses.dataclass(frozen=True, kw_only=True)
class SentencePiece:
  """Byte-pair encoding with byte fallback (Kudo and Richardson, 2018)."""

  vocab_size: int = 8192
  num_sentinels: int = 100

  kind: ClassVar[str] = 'sentencepiece'

  def __post_init__(self):
    checks.least(self, 'data.tokenizer.', num_sentinels=0)
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
    checks.least(self, 'data.tokenizer.', num_sentinels=0)


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
    first, *rest = re.split(r'<extra_id_(\d+)>', text)
    numbers, texts = map(int, rest[0::2]), rest[1::2]
    ids = self.encode(first)
    for number, part in zip(numbers, texts):
      if number >= len(self.sentinel_ids):
        raise ValueError(
          f'<extra_id_{number}>: the tokenizer has {len(self.sentinel_ids)} '
          'sentinels, counted from 0. Name one of these, or train with more: '
          'data.tokenizer.num_sentinels.'
        )
      ids += [self.sentinel_ids[number], *self.encode(part)]
    return ids

  def decode_marked(self, ids: Iterable[int]) -> str:
    """Inverse of `encode_marked`, but for spaces that a tokenizer drops."""
    sentinels = self.sentinel_ids
    parts = []
    for is_mark, run in itertools.groupby(ids, lambda i: i in sentinels):
      if is_mark:
        parts += [f'<extra_id_{sentinels.index(i)}>' for i in run]
      else:
        parts.append(self.decode(run))
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
    begins_V = np.zeros(self.vocab.size, bool)
    begins_V[: self._first] = True
    breaks_V = begins_V.copy()
    breaks_V[[self._first + b for b in b' \t\r\n']] = True
    ends_V = np.zeros_like(begins_V)
    ends_V[[self._first + b for b in b'.!?\n']] = True
    return {'begins_V': begins_V, 'breaks_V': breaks_V, 'ends_V': ends_V}

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
      self.vocab.first_text_id + b for b in _SPACE.encode('utf-8')
    ]

  @property
  def fingerprint(self) -> str:
    return hashlib.sha256(self._model).hexdigest()[:16]

  def marks(self) -> dict[str, np.ndarray]:
    size, first = self.vocab.size, self.vocab.first_text_id
    pieces = self.pieces()
    is_special = np.arange(size) < first
    begins_V = np.array([piece.startswith(_SPACE) for piece in pieces])
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
      if _SPACE in text:
        all_ids[i] = self._encode_around_space(text)
    return all_ids

  def _encode_around_space(self, text: str) -> list[int]:
    first, *rest = self._processor.encode(text.split(_SPACE))
    return first + [i for ids in rest for i in self._space_ids + ids]

  def shown(self, ids: Iterable[int]) -> list[int]:
    first, size = self.vocab.first_text_id, self.vocab.size
    return [int(i) for i in ids if first <= i < size]

  def decode(self, ids: Iterable[int]) -> str:
    return self._processor.decode(self.shown(ids))

  def token_bytes(self) -> list[bytes]:
    first = self.vocab.first_text_id
    return [b''] * first + [piece_bytes(p) for p in self.pieces()[first:]]

  def save(self, directory: epath.PathLike) -> None:
    super().save(directory)
    (epath.Path(directory) / 'tokenizer.model').write_bytes(self._model)


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
  return piece.replace(_SPACE, ' ').encode()


def load(directory: epath.PathLike) -> Tokenizer:
  """Returns the tokenizer that `save` wrote to `directory`."""
  path = epath.Path(directory) / 'tokenizer.json'
  if not path.exists():
    raise ValueError(
      f'No tokenizer in {directory}: {path.name} is missing. Give the '
      'directory that a tokenizer was saved to, such as that of a run.'
    )
  settings = json.loads(path.read_text())
  kind = settings.pop('kind')
  if kind == Bytes.kind:
    return BytesTokenizer(Bytes(**settings))
  if kind == Pretrained.kind:
    return read(Pretrained(**settings), path.parent / FILES)
  model = (path.parent / 'tokenizer.model').read_bytes()
  return SentencePieceTokenizer(SentencePiece(**settings), model)


def read(
  config: Pretrained, directory: epath.PathLike | None = None
) -> Tokenizer:
  """Returns the tokenizer of others that a directory holds.

  Args:
    config: its settings.
    directory: where its files are, if not where the settings say.

  Raises:
    ValueError: there is none, its library is not installed, or a file is
      damaged.
  """
  from t2x.data import pretrained  # It is made of what is above.

  if not (directory or config.directory):
    raise ValueError(
      'data.tokenizer.directory is empty: name the directory with the '
      "tokenizer's files."
    )
  return pretrained.PretrainedTokenizer(config, directory or config.directory)


def num_sentinels(config: Config) -> int | None:
  """Returns how many sentinels a tokenizer has; None if its files are gone.

  A run has a copy of its own.
  """
  if isinstance(config, Pretrained):
    if config.directory and not epath.Path(config.directory).exists():
      return None
    return len(read(config).sentinel_ids)
  return config.num_sentinels


def train(config: Config, texts: Iterable[str]) -> Tokenizer:
  """Returns a tokenizer fitted to the first few megabytes of `texts`.

  Raises:
    ValueError: if the texts do not support `vocab_size`; the message says what
      they do support.
  """
  if isinstance(config, Bytes):
    return BytesTokenizer(config)
  if isinstance(config, Pretrained):
    return read(config)
  model = io.BytesIO()
  control = [
    '<mask>',
    *(f'<extra_id_{i}>' for i in range(config.num_sentinels)),
  ]
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(list(_chunks(texts))),
      model_writer=model,
      model_type='bpe',
      vocab_size=config.vocab_size,
      byte_fallback=True,
      character_coverage=0.9995,
      required_chars=_SPACE,  # Else a text without blanks would lose them.
      pad_id=vocab_lib.PAD,
      eos_id=vocab_lib.EOS,
      unk_id=vocab_lib.UNK,
      bos_id=vocab_lib.BOS,
      control_symbols=control,  # Given the ids that follow, in this order.
      # Text must come back as it was, and so keeps all its whitespace.
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      max_sentence_length=16 * _CHUNK,
      num_threads=2,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise _explain(config, error) from error
  return SentencePieceTokenizer(config, model.getvalue())


def _chunks(texts: Iterable[str]) -> Iterable[str]:
  left = _SAMPLE_BYTES
  for text in texts:
    for start in range(0, len(text), _CHUNK):
      chunk = text[start : start + _CHUNK]
      left -= len(chunk.encode())
      if left < 0:
        return
      # The trainer would take it for a space, and its ids are those of bytes.
      yield from filter(None, chunk.split(_SPACE))


def _explain(config: SentencePiece, error: RuntimeError) -> ValueError:
  """Returns what SentencePiece meant."""
  given = f'data.tokenizer.vocab_size={config.vocab_size}'
  if re.search(r'sentences_.empty\(\)|all_chars_count', str(error)):
    return ValueError(
      'The training text holds nothing that a tokenizer of kind '
      '"sentencepiece" could be fitted to: line ends, NUL and U+2581 do not '
      'count. Give more text, or set data.tokenizer=bytes.'
    )
  if match := re.search(r'too high .*<= (\d+)', str(error)):
    return ValueError(
      f'{given} is more than this corpus supports, which is {match[1]}. '
      f'Set vocab_size to {match[1]} or less, or give more text.'
    )
  if match := re.search(r'required_chars. \d+ vs (\d+)', str(error)):
    return ValueError(
      f'{given} is too small for the characters of this corpus: it needs at '
      f'least {match[1]}. Raise vocab_size, or use the tokenizer of kind '
      '"bytes".'
    )
  problem = ' '.join(str(error).split())
  return ValueError(f'Cannot train a tokenizer with {given}: {problem}')
