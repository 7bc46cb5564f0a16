"""What reads a tokenizer's files: `tokenizers`, or `sentencepiece`."""

from collections.abc import Iterable
import importlib
import json
import re
from typing import Any
from typing import NamedTuple

from etils import epath
import sentencepiece

from t2x.data import letters

# XLM-R's sentencepiece.bpe.model is read with other ids than its own.
SENTENCEPIECE = ('spiece.model', 'tokenizer.model')
SPECIAL_TOKENS = 'special_tokens_map.json'
TOKENIZER_CONFIG = 'tokenizer_config.json'
SPLIT = 'split_special_tokens'  # Whether their names in texts are text.
EXTRA = 'extra_ids'  # How many sentinels there are.
_MOST_EXTRA = 10_000
ROLES = ('bos', 'eos', 'pad', 'mask', 'cls', 'sep', 'unk')
_NAMES = {f'{role}_token' for role in ROLES}
_FLAGS = {
  'add_bos_token',
  'add_eos_token',
  'add_prefix_space',
  'do_lower_case',
  'strip_accents',
  'tokenize_chinese_chars',
}
_SPACE = letters.SPACE
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


class _Fast:
  """A tokenizer of the library `tokenizers`."""

  def __init__(
    self, tokenizer: Any, settings: dict[str, Any], *, is_filed: bool = False
  ):
    self.library_form = tokenizer
    self.is_filed = is_filed  # Whether a tokenizer.json holds all of it.
    self._tokenizer = tokenizer
    self._settings = settings
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
    self._is_joined = has_bytes and bool(settings.get(SPLIT))
    # Of others one byte that is wrong breaks all those beside it.
    runs = has_bytes and not self._is_joined
    self._beside = tokenizer.encode('a', add_special_tokens=False).ids
    self._text_beside = tokenizer.decode(self._beside)
    self.run_ids = frozenset(
      i for piece, i in pieces.items() if runs and letters.is_byte(piece)
    )
    self._space = '\u0120' if self._is_bytes else _SPACE
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


class _Pieces:
  """A SentencePiece model; T5 adds its sentinels behind the vocabulary."""

  run_ids = frozenset()  # Of bytes, whole characters are text.
  is_bytes_alone = False
  is_filed = True

  def __init__(self, model: bytes, num_extra: int, settings: dict[str, Any]):
    self.model = model
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
    return piece.startswith(_SPACE)

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


def read_backend(root: epath.Path, names: dict[str, str]) -> Any:
  """Reads whichever files there are.

  Args:
    root: directory of the files.
    names: of the special tokens, by role.

  Returns:
    What encodes and decodes, by one of the two libraries.

  Raises:
    ValueError: there are none, one is damaged, or the library is missing.
  """
  for name in SENTENCEPIECE:
    if (root / name).exists() and not (root / 'tokenizer.json').exists():
      model, settings = (
        (root / name).read_bytes(),
        read_settings(root),
      )
      return _Pieces(model, _num_extra(root), settings)
  settings = read_settings(root)
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
      if settings.get(SPLIT):
        text = _with_special_marks(text)
      tokenizer = library.Tokenizer.from_str(text)
    except Exception as error:  # The library raises nothing narrower.
      raise ValueError(
        f'{root / "tokenizer.json"} cannot be read ({error}). Copy it again.'
      ) from None
    tokenizer.no_padding()  # A file may ask for either.
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = bool(settings.get(SPLIT))
    added = _add_names(tokenizer, names.values())
    return _Fast(tokenizer, settings, is_filed=not added)
  if (root / 'vocab.txt').exists():
    return _Fast(_wordpiece(root, names), settings)
  if (root / 'vocab.json').exists() and (root / 'merges.txt').exists():
    return _Fast(_byte_level(root, names), settings)
  raise ValueError(
    f'No tokenizer in {root}. It takes one of tokenizer.json, vocab.txt, '
    f'vocab.json with merges.txt, {", ".join(SENTENCEPIECE)}.'
  )


def _add_names(tokenizer: Any, names: Iterable[str]) -> int:
  """Makes those of the roles special tokens, as transformers does."""
  added = tokenizer.get_added_tokens_decoder().values()
  known = {token.content for token in added}
  new = [
    name
    for name in dict.fromkeys(names)
    if name not in known and tokenizer.token_to_id(name) is not None
  ]
  tokenizer.add_special_tokens(new)
  return len(new)


def _with_special_marks(text: str) -> str:
  """Makes sentinels special, so that they can be text as the others can."""
  data = json.loads(text)
  for token in data.get('added_tokens') or []:
    token['special'] |= bool(re.fullmatch(r'<extra_id_\d+>', token['content']))
  return json.dumps(data)


def _wordpiece(root: epath.Path, names: dict[str, str]) -> Any:
  """BERT's, from a vocabulary of one token a line."""
  library: Any = importlib.import_module('tokenizers')
  lines = (root / 'vocab.txt').read_text().split('\n')
  vocab = {line.rstrip('\r'): i for i, line in enumerate(lines) if line}
  settings = read_settings(root)
  special = {
    f'{role}_token': names.get(role, f'[{role.upper()}]')
    for role in ('cls', 'sep', 'unk', 'pad', 'mask')
  }
  for role in ('cls_token', 'sep_token', 'unk_token'):
    if special[role] not in vocab:
      raise ValueError(
        f'{root / "vocab.txt"} lacks {special[role]}, the {role}. Name the '
        f'one that it has in {TOKENIZER_CONFIG}, or copy the file again.'
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
    add_prefix_space=read_settings(root).get('add_prefix_space', False),
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
          f'{SPECIAL_TOKENS} or {TOKENIZER_CONFIG} names. Copy the files again.'
        )
    made._tokenizer.post_processor = library.processors.RobertaProcessing(
      (names['sep'], vocab[names['sep']]),
      (names['cls'], vocab[names['cls']]),
      add_prefix_space=False,
    )
  return made._tokenizer


def _num_extra(root: epath.Path) -> int:
  """Returns how many sentinels T5 has added."""
  settings = read_settings(root)
  if 'extra_ids' in settings:
    return _few(root, settings['extra_ids'])
  text = json.dumps(settings) + json.dumps(read_json(root / SPECIAL_TOKENS))
  numbers = re.findall(r'<extra_id_(\d+)>', text)
  if numbers:
    return _few(root, max(map(int, numbers)) + 1)
  # T5's comes with a hundred; ALBERT's and XLNet's have the same name.
  is_t5 = 't5' in str(settings.get('tokenizer_class') or 't5').lower()
  return 100 if is_t5 and (root / 'spiece.model').exists() else 0


def _few(root: epath.Path, number: Any) -> int:
  if type(number) is not int or not 0 <= number <= _MOST_EXTRA:
    raise ValueError(
      f'{root / TOKENIZER_CONFIG} asks for {str(number)[:40]} tokens '
      f'<extra_id_N>; at most {_MOST_EXTRA} make sense.'
    )
  return number


def read_settings(root: epath.Path) -> dict[str, Any]:
  """Returns tokenizer_config.json, without nulls; nothing if it is not there.

  Raises:
    ValueError: it is not JSON, or a value is of another kind than its key's.
  """
  file = root / TOKENIZER_CONFIG
  given = {k: v for k, v in read_json(file).items() if v is not None}
  for key, value in given.items():
    needed = None
    if key in _FLAGS and not isinstance(value, bool):
      needed = 'true or false'
    if key in _NAMES:
      name = value.get('content') if isinstance(value, dict) else value
      needed = None if isinstance(name, str) else 'a text'
    if key == 'chat_template' and not _is_template(value):
      needed = 'a text, or a list of objects with name and template'
    if needed:
      text = repr(value)[:60]
      raise ValueError(f'{file}: {key}={text}; it must be {needed}.')
  return given


def _is_template(value: Any) -> bool:
  if isinstance(value, list):
    return all(isinstance(one, dict) for one in value)
  return isinstance(value, str)


def read_json(file: epath.Path) -> dict[str, Any]:
  """Returns what a file holds, or nothing if it is not there.

  Raises:
    ValueError: it is not JSON.
  """
  if not file.exists():
    return {}
  try:
    data = json.loads(file.read_text())
  except ValueError as error:
    raise ValueError(f'{file} is not JSON ({error}). Copy it again.') from None
  return data if isinstance(data, dict) else {}
