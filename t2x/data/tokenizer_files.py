"""Reading the files of pretrained tokenizers into `tokenizer_backends`."""

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
SPLIT = 'split_special_tokens'  # Whether their names are ordinary text.
EXTRA = 'extra_ids'  # The number of sentinels.
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


def read_backend(
  root: epath.Path, names: dict[str, str]
) -> backends.Fast | backends.SentencePieceBackend:
  """Returns the backend that reads the files of a directory.

  Args:
    root: directory of the files.
    names: names of the special tokens, by role.

  Raises:
    ValueError: if there are no files, one is damaged, or the library that reads
      them is not installed.
  """
  for name in SENTENCEPIECE:
    if (root / name).exists() and not (root / 'tokenizer.json').exists():
      model, settings = (root / name).read_bytes(), read_settings(root)
      with _damage_named(root / name):
        return backends.SentencePieceBackend(model, _num_extra(root), settings)
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
    tokenizer.no_padding()  # A file may ask for padding or truncation.
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
  """Makes named tokens special, as transformers does; returns how many."""
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
  """Returns a tokenizer.json in which sentinels are special tokens too."""
  for token in data.get('added_tokens') or []:
    token['special'] |= bool(re.fullmatch(r'<extra_id_\d+>', token['content']))
  return json.dumps(data)


@contextlib.contextmanager
def _damage_named(file: epath.PathLike) -> Generator[None, None, None]:
  """Turns a library's error on a damaged file into a one-line ValueError."""
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
  """Returns a BERT tokenizer, from a vocabulary with one token per line."""
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
  wrapper = library.BertWordPieceTokenizer(
    vocab,
    **special,
    lowercase=settings.get('do_lower_case', True),
    strip_accents=settings.get('strip_accents'),
    handle_chinese_chars=settings.get('tokenize_chinese_chars', True),
  )
  return wrapper._tokenizer


def _byte_level(root: epath.Path, names: dict[str, str]) -> Any:
  """Returns a GPT-2 tokenizer, or RoBERTa's if the roles cls and sep exist."""
  library: Any = importlib.import_module('tokenizers')
  vocab = read_json(root / 'vocab.json')
  merges = [
    tuple(line.split(' '))
    for line in _lines(root / 'merges.txt')
    if line and not line.startswith('#version')
  ]
  wrapper = library.ByteLevelBPETokenizer(
    vocab,
    merges,
    add_prefix_space=read_settings(root).get('add_prefix_space', False),
  )
  # The mask stands for a word, so it includes the space before it.
  wrapper.add_special_tokens(
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
    wrapper._tokenizer.post_processor = library.processors.RobertaProcessing(
      (names['sep'], vocab[names['sep']]),
      (names['cls'], vocab[names['cls']]),
      add_prefix_space=False,
    )
  return wrapper._tokenizer


def _num_extra(root: epath.Path) -> int:
  """Returns the number of sentinels that T5 adds to the vocabulary."""
  settings = read_settings(root)
  if EXTRA in settings:
    return _checked_num_extra(root, settings[EXTRA])
  text = json.dumps(settings) + json.dumps(read_json(root / SPECIAL_TOKENS))
  numbers = re.findall(r'<extra_id_(\d+)>', text)
  if numbers:
    return _checked_num_extra(root, max(map(int, numbers)) + 1)
  # T5 has a hundred; ALBERT's and XLNet's files have the same name.
  is_t5 = 't5' in str(settings.get('tokenizer_class') or 't5').lower()
  return 100 if is_t5 and (root / 'spiece.model').exists() else 0


def _checked_num_extra(root: epath.Path, number: object) -> int:
  if type(number) is not int or not 0 <= number <= _MOST_EXTRA:
    raise ValueError(
      f'{root / TOKENIZER_CONFIG} asks for {str(number)[:40]} tokens '
      f'<extra_id_N>; at most {_MOST_EXTRA} make sense.'
    )
  return number


def read_settings(root: epath.Path) -> dict[str, Any]:
  """Returns the settings of tokenizer_config.json, without nulls.

  Empty if the file does not exist.

  Raises:
    ValueError: if it is not JSON, or a value has the wrong type.
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


def _is_template(value: object) -> bool:
  """Returns whether a value is a chat template, or a list of named ones."""
  if isinstance(value, list):
    return all(isinstance(one, dict) for one in value)
  return isinstance(value, str)


def read_json(file: epath.Path) -> dict[str, Any]:
  """Returns the JSON object in a file; empty if the file does not exist.

  Raises:
    ValueError: if it is not a JSON object.
  """
  if not file.exists():
    return {}
  return reading.json_object(file, 'Copy it again.')


def _lines(file: epath.Path) -> list[str]:
  """Returns the lines of a file; raises a ValueError if one is not UTF-8."""
  return [line for _, line in reading.lines(file.read_bytes(), str(file))]
