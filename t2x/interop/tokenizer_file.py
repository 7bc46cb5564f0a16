"""Writes tokenizers as a tokenizer.json, which `transformers` reads.

To t2x's own tokenizers `<s>` within a text is ordinary text, and never the
start token. The library `tokenizers` always finds added tokens in texts, so in
the file the special tokens are not added tokens. They are entries of the
vocabulary, the template of the post-processor puts them around a text, and the
decoder leaves them out. `transformers` adds those that have a role, and does
not look for them in texts if `split_special_tokens` is set.
"""

from collections.abc import Callable
from collections.abc import Iterable
import json
import logging
import re
import types
from typing import Any

from etils import epath
import numpy as np

from t2x.data import pretrained
from t2x.data import tokenizer_files
from t2x.data import tokenizers as tokenizers_lib
from t2x.interop import framing
from t2x.interop import pieces_file
from t2x.objectives import vocab as vocab_lib

_LOG = logging.getLogger(__name__)
_NAMED = {
  vocab_lib.PAD: '<pad>',
  vocab_lib.EOS: '</s>',
  vocab_lib.UNK: '<unk>',
  vocab_lib.BOS: '<s>',
  vocab_lib.MASK: '<mask>',
}
_PROBES = (
  '',
  'A text, as it is: 12,345 words!',
  ' two  spaces\nand a\ttab\r\n ',
  'd\u00e9j\u00e0 vu e\u0301 \u6f22\u5b57 \U0001f642 \u2581x\u2581\u2581',
  '\x00\x01\x7f <0x41> <extra_id_007>',
  ''.join(f'a{name} {name}' for name in _NAMED.values()),
  ' ' * 99 + '-' * 99 + '=' * 50 + '\n' * 33 + '.' * 17,
)


def make_writer(
  tokenizer: tokenizers_lib.Tokenizer,
  frame: framing.Frame,
  *,
  as_it_came: bool = False,
) -> Callable[[epath.PathLike], None]:
  """Returns a function that writes a tokenizer's files to a directory.

  Everything that may fail is done before it returns.

  Args:
    tokenizer: tokenizer of a run.
    frame: special tokens around the texts that the model reads.
    as_it_came: whether a tokenizer of a checkpoint of Hugging Face keeps its
      files if they give the same ids.

  Raises:
    ValueError: a library is not installed, or no file gives these ids in the
      library.
  """
  if isinstance(tokenizer, pretrained.PretrainedTokenizer):
    says_it = tokenizer.files_say(frame.before, frame.after)
    if says_it and as_it_came and tokenizer.is_of_library:
      return tokenizer.export
    made = tokenizer.library_form()
    if made is None:
      made = pieces_file.convert_pretrained(tokenizer)
    if made is None:
      return _as_pieces(tokenizer, says_it)
    if tokenizer.splits_names:
      made = _remade(made, tokenizer, frame)
    if tokenizer.template() != (frame.before, frame.after):
      made.post_processor = _template(made, frame)
    settings = _settings_of(tokenizer, made)
  else:
    made, settings = make(tokenizer, frame), _settings(tokenizer, frame)
  settings |= {
    # The class that uses the file without changes.
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'clean_up_tokenization_spaces': False,
    'model_input_names': [
      'input_ids',
      *(['token_type_ids'] if frame.pairs else []),
      'attention_mask',
    ],
  }

  def write(directory: epath.PathLike) -> None:
    root = epath.Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    (root / 'tokenizer.json').write_text(made.to_str(pretty=True))
    text = json.dumps(settings, indent=2) + '\n'
    (root / tokenizer_files.TOKENIZER_CONFIG).write_text(text)

  return write


def _as_pieces(
  tokenizer: pretrained.PretrainedTokenizer, says_it: bool
) -> Callable[[epath.PathLike], None]:
  """Returns a function that writes a SentencePiece model as it is.

  Raises:
    ValueError: the model's files do not give the frame of the texts.
  """
  if not says_it:
    raise ValueError(
      f'{tokenizer.root} has a SentencePiece model alone, whose texts begin or '
      'end otherwise than those of this model. Write a tokenizer.json there '
      'with transformers: '
      'AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR).'
    )
  _LOG.warning(
    'The tokenizer stays a SentencePiece model, which transformers converts '
    'when it reads it: some texts with rare blanks or marks get other ids '
    'there. A run that began with a tokenizer.json has the same.'
  )
  is_t5 = (tokenizer.root / 'spiece.model').exists()
  settings = {
    'tokenizer_class': 'T5Tokenizer' if is_t5 else 'LlamaTokenizer',
    **tokenizer.settings,
  }

  def write(directory: epath.PathLike) -> None:
    tokenizer.export(directory)
    text = json.dumps(settings, indent=2) + '\n'
    (epath.Path(directory) / tokenizer_files.TOKENIZER_CONFIG).write_text(text)

  return write


def make(tokenizer: tokenizers_lib.Tokenizer, frame: framing.Frame) -> Any:
  """Converts one of t2x's own tokenizers to a `tokenizers.Tokenizer`.

  The ids of some texts are compared.

  Args:
    tokenizer: tokenizer that t2x has trained, or that of bytes.
    frame: special tokens around the texts that the model reads.

  Raises:
    ValueError: the library is not installed, or gives other ids.
  """
  try:
    import tokenizers as library
  except ImportError:
    raise ValueError(
      'Writing a tokenizer.json needs the package tokenizers, which is not '
      "installed: pip install '.[huggingface]'."
    ) from None
  made = _made(library, tokenizer, frame)
  made.post_processor = _template(made, frame)
  probes = list(_PROBES)
  if frame.reads_sentinels and tokenizer.sentinel_ids:
    probes.append('a <extra_id_0> b<extra_id_0>')
  for text, ours in zip(probes, frame.ids(tokenizer, probes)):
    theirs = made.encode(text).ids
    if ours != theirs:
      raise ValueError(
        f'The tokenizer cannot be written as tokenizer.json: {text!r} becomes '
        f'{theirs} there, and {ours} here.'
      )
  return made


def _settings(
  tokenizer: tokenizers_lib.Tokenizer, frame: framing.Frame
) -> dict[str, Any]:
  roles = {'pad': 0, 'eos': 1, 'unk': 2, 'bos': 3, 'mask': 4}
  if frame.before and frame.after:
    roles |= {'cls': 3, 'sep': 1}
  settings = {f'{role}_token': _NAMED[i] for role, i in roles.items()}
  return settings | {
    tokenizer_files.SPLIT: True,
    tokenizer_files.EXTRA: len(tokenizer.sentinel_ids),
  }


def _settings_of(
  tokenizer: pretrained.PretrainedTokenizer, made: Any
) -> dict[str, Any]:
  """Returns the tokens of the roles, and the settings that are kept.

  Args:
    tokenizer: tokenizer of a checkpoint of Hugging Face.
    made: the tokenizer that is written, a `tokenizers.Tokenizer`.
  """
  ids = {
    'bos': tokenizer.bos_id,
    'eos': tokenizer.eos_id,
    'pad': tokenizer.pad_id,
  }
  names = {f'{role}_token': made.id_to_token(i) for role, i in ids.items()}
  names |= tokenizer.token_names
  # A name alone would lose the flags of its token, such as those on spaces.
  added = {
    token.content: token for token in made.get_added_tokens_decoder().values()
  }
  roles = {
    role: _token(added[name]) if name in added else name
    for role, name in names.items()
  }
  kept = {
    key: tokenizer.settings[key]
    for key in (
      'chat_template',
      'model_max_length',
      'padding_side',
      tokenizer_files.SPLIT,
      tokenizer_files.EXTRA,
    )
    if key in tokenizer.settings
  }
  return roles | kept


def _token(token: Any) -> dict[str, Any]:
  """Returns a `tokenizers.AddedToken` as JSON values."""
  flags = (
    'content',
    'lstrip',
    'normalized',
    'rstrip',
    'single_word',
    'special',
  )
  return {'__type': 'AddedToken', **{k: getattr(token, k) for k in flags}}


def _template(made: Any, frame: framing.Frame) -> Any:
  """Returns the post-processor that adds a frame to a text, or to a pair."""
  import tokenizers as library

  ids = dict.fromkeys((*frame.before, *frame.after))
  names = {i: f'special_{i}' for i in ids}
  before = [names[i] for i in frame.before]
  after = [names[i] for i in frame.after]
  second = [f'{part}:{int(frame.pairs)}' for part in ('$B', *after)]
  return library.processors.TemplateProcessing(
    single=[*before, '$A', *after],
    pair=[*before, '$A', *after, *second],
    special_tokens=[
      {'id': name, 'ids': [i], 'tokens': [made.id_to_token(i)]}
      for i, name in names.items()
    ],
  )


def _made(
  library: types.ModuleType,
  tokenizer: tokenizers_lib.Tokenizer,
  frame: framing.Frame,
) -> Any:
  """Returns the `tokenizers.Tokenizer` of `make`, without post-processor."""
  marks = [f'<extra_id_{i}>' for i in range(len(tokenizer.sentinel_ids))]
  names = [*_NAMED.values(), *marks]
  if isinstance(tokenizer, tokenizers_lib.BytesTokenizer):
    made, decoders = pieces_file.convert_bytes(library, names)
  else:
    assert isinstance(tokenizer, tokenizers_lib.SentencePieceTokenizer)
    made, decoders = pieces_file.convert_trained(
      library, names, tokenizer.pieces()
    )
  pattern = library.Regex(
    _hidden(_NAMED.values() if frame.reads_sentinels else names)
  )
  hide = library.decoders.Replace(pattern, '')
  made.decoder = library.decoders.Sequence([hide, *decoders])
  if frame.reads_sentinels:
    _add_marks(library, made, marks)
  return made


def _hidden(names: Iterable[str]) -> str:
  """Returns a regular expression of the tokens that the decoder leaves out."""
  return rf'\A(?:{"|".join(map(re.escape, names))})\z'


def _add_marks(
  library: types.ModuleType, made: Any, marks: Iterable[str]
) -> None:
  """Adds sentinels to a tokenizer."""
  # Not as special tokens: sources contain them, and answers show them.
  made.add_tokens([library.AddedToken(n, normalized=False) for n in marks])


def _remade(
  made: Any, tokenizer: pretrained.PretrainedTokenizer, frame: framing.Frame
) -> Any:
  """Returns a tokenizer that t2x has written before, for another frame."""
  import tokenizers as library

  data = json.loads(made.to_str())
  data['added_tokens'] = [
    token
    for token in data['added_tokens']
    if token['content'] not in data['model']['vocab']
  ]
  special = np.flatnonzero(
    ~tokenizer.vocab.is_text(np.arange(tokenizer.vocab_size))
  )
  marks = [made.id_to_token(i) for i in tokenizer.sentinel_ids]
  shown = marks if frame.reads_sentinels else []
  names = [name for i in special if (name := made.id_to_token(i)) not in shown]
  for part in (data['decoder'] or {}).get('decoders', []):
    if part.get('pattern', {}).get('Regex', '').startswith(r'\A(?:'):
      part['pattern']['Regex'] = _hidden(names)
  made = library.Tokenizer.from_str(json.dumps(data))
  if frame.reads_sentinels:
    _add_marks(library, made, marks)
  return made
