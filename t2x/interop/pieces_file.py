"""Converts byte and SentencePiece tokenizers to the library `tokenizers`."""

from collections.abc import Iterable
from collections.abc import Sequence
import importlib
import types
from typing import Any

from t2x.data import letters
from t2x.data import pretrained

_PROBES = (
  '', ' ', '  two  spaces ', 'a<s>b</s> c', '\u2581x', 'd\u00e9j\u00e0 \u6f22',
  '\x00\t\x85\n', '-' * 9, '<unk>', 'A text, as it is: 12,345 words!',
)  # fmt: skip


def bpe(
  library: types.ModuleType,
  vocab: dict[str, int],
  pieces: Iterable[str],
  **options: object,
) -> Any:
  """Returns a BPE model in which two pieces merge if they form a piece.

  Args:
    library: the module `tokenizers`.
    vocab: id of each piece and special token.
    pieces: pieces that merging produces, in order of priority.
    **options: further arguments of `tokenizers.models.BPE`.
  """
  merges = []
  for piece in pieces:
    ways = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
    ways = [(a, b) for a, b in ways if a in vocab and b in vocab]
    merges += sorted(ways, key=lambda way: (vocab[way[0]], vocab[way[1]]))
  return library.models.BPE(vocab=vocab, merges=merges, **options)


def convert_bytes(
  library: types.ModuleType, names: list[str]
) -> tuple[Any, list[Any]]:
  """Returns a tokenizer with one id for each byte, and its decoders.

  Bytes are written as GPT-2's letters, and there are no merges.

  Args:
    library: the module `tokenizers`.
    names: names of the special tokens, whose ids come before those of bytes.
  """
  table = letters.byte_letters()
  vocab = {name: i for i, name in enumerate(names)}
  vocab |= {table[b]: len(names) + b for b in range(256)}
  made = library.Tokenizer(library.models.BPE(vocab=vocab, merges=[]))
  made.pre_tokenizer = library.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  return made, [library.decoders.ByteLevel()]


def convert_trained(
  library: types.ModuleType, names: list[str], pieces: list[str]
) -> tuple[Any, list[Any]]:
  """Converts a SentencePiece model that t2x has trained.

  A space is written as a space: U+2581, which stands for it in SentencePiece's
  own files, is a letter like others and falls back to its bytes.

  Args:
    library: the module `tokenizers`.
    names: names of the special tokens, whose ids come first.
    pieces: pieces of the model in the order of their ids.

  Returns:
    A `tokenizers.Tokenizer`, and its decoders.
  """
  pieces = [piece.replace(letters.SPACE, ' ') for piece in pieces]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  vocab |= {name: i for i, name in enumerate(names)}
  first = len(names) + 256  # The pieces after the bytes of the fallback.
  options = {'byte_fallback': True, 'unk_token': '<unk>'}
  made = library.Tokenizer(bpe(library, vocab, pieces[first:], **options))
  return made, [library.decoders.ByteFallback(), library.decoders.Fuse()]


def convert_pretrained(tokenizer: pretrained.PretrainedTokenizer) -> Any | None:
  """Converts a SentencePiece model of a checkpoint, such as Llama's.

  Args:
    tokenizer: tokenizer of a checkpoint of Hugging Face.

  Returns:
    A `tokenizers.Tokenizer`; None if the library cannot give the same ids, as
    for unigram models and those that normalise texts (T5's).
  """
  import tokenizers as library

  name = 'sentencepiece.sentencepiece_model_pb2'
  messages: Any = importlib.import_module(name)
  proto = messages.ModelProto()
  proto.ParseFromString(tokenizer.model_file())
  normal, trained = proto.normalizer_spec, proto.trainer_spec
  kinds = messages.ModelProto.SentencePiece
  types = {piece.type for piece in proto.pieces}
  if (
    trained.model_type != trained.BPE
    or normal.precompiled_charsmap
    or normal.remove_extra_whitespaces
    or trained.treat_whitespace_as_suffix
    or types - {kinds.NORMAL, kinds.UNKNOWN, kinds.CONTROL, kinds.BYTE}
  ):
    return None
  vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
  merged = [piece for piece in proto.pieces if piece.type == kinds.NORMAL]
  merged.sort(key=lambda piece: -piece.score)
  has_bytes = kinds.BYTE in types
  options = {
    'byte_fallback': has_bytes,
    'fuse_unk': not has_bytes,
    'unk_token': trained.unk_piece,
  }
  names = [piece.piece for piece in merged]
  made = library.Tokenizer(bpe(library, vocab, names, **options))
  _add_spaces(library, made, prefix=normal.add_dummy_prefix)
  made.add_special_tokens(
    [
      library.AddedToken(name, normalized=False, special=True)
      for name in tokenizer.special_names()
    ]
  )
  same = all(
    made.encode(text, add_special_tokens=False).ids == tokenizer.encode(text)
    for text in _PROBES
  )
  return made if same else None


def _add_spaces(library: types.ModuleType, made: Any, *, prefix: bool) -> None:
  """Makes a tokenizer write spaces as U+2581, with one before the text."""
  space = letters.SPACE
  before: Sequence[Any] = [library.normalizers.Prepend(space)] if prefix else []
  made.normalizer = library.normalizers.Sequence(
    [*before, library.normalizers.Replace(' ', space)]
  )
  cut = [library.decoders.Strip(' ', 1, 0)] if prefix else []
  made.decoder = library.decoders.Sequence(
    [
      library.decoders.Replace(space, ' '),
      library.decoders.ByteFallback(),
      library.decoders.Fuse(),
      *cut,
    ]
  )
