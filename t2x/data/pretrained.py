"""Tokenizers that come with the checkpoints of others.

A directory of Hugging Face's form: tokenizer.json, or vocab.txt (WordPiece),
vocab.json with merges.txt (byte-level BPE), spiece.model or tokenizer.model
(SentencePiece's unigrams and BPE). The ids are those of their own libraries,
`tokenizers` and `sentencepiece`, which read the files.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import hashlib
import importlib
import json
import re
from typing import Any

from etils import epath
import numpy as np
import sentencepiece

from t2x.data import tokenizers
from t2x.objectives import vocab as vocab_lib

# XLM-R's sentencepiece.bpe.model is read with other ids than its own.
_SPM = ('spiece.model', 'tokenizer.model')
_TEMPLATE = 'chat_template.jinja'
_ADDED = 'added_tokens.json'
_MOST_EXTRA = 10_000
_MAP = 'special_tokens_map.json'
_SETTINGS = 'tokenizer_config.json'
FILES = (
  'tokenizer.json',
  'vocab.txt',
  'vocab.json',
  'merges.txt',
  *_SPM,
  _MAP,
  _SETTINGS,
  _ADDED,
  _TEMPLATE,
)
_ROLES = ('bos', 'eos', 'pad', 'mask', 'cls', 'sep', 'unk')
# Taken where no file says more.
_USUAL = {
  'cls': ('[CLS]', '<cls>', '<s>'),
  'sep': ('[SEP]', '<sep>', '</s>'),
  'bos': ('<s>', '<|begin_of_text|>', '<|endoftext|>'),
  'eos': ('</s>', '<|end_of_text|>', '<|endoftext|>'),
  'pad': ('[PAD]', '<pad>'),
  'mask': ('[MASK]', '<mask>'),
  'unk': ('[UNK]', '<unk>'),
}
_SPACES = ('\u2581', '\u0120')  # How SentencePiece and GPT-2 write a space.
_BYTE_OF = {letter: i for i, letter in enumerate(tokenizers.byte_letters())}


class PretrainedTokenizer(tokenizers.Tokenizer):
  """Ids of a checkpoint's own tokenizer, special tokens in the text included.

  Attributes:
    prefix_ids: what its checkpoints put before a text.
    suffix_ids: what they put after it.
  """

  def __init__(self, config: tokenizers.Pretrained, directory: epath.PathLike):
    self.config = config
    self._root = epath.Path(directory)
    self._names = _special_names(self._root)
    self._backend = _backend(self._root, self._names)
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
        f'one in its {_SETTINGS}, as in "eos_token": "</s>".'
      )
    pad = first('pad')
    self.bos_id, self.eos_id = bos, eos
    self.pad_id = eos if pad is None else pad
    self.mask_id = first('mask')
    self.prefix_ids, self.suffix_ids = self._backend.around()
    own = {i for i in ids.values() if i is not None}
    self._special = own | self._backend.special
    self.vocab = vocab_lib.Vocab(
      size=self._backend.size,
      eos=eos,
      bos=bos,
      mask=self.mask_id,
      sentinels=self._sentinels(),
      special=tuple(sorted(self._special)),
    )

  def _check_added(self) -> None:
    """Raises ValueError for tokens that only tokenizer.json would explain."""
    for name, i in _json(self._root / _ADDED).items():
      if self._backend.id_of(name) != i:
        raise ValueError(
          f'{self._root / _ADDED} adds {name!r} as id {i}, and the other files '
          'do not say how. Write a tokenizer.json with transformers: '
          'AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).'
        )

  def _sentinels(self) -> tuple[int, ...]:
    """Returns the ids of <extra_id_0>, <extra_id_1>, ..."""
    found = []
    while (i := self._backend.id_of(f'<extra_id_{len(found)}>')) is not None:
      found.append(i)
    return tuple(found)

  @property
  def token_names(self) -> dict[str, str]:
    """What special tokens are called, by `bos_token`, `eos_token`, ..."""
    return {f'{role}_token': name for role, name in self._names.items()}

  @property
  def chat_template(self) -> str | None:
    """How a conversation becomes a prompt, in Jinja; None where none says."""
    if (self._root / _TEMPLATE).exists():
      return (self._root / _TEMPLATE).read_text()
    given = _json(self._root / _SETTINGS).get('chat_template')
    if isinstance(given, list):  # Several, with names.
      named = {one.get('name'): one.get('template') for one in given}
      given = named.get('default')
    return given if isinstance(given, str) else None

  @property
  def fingerprint(self) -> str:
    # By what decides ids; `export` may add the file of the names.
    found = hashlib.sha256(json.dumps(self._names, sort_keys=True).encode())
    for name in FILES:
      if name not in (_MAP, _TEMPLATE) and (self._root / name).exists():
        found.update(name.encode() + (self._root / name).read_bytes())
    return found.hexdigest()[:16]

  def marks(self) -> dict[str, np.ndarray]:
    special_V = np.zeros(self.vocab.size, bool)
    special_V[list(self._special)] = True
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

  def encode_marked(self, text: str) -> list[int]:
    return self.encode(text)  # It knows its sentinels.

  def decode(self, ids: Iterable[int]) -> str:
    size, special = self.vocab.size, self._special
    return self._backend.decode(
      [int(i) for i in ids if 0 <= i < size and i not in special]
    )

  def token_bytes(self) -> list[bytes]:
    return [
      b'' if i in self._special else self._backend.bytes_of(i)
      for i in range(self.vocab.size)
    ]

  def save(self, directory: epath.PathLike) -> None:
    super().save(directory)
    self.export(epath.Path(directory) / tokenizers.FILES)

  def export(self, directory: epath.PathLike) -> None:
    """Writes the files as they came, and the names of the special tokens."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    for name in FILES:
      if (self._root / name).exists():
        (directory / name).write_bytes((self._root / name).read_bytes())
    if not (directory / _MAP).exists():
      names = json.dumps(self.token_names, indent=2)
      (directory / _MAP).write_text(names + '\n')


class _Fast:
  """A tokenizer of the library `tokenizers`."""

  def __init__(self, tokenizer: Any):
    self._tokenizer = tokenizer
    pieces = tokenizer.get_vocab()
    # Ids may have gaps, such as an empty line of vocab.txt.
    self.size = max(pieces.values()) + 1
    added = tokenizer.get_added_tokens_decoder()
    self.special = {i for i, token in added.items() if token.special}
    self._continues = any(piece.startswith('##') for piece in pieces)
    model = json.loads(tokenizer.to_str())
    self._is_bytes = '"ByteLevel"' in json.dumps(model.get('decoder'))

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
    if self._continues:
      joins = piece.startswith('##')
      return (piece[2:] if joins else f' {piece}').encode()
    return tokenizers.piece_bytes(piece)

  def begins(self, piece: str) -> bool:
    if self._continues:
      return not piece.startswith('##')
    return piece.startswith(_SPACES)

  def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns what stands before and after a text."""
    plain = self._tokenizer.encode('a', add_special_tokens=False).ids
    whole = self._tokenizer.encode('a').ids
    for start in range(len(whole) - len(plain) + 1):
      if whole[start : start + len(plain)] == plain:
        return tuple(whole[:start]), tuple(whole[start + len(plain) :])
    return (), ()

  def encode(self, texts: list[str]) -> list[list[int]]:
    found = self._tokenizer.encode_batch(texts, add_special_tokens=False)
    return [encoding.ids for encoding in found]

  def decode(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids)


class _Pieces:
  """A SentencePiece model; T5 adds its sentinels behind the vocabulary."""

  def __init__(self, model: bytes, num_extra: int, settings: dict[str, Any]):
    self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
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
    self._named = named | self._extra
    self.special = set(self._named.values())
    bos, eos = self._processor.bos_id(), self._processor.eos_id()
    # Llama begins a text with a token of its own; T5 has none and ends it.
    begins = settings.get('add_bos_token', bos >= 0)
    ends = settings.get('add_eos_token', bos < 0)
    self._around = (bos,) if begins else (), (eos,) if ends else ()
    found = sorted(self._named, key=len, reverse=True)
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
    return tokenizers.piece_bytes(self.piece(i))

  def begins(self, piece: str) -> bool:
    return piece.startswith(_SPACES)

  def around(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return self._around

  def encode(self, texts: list[str]) -> list[list[int]]:
    return [self._encode(text) for text in texts]

  def _encode(self, text: str) -> list[int]:
    parts = self._pattern.split(text)
    ids = self._processor.encode(parts[0])
    for name, part in zip(parts[1::2], parts[2::2]):
      ids += [self._named[name], *self._processor.encode(part)]
    return ids

  def decode(self, ids: list[int]) -> str:
    return self._processor.decode(ids)


def _backend(root: epath.Path, names: dict[str, str]) -> Any:
  """Reads whichever files there are."""
  for name in _SPM:
    if (root / name).exists() and not (root / 'tokenizer.json').exists():
      model, settings = (root / name).read_bytes(), _json(root / _SETTINGS)
      return _Pieces(model, _num_extra(root), settings)
  try:
    import tokenizers as library
  except ImportError:
    raise ValueError(
      'Reading a tokenizer of Hugging Face needs the package tokenizers, which '
      "is not installed: pip install '.[huggingface]'."
    ) from None
  if (root / 'tokenizer.json').exists():
    try:
      text = (root / 'tokenizer.json').read_text()
      tokenizer = library.Tokenizer.from_str(text)
    except Exception as error:  # The library raises nothing narrower.
      raise ValueError(
        f'{root / "tokenizer.json"} cannot be read ({error}). Copy it again.'
      ) from None
    tokenizer.no_padding()  # A file may ask for either.
    tokenizer.no_truncation()
    return _Fast(tokenizer)
  if (root / 'vocab.txt').exists():
    return _Fast(_wordpiece(root, names))
  if (root / 'vocab.json').exists() and (root / 'merges.txt').exists():
    return _Fast(_byte_level(root, names))
  raise ValueError(
    f'No tokenizer in {root}. It takes one of tokenizer.json, vocab.txt, '
    f'vocab.json with merges.txt, {", ".join(_SPM)}.'
  )


def _wordpiece(root: epath.Path, names: dict[str, str]) -> Any:
  """BERT's, from a vocabulary of one token a line."""
  library: Any = importlib.import_module('tokenizers')
  lines = (root / 'vocab.txt').read_text().split('\n')
  vocab = {line.rstrip('\r'): i for i, line in enumerate(lines) if line}
  settings = _json(root / _SETTINGS)
  special = {
    f'{role}_token': names.get(role, f'[{role.upper()}]')
    for role in ('cls', 'sep', 'unk', 'pad', 'mask')
  }
  for role in ('cls_token', 'sep_token', 'unk_token'):
    if special[role] not in vocab:
      raise ValueError(
        f'{root / "vocab.txt"} lacks {special[role]}, the {role}. Name the '
        f'one that it has in {_SETTINGS}, or copy the file again.'
      )
  made = library.BertWordPieceTokenizer(
    vocab,
    **special,
    lowercase=settings.get('do_lower_case', True),
    strip_accents=settings.get('strip_accents'),
    handle_chinese_chars=settings.get('tokenize_chinese_chars', True),
  )
  return made._tokenizer


def _byte_level(root: epath.Path, names: dict[str, str]) -> Any:
  """GPT-2's, and with its two special tokens around a text RoBERTa's."""
  library: Any = importlib.import_module('tokenizers')
  vocab = json.loads((root / 'vocab.json').read_text())
  lines = (root / 'merges.txt').read_text().split('\n')
  merges = [
    tuple(line.split(' '))
    for line in lines
    if line and not line.startswith('#version')
  ]
  made = library.ByteLevelBPETokenizer(
    vocab,
    merges,
    add_prefix_space=_json(root / _SETTINGS).get('add_prefix_space', False),
  )
  # The mask stands for a word, so the space before it belongs to it.
  made.add_special_tokens(
    [
      library.AddedToken(
        name, lstrip=role == 'mask', normalized=False, special=True
      )
      for role, name in names.items()
      if name in vocab
    ]
  )
  if 'cls' in names and 'sep' in names:
    for role in ('cls', 'sep'):
      if names[role] not in vocab:
        raise ValueError(
          f'{root / "vocab.json"} lacks {names[role]}, the {role}_token that '
          f'{_MAP} or {_SETTINGS} names. Copy the files again.'
        )
    made._tokenizer.post_processor = library.processors.RobertaProcessing(
      (names['sep'], vocab[names['sep']]),
      (names['cls'], vocab[names['cls']]),
      add_prefix_space=False,
    )
  return made._tokenizer


def _special_names(root: epath.Path) -> dict[str, str]:
  """Returns what the tokens of each role are called."""
  given = _json(root / _SETTINGS) | _json(root / _MAP)
  names = {}
  for role in _ROLES:
    name = given.get(f'{role}_token')
    name = name.get('content') if isinstance(name, dict) else name
    if isinstance(name, str):
      names[role] = name
  return names or _usual_names(root)


def _usual_names(root: epath.Path) -> dict[str, str]:
  """Returns the names that roles mostly have, of those in the vocabulary."""
  backend = _backend(root, {})
  names = {}
  for role, usual in _USUAL.items():
    there = [name for name in usual if backend.id_of(name) is not None]
    if there:
      names[role] = there[0]
  return names


def _num_extra(root: epath.Path) -> int:
  """Returns how many sentinels T5 has added."""
  settings = _json(root / _SETTINGS)
  if 'extra_ids' in settings:
    return _few(root, int(settings['extra_ids']))
  text = json.dumps(settings) + json.dumps(_json(root / _MAP))
  numbers = re.findall(r'<extra_id_(\d+)>', text)
  if numbers:
    return _few(root, max(map(int, numbers)) + 1)
  # T5's comes with a hundred; ALBERT's and XLNet's have the same name.
  is_t5 = 't5' in settings.get('tokenizer_class', 't5').lower()
  return 100 if is_t5 and (root / 'spiece.model').exists() else 0


def _few(root: epath.Path, number: int) -> int:
  if not 0 <= number <= _MOST_EXTRA:
    raise ValueError(
      f'{root / _SETTINGS} asks for {number} tokens <extra_id_N>; at most '
      f'{_MOST_EXTRA} make sense.'
    )
  return number


def _json(file: epath.Path) -> dict[str, Any]:
  """Returns what a file holds, or nothing if it is not there."""
  if not file.exists():
    return {}
  try:
    data = json.loads(file.read_text())
  except ValueError as error:
    raise ValueError(f'{file} is not JSON ({error}). Copy it again.') from None
  return data if isinstance(data, dict) else {}
