"""t2x's own tokenizers as the tokenizer.json of `tokenizers`.

Every file is tried on texts before it is written: the ids are the same.
"""

import json
import pathlib
from typing import Any

from t2x.data import tokenizers as tokenizers_lib
from t2x.objectives import vocab as vocab_lib

_SPACE = '\u2581'
_NAMED = {
  vocab_lib.PAD: '<pad>',
  vocab_lib.EOS: '</s>',
  vocab_lib.UNK: '<unk>',
  vocab_lib.BOS: '<s>',
  vocab_lib.MASK: '<mask>',
}
_PROBES = (
  'A text, as it is: 12,345 words!',
  ' two  spaces\nand a\ttab ',
  'd\u00e9j\u00e0 vu \u6f22\u5b57 \U0001f642',
)


def make(tokenizer: tokenizers_lib.Tokenizer) -> Any:
  """Returns the same tokenizer as one of the library's.

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
  made = _made(library, tokenizer)
  for text in _PROBES:
    ours, theirs = tokenizer.encode(text), made.encode(text).ids
    if ours != theirs:
      raise ValueError(
        f'The tokenizer cannot be written as tokenizer.json: {text!r} becomes '
        f'{theirs} there, and {ours} here.'
      )
  return made


def write(directory: str, made: Any) -> None:
  """Writes tokenizer.json and tokenizer_config.json of what `make` returned."""
  root = pathlib.Path(directory)
  made.save(str(root / 'tokenizer.json'))
  roles = {'pad': 0, 'eos': 1, 'unk': 2, 'bos': 3, 'mask': 4}
  settings = {f'{role}_token': _NAMED[i] for role, i in roles.items()}
  settings |= {'tokenizer_class': 'PreTrainedTokenizerFast'}
  settings |= {'clean_up_tokenization_spaces': False}
  text = json.dumps(settings, indent=2)
  (root / 'tokenizer_config.json').write_text(text + '\n')


def _made(library: Any, tokenizer: tokenizers_lib.Tokenizer) -> Any:
  names = [*_NAMED.values()]
  names += [f'<extra_id_{i}>' for i in range(len(tokenizer.sentinel_ids))]
  if isinstance(tokenizer, tokenizers_lib.BytesTokenizer):
    made = _bytes(library, names)
  else:
    assert isinstance(tokenizer, tokenizers_lib.SentencePieceTokenizer)
    made = _pieces(library, names, tokenizer.pieces())
  made.add_special_tokens(
    [library.AddedToken(n, normalized=False, special=True) for n in names]
  )
  return made


def _bytes(library: Any, names: list[str]) -> Any:
  """One id a byte: GPT-2's letters for bytes, and nothing to merge."""
  table = tokenizers_lib.byte_letters()
  vocab = {name: i for i, name in enumerate(names)}
  vocab |= {table[b]: len(names) + b for b in range(256)}
  made = library.Tokenizer(library.models.BPE(vocab=vocab, merges=[]))
  made.pre_tokenizer = library.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  made.decoder = library.decoders.ByteLevel()
  return made


def _pieces(library: Any, names: list[str], pieces: list[str]) -> Any:
  """SentencePiece's BPE: two pieces merge if they make one, in its order."""
  vocab = {piece: i for i, piece in enumerate(pieces)}
  vocab |= {name: i for i, name in enumerate(names)}
  first = len(names) + 256  # After the bytes that stand in for the unknown.
  merges = []
  for piece in pieces[first:]:
    ways = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
    ways = [(a, b) for a, b in ways if a in vocab and b in vocab]
    merges += sorted(ways, key=lambda way: (vocab[way[0]], vocab[way[1]]))
  made = library.Tokenizer(
    library.models.BPE(
      vocab=vocab, merges=merges, unk_token='<unk>', byte_fallback=True
    )
  )
  made.normalizer = library.normalizers.Replace(' ', _SPACE)
  made.decoder = library.decoders.Sequence(
    [
      library.decoders.Replace(_SPACE, ' '),
      library.decoders.ByteFallback(),
      library.decoders.Fuse(),
    ]
  )
  return made
