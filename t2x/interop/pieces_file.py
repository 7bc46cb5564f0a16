"""Bytes and SentencePiece's BPE as models of the library `tokenizers`."""

from collections.abc import Iterable
from collections.abc import Sequence
import importlib
from typing import Any

from t2x.data import letters
from t2x.data import pretrained

_PROBES = (
  '', ' ', '  two  spaces ', 'a<s>b</s> c', '\u2581x', 'd\u00e9j\u00e0 \u6f22',
  '\x00\t\x85\n', '-' * 9, '<unk>', 'A text, as it is: 12,345 words!',
)  # fmt: skip


def bpe(
  library: Any, vocab: dict[str, int], pieces: Iterable[str], **options: Any
) -> Any:
  """Returns a model in which two pieces merge if they make one.

  Args:
    library: `tokenizers`.
    vocab: the id of each piece and special token.
    pieces: those that are made by merging, the first to merge first.
    **options: of the library's model.
  """
  merges = []
  for piece in pieces:
    ways = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
    ways = [(a, b) for a, b in ways if a in vocab and b in vocab]
    merges += sorted(ways, key=lambda way: (vocab[way[0]], vocab[way[1]]))
  return library.models.BPE(vocab=vocab, merges=merges, **options)


def of_bytes(library: Any, names: list[str]) -> tuple[Any, list[Any]]:
  """Returns what has one id a byte, and its decoders.

  GPT-2's letters stand for bytes, and there is nothing to merge.
  """
  table = letters.byte_letters()
  vocab = {name: i for i, name in enumerate(names)}
  vocab |= {table[b]: len(names) + b for b in range(256)}
  made = library.Tokenizer(library.models.BPE(vocab=vocab, merges=[]))
  made.pre_tokenizer = library.pre_tokenizers.ByteLevel(
    add_prefix_space=False, use_regex=False
  )
  return made, [library.decoders.ByteLevel()]


def of_own(
  library: Any, names: list[str], pieces: list[str]
) -> tuple[Any, list[Any]]:
  """Returns the form of a model that t2x has trained, and its decoders.

  A space is a space here: U+2581, which stands for it in SentencePiece's own
  files, is a letter like others and falls back to its bytes.
  """
  pieces = [piece.replace(letters.SPACE, ' ') for piece in pieces]
  vocab = {piece: i for i, piece in enumerate(pieces)}
  vocab |= {name: i for i, name in enumerate(names)}
  first = len(names) + 256  # After the bytes that stand in for the unknown.
  options = {'byte_fallback': True, 'unk_token': '<unk>'}
  made = library.Tokenizer(bpe(library, vocab, pieces[first:], **options))
  return made, [library.decoders.ByteFallback(), library.decoders.Fuse()]


def of_others(tokenizer: pretrained.PretrainedTokenizer) -> Any | None:
  """Returns the form of a model that others have trained, such as Llama's.

  None if the library has none that gives the same ids: unigrams, and models
  that normalise texts (T5's).
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


def _add_spaces(library: Any, made: Any, *, prefix: bool) -> None:
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
