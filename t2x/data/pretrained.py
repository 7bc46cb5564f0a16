"""Tokenizers of pretrained checkpoints, read from Hugging Face's files.

A directory holds tokenizer.json, or vocab.txt (WordPiece), or vocab.json with
merges.txt (byte-level BPE), or spiece.model or tokenizer.model (SentencePiece
unigram or BPE). The libraries `tokenizers` and `sentencepiece` read the files,
so that ids are exactly theirs.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import functools
import hashlib
import json
from typing import Any

from etils import epath
import numpy as np

from t2x import reading
from t2x.data import letters
from t2x.data import tokenizer_backends
from t2x.data import tokenizer_files
from t2x.data import tokenizers
from t2x.objectives import vocab as vocab_lib

_TEMPLATE = 'chat_template.jinja'
_ADDED = 'added_tokens.json'
FILES = (
  'tokenizer.json',
  'vocab.txt',
  'vocab.json',
  'merges.txt',
  *tokenizer_files.SENTENCEPIECE,
  tokenizer_files.SPECIAL_TOKENS,
  tokenizer_files.TOKENIZER_CONFIG,
  _ADDED,
  _TEMPLATE,
)
# Usual names of special tokens, for vocabularies whose files name none.
_USUAL = {
  'cls': ('[CLS]', '<cls>', '<s>'),
  'sep': ('[SEP]', '<sep>', '</s>'),
  'bos': ('<s>', '<|begin_of_text|>', '<|endoftext|>'),
  'eos': ('</s>', '<|end_of_text|>', '<|endoftext|>'),
  'pad': ('[PAD]', '<pad>'),
  'mask': ('[MASK]', '<mask>'),
  'unk': ('[UNK]', '<unk>'),
}


class PretrainedTokenizer(tokenizers.Tokenizer):
  """The tokenizer of a pretrained checkpoint.

  Names of special tokens in a text become special ids, unless `splits_names`.

  Attributes:
    root: directory of the tokenizer's files.
    prefix_ids: ids before a text, as the checkpoint's models read it.
    suffix_ids: ids after a text.
  """

  def __init__(self, config: tokenizers.Pretrained, directory: epath.PathLike):
    """Reads the files.

    Args:
      config: the tokenizer's settings.
      directory: directory of the files, whatever `config.directory` says.

    Raises:
      ValueError: if there are no files, one is damaged, or none names a token
        that ends a text.
    """
    self.config = config
    self.root = epath.Path(directory)
    self._names = _special_names(self.root)
    self._backend = tokenizer_files.read_backend(self.root, self._names)
    self._check_added()
    ids = {
      role: self._backend.id_of(name) for role, name in self._names.items()
    }
    first = lambda *roles: next(
      (ids[r] for r in roles if ids.get(r) is not None), None
    )
    bos, eos = first('bos', 'cls', 'eos'), first('eos', 'sep', 'bos')
    if bos is None or eos is None:
      raise ValueError(
        f'The tokenizer in {directory} has no token that ends a text. Name '
        f'one in its {tokenizer_files.TOKENIZER_CONFIG}, as in '
        '"eos_token": "</s>".'
      )
    pad = first('pad')
    self.bos_id, self.eos_id = bos, eos
    self.pad_id = eos if pad is None else pad
    self.mask_id = first('mask')
    self.prefix_ids, self.suffix_ids = self._around()
    sentinels = self._sentinels()
    named = {i for i in ids.values() if i is not None}
    self._special = named | self._backend.special | set(sentinels)
    self.run_ids = self._backend.run_ids
    self._added = self._special | self._backend.added
    self.vocab = vocab_lib.Vocab(
      size=self._backend.size,
      eos=eos,
      bos=bos,
      mask=self.mask_id,
      start=vocab_lib.PAD if config.start is None else config.start,
      sentinels=sentinels,
      special=tuple(sorted(self._special)),
    )

  def _check_added(self) -> None:
    """Raises a ValueError for added tokens that the other files do not have."""
    for name, i in tokenizer_files.read_json(self.root / _ADDED).items():
      if self._backend.id_of(name) != i:
        raise ValueError(
          f'{self.root / _ADDED} adds {name!r} as id {i}, and the other files '
          'do not say how. Write a tokenizer.json with transformers: '
          'AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).'
        )

  def _sentinels(self) -> tuple[int, ...]:
    """Returns the ids of <extra_id_0>, <extra_id_1>, ..."""
    most = self.settings.get(tokenizer_files.EXTRA)
    ids = []
    while (i := self._backend.id_of(f'<extra_id_{len(ids)}>')) is not None:
      if len(ids) == most:  # Any more are pieces of text.
        break
      ids.append(i)
    return tuple(ids)

  def learnt_past(self, size: int) -> list[int]:
    """Returns the ids of pieces past `size` that no file lists as added.

    Args:
      size: first id to look at, such as the rows of a checkpoint's table.
    """
    return [
      i
      for i in range(size, self.vocab_size)
      if self._backend.piece(i) and i not in self._added
    ]

  def _around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the ids that stand before and after a text."""
    asked = [self.settings.get(f'add_{role}_token') for role in ('bos', 'eos')]
    has_file = (self.root / 'tokenizer.json').exists()
    if has_file or not self.is_of_library or asked == [None, None]:
      return self._backend.around()
    # As in transformers: they count if no tokenizer.json has a template.
    ids = [
      self._backend.id_of(self._names[role]) if role in self._names else None
      for role in ('bos', 'eos')
    ]
    before, after = (
      (i,) if is_asked and i is not None else ()
      for i, is_asked in zip(ids, asked)
    )
    return before, after

  @functools.cached_property
  def settings(self) -> dict[str, Any]:
    """The settings in tokenizer_config.json."""
    return tokenizer_files.read_settings(self.root)

  @property
  def splits_names(self) -> bool:
    """Whether the names of special tokens in a text are ordinary text."""
    return bool(self.settings.get(tokenizer_files.SPLIT))

  @property
  def is_of_library(self) -> bool:
    """Whether the library `tokenizers` reads it, and not `sentencepiece`."""
    return isinstance(self._backend, tokenizer_backends.Fast)

  def library_form(self) -> Any | None:
    """Returns a copy as a `tokenizers.Tokenizer`; None for SentencePiece."""
    if not isinstance(self._backend, tokenizer_backends.Fast):
      return None
    original = self._backend.library_form
    return type(original).from_str(original.to_str())

  def model_file(self) -> bytes:
    """Returns the SentencePiece model, where `is_of_library` is False."""
    assert isinstance(self._backend, tokenizer_backends.SentencePieceBackend)
    return self._backend.model

  def special_names(self) -> list[str]:
    """Returns the names of tokens that become one id anywhere in a text.

    Only where `is_of_library` is False.
    """
    assert isinstance(self._backend, tokenizer_backends.SentencePieceBackend)
    return list(self._backend.named)

  def template(self) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Returns the ids around a text; None where `is_of_library` is False."""
    return self._backend.around() if self.is_of_library else None

  def files_say(self, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Returns whether every reader of the files puts these ids around a text.

    Args:
      before: ids before a text.
      after: ids after a text.
    """
    is_same = self._around() == self._backend.around() == (before, after)
    return is_same and self._backend.is_filed

  @property
  def token_names(self) -> dict[str, str]:
    """The names of special tokens, by `bos_token`, `eos_token`, ..."""
    return {f'{role}_token': name for role, name in self._names.items()}

  @property
  def chat_template(self) -> str | None:
    """The Jinja template that makes a prompt of a conversation, or None."""
    if (self.root / _TEMPLATE).exists():
      return reading.text(self.root / _TEMPLATE)
    given = self.settings.get('chat_template')
    if isinstance(given, list):  # Several templates, with names.
      named = {one.get('name'): one.get('template') for one in given}
      given = named.get('default')
    return given if isinstance(given, str) else None

  @property
  def fingerprint(self) -> str:
    # A hash of what decides ids; older copies also have a file of the names.
    digest = hashlib.sha256(json.dumps(self._names, sort_keys=True).encode())
    for name in FILES:
      if (
        name not in (tokenizer_files.SPECIAL_TOKENS, _TEMPLATE)
        and (self.root / name).exists()
      ):
        digest.update(name.encode() + (self.root / name).read_bytes())
    return digest.hexdigest()[:16]

  def marks(self) -> dict[str, np.ndarray]:
    special_V = np.zeros(self.vocab.size, bool)
    special_V[list(self._special)] = True
    if self._backend.is_bytes_alone:
      return letters.byte_marks(special_V, self.token_bytes())
    pieces = [self._backend.piece(i) for i in range(self.vocab.size)]
    begins_V = np.array([self._backend.begins(piece) for piece in pieces])
    ends_V = np.array([piece.endswith(('.', '!', '?')) for piece in pieces])
    return {
      'begins_V': begins_V | special_V,
      'breaks_V': special_V,
      'ends_V': ends_V,
    }

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    return self._backend.encode(list(texts))

  def encode_whole(
    self, texts: Sequence[str | tuple[str, str]], length: int
  ) -> list[tokenizer_backends.Whole]:
    """Returns texts or pairs of texts, encoded with their special tokens.

    Args:
      texts: single texts, or pairs of texts that a model reads together.
      length: largest number of tokens, special ones included; the rest is cut.

    Raises:
      ValueError: if SentencePiece reads the tokenizer.
    """
    if not isinstance(self._backend, tokenizer_backends.Fast):
      raise ValueError(
        f'The tokenizer in {self.root} is one of SentencePiece, which knows '
        'no pairs and no places of tokens. Write a tokenizer.json beside it.'
      )
    return self._backend.encode_whole(list(texts), length)

  def encode_marked(self, text: str) -> list[int]:
    if self.splits_names:
      return super().encode_marked(text)
    return self.encode(text)  # The files name the sentinels.

  def shown(self, ids: Iterable[int]) -> list[int]:
    size, special = self.vocab.size, self._special
    return [int(i) for i in ids if 0 <= i < size and i not in special]

  def decode(self, ids: Iterable[int]) -> str:
    return self._backend.decode(self.shown(ids))

  def token_bytes(self) -> list[bytes]:
    return [
      b'' if i in self._special else self._backend.bytes_of(i)
      for i in range(self.vocab.size)
    ]

  def save(self, directory: epath.PathLike) -> None:
    super().save(directory)
    self.export(epath.Path(directory) / tokenizers.FILES)

  def export(self, directory: epath.PathLike) -> None:
    """Copies the tokenizer's files to a directory, unchanged."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in FILES:
      if (self.root / name).exists():
        (directory / name).write_bytes((self.root / name).read_bytes())


def _special_names(root: epath.Path) -> dict[str, str]:
  """Returns the name of the special token of each role (bos, eos, ...)."""
  given = tokenizer_files.read_settings(root) | tokenizer_files.read_json(
    root / tokenizer_files.SPECIAL_TOKENS
  )
  names = {}
  for role in tokenizer_files.ROLES:
    name = given.get(f'{role}_token')
    name = name.get('content') if isinstance(name, dict) else name
    if isinstance(name, str):
      names[role] = name
  return names or _usual_names(root)


def _usual_names(root: epath.Path) -> dict[str, str]:
  """Returns the usual name of each role, if the vocabulary has it."""
  backend = tokenizer_files.read_backend(root, {})
  names = {}
  for role, usual in _USUAL.items():
    known = [name for name in usual if backend.id_of(name) is not None]
    if known:
      names[role] = known[0]
  return names
