"""Training a tokenizer on a corpus, and loading one from a directory."""

from collections.abc import Iterable
import io
import re

from etils import epath
import sentencepiece

from t2x import reading
from t2x.data import letters
from t2x.data import pretrained
from t2x.data import samples
from t2x.data import tokenizers
from t2x.objectives import vocab as vocab_lib


def load(directory: epath.PathLike) -> tokenizers.Tokenizer:
  """Returns the tokenizer that `Tokenizer.save` wrote to a directory.

  Raises:
    ValueError: if there is none.
  """
  path = epath.Path(directory) / 'tokenizer.json'
  if not path.exists():
    raise ValueError(
      f'No tokenizer in {directory}: {path.name} is missing. Give the '
      'directory that a tokenizer was saved to, such as that of a run.'
    )
  settings = reading.json_object(path, 'Copy the directory again.')
  kind = settings.pop('kind')
  if kind == tokenizers.Bytes.kind:
    return tokenizers.BytesTokenizer(tokenizers.Bytes(**settings))
  if kind == tokenizers.Pretrained.kind:
    return read(
      tokenizers.Pretrained(**settings), path.parent / tokenizers.FILES
    )
  model = (path.parent / 'tokenizer.model').read_bytes()
  return tokenizers.SentencePieceTokenizer(
    tokenizers.SentencePiece(**settings), model
  )


def read(
  config: tokenizers.Pretrained, directory: epath.PathLike | None = None
) -> tokenizers.Tokenizer:
  """Returns the tokenizer of a pretrained checkpoint.

  Args:
    config: the tokenizer's settings.
    directory: directory of its files; None for the one that `config` names.

  Raises:
    ValueError: if there is no tokenizer, its library is not installed, or a
      file is damaged.
  """
  if not (directory or config.directory):
    raise ValueError(
      'data.tokenizer.directory is empty: name the directory with the '
      "tokenizer's files."
    )
  return pretrained.PretrainedTokenizer(config, directory or config.directory)


def num_sentinels(config: tokenizers.Config) -> int | None:
  """Returns the number of sentinels of a tokenizer.

  None if the directory of a pretrained tokenizer does not exist any more; a run
  keeps a copy of its files.
  """
  if isinstance(config, tokenizers.Pretrained):
    if config.directory and not epath.Path(config.directory).exists():
      return None
    return len(read(config).sentinel_ids)
  return config.num_sentinels


def train(
  config: tokenizers.Config, texts: Iterable[str]
) -> tokenizers.Tokenizer:
  """Returns a tokenizer trained on the first few megabytes of texts.

  Args:
    config: the tokenizer's settings; those of bytes and of a pretrained
      tokenizer need no training.
    texts: the texts of the training split.

  Raises:
    ValueError: if the texts do not support `vocab_size`; the message says which
      size they do support.
  """
  if isinstance(config, tokenizers.Bytes):
    return tokenizers.BytesTokenizer(config)
  if isinstance(config, tokenizers.Pretrained):
    return read(config)
  model = io.BytesIO()
  control = [
    '<mask>',
    *(f'<extra_id_{i}>' for i in range(config.num_sentinels)),
  ]
  try:
    sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(list(samples.chunks(texts))),
      model_writer=model,
      model_type='bpe',
      vocab_size=config.vocab_size,
      byte_fallback=True,
      character_coverage=0.9995,
      required_chars=letters.SPACE,  # Texts without blanks keep them.
      pad_id=vocab_lib.PAD,
      eos_id=vocab_lib.EOS,
      unk_id=vocab_lib.UNK,
      bos_id=vocab_lib.BOS,
      control_symbols=control,  # Given the ids that follow, in this order.
      # Decoding must give back the text, so all whitespace is kept.
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      max_sentence_length=16 * samples.CHUNK,
      num_threads=2,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise _explain(config, error) from error
  return tokenizers.SentencePieceTokenizer(config, model.getvalue())


def _explain(
  config: tokenizers.SentencePiece, error: RuntimeError
) -> ValueError:
  """Returns an error that says what to change when SentencePiece fails."""
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
