"""Files of tokenizers, and what is made of them; see `tokenizer_backends`."""

from collections.abc import Generator
from collections.abc import Iterable
import contextlib
import importlib
import json
import re
from typing import Any

from etils import epath

from t2x import reading
from t2x.data import tokenizer_backends as backends

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
  SPLIT,
  'tokenize_chinese_chars',
}


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
      model, settings = (root / name).read_bytes(), read_settings(root)
      with _damage_named(root / name):
        return backends.Pieces(model, _num_extra(root), settings)
  splits = bool(read_settings(root).get(SPLIT))
  try:
    import tokenizers as library
  except ImportError:
    raise ValueError(
      'Reading a tokenizer of Hugging Face needs the package tokenizers, which '
      "is not installed: pip install '.[huggingface]'."
    ) from None
  if (root / 'tokenizer.json').exists():
    file = root / 'tokenizer.json'
    text = reading.text(file)
    with _damage_named(file):
      if splits:
        text = _with_special_marks(read_json(file))
      tokenizer = library.Tokenizer.from_str(text)
    tokenizer.no_padding()  # A file may ask for either.
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = splits
    added = _add_names(tokenizer, names.values())
    return backends.Fast(tokenizer, splits=splits, is_filed=not added)
  if (root / 'vocab.txt').exists():
    return backends.Fast(_wordpiece(root, names), splits=splits)
  if (root / 'vocab.json').exists() and (root / 'merges.txt').exists():
    with _damage_named(f'{root / "vocab.json"} with merges.txt'):
      return backends.Fast(_byte_level(root, names), splits=splits)
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


def _with_special_marks(data: dict[str, Any]) -> str:
  """Makes sentinels special, so that they can be text as the others can."""
  for token in data.get('added_tokens') or []:
    token['special'] |= bool(re.fullmatch(r'<extra_id_\d+>', token['content']))
  return json.dumps(data)


@contextlib.contextmanager
def _damage_named(file: epath.PathLike) -> Generator[None, None, None]:
  """Makes one line of what a library says of a file that it cannot read."""
  try:
    yield
  except ValueError:
    raise
  except Exception as error:  # The libraries raise nothing narrower.
    problem = ' '.join(str(error).split())[:200]
    raise ValueError(
      f'{file} cannot be read ({problem}). Copy it again.'
    ) from None


def _wordpiece(root: epath.Path, names: dict[str, str]) -> Any:
  """BERT's, from a vocabulary of one token a line."""
  library: Any = importlib.import_module('tokenizers')
  vocab = {line: i for i, line in enumerate(_lines(root / 'vocab.txt')) if line}
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
  vocab = read_json(root / 'vocab.json')
  merges = [
    tuple(line.split(' '))
    for line in _lines(root / 'merges.txt')
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
  if EXTRA in settings:
    return _few(root, settings[EXTRA])
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
    ValueError: it is no JSON object.
  """
  if not file.exists():
    return {}
  return reading.json_object(file, 'Copy it again.')


def _lines(file: epath.Path) -> list[str]:
  """Returns the lines of a file; ValueError if one is not UTF-8."""
  return [line for _, line in reading.lines(file.read_bytes(), str(file))]
