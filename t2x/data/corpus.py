"""From the name of a source to tokens on disk, each stage done once and kept.

  source -> documents (TFDS) -> tokenizer -> token streams

Every stage is stored under a hash of what it was made from.
"""

from collections.abc import Iterator
import dataclasses
import difflib
import hashlib
import logging
import pathlib
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from t2x import files
from t2x.data import builders
from t2x.data import config as config_lib
from t2x.data import text_files
from t2x.data import token_store
from t2x.data import tokenizer_loading
from t2x.data import tokenizers
from t2x.objectives import mixture

_log = logging.getLogger(__name__)

_CHUNK = 256  # Documents that are read and tokenised at a time.
OWN_SOURCES = ('installed_docs', 'text_files')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """A tokenised corpus.

  Attributes:
    tokenizer: what made the tokens.
    fingerprint: a hash of the documents and the tokenizer.
    splits: for each split one stream of documents; two for pairs, and those of
      all tasks for a mixture.
    tasks: of a mixture, each by its name.
    documents: what was read, kept and dropped, and the file that lists what was
      dropped; nothing for a TFDS dataset, which is taken as it is.
  """

  tokenizer: tokenizers.Tokenizer
  fingerprint: str
  splits: dict[str, tuple[token_store.Stream, ...]]
  tasks: dict[str, 'Corpus'] = dataclasses.field(default_factory=dict)
  documents: dict[str, Any] = dataclasses.field(default_factory=dict)

  def streams(self, split: str) -> tuple[token_store.Stream, ...]:
    """Returns the streams of `split`, or raises a ValueError."""
    if split not in self.splits:
      raise ValueError(
        f'Unknown split {split!r}; this corpus was prepared with '
        f'{sorted(self.splits)}. Name it in data.train_split or '
        'data.eval_splits.'
      )
    return self.splits[split]

  def num_tokens(self, split: str) -> int:
    """Tokens of a split, on both sides where it holds pairs."""
    return sum(s.num_tokens for s in self.streams(split))

  def num_bytes(self, split: str) -> int:
    """UTF-8 bytes of the text that is predicted: of pairs, the targets."""
    return self.streams(split)[-1].num_bytes


def prepare(
  config: config_lib.DataConfig,
  tokenizer: tokenizers.Tokenizer | None = None,
) -> Corpus:
  """Returns the corpus, building whatever of it is not there yet.

  Args:
    config: what to read.
    tokenizer: read the text with this one (a trained run's own) instead of the
      corpus's.

  Raises:
    ValueError: if the source, a file, a field, a split or the tokenizer's
      settings cannot work; the message says what can.
  """
  if isinstance(config.objective, mixture.Mixture):
    return _prepare_tasks(config, tokenizer)
  root = pathlib.Path(config_lib.directory(config))
  with files.lock(str(config_lib.directory(config))):
    builder = open_builder(config)
    fields = _fields(config, builder)
    names = dict.fromkeys([config.train_split, *config.eval_splits])
    for name in names:
      _check_split(name, builder)
    content = _fingerprint(builder)
    if tokenizer is None:
      tokenizer = _tokenizer(config, builder, fields, content, root)
    key = _hash(content, tokenizer.fingerprint, fields)
    splits = {}
    for name in names:
      path = root / 'tokens' / f'{key}-{_hash(name)}'
      if not path.exists():
        _tokenize(builders.open_split(builder, name), fields, tokenizer, path)
      splits[name] = tuple(
        token_store.Stream(path, str(i)) for i in range(len(fields))
      )
  return Corpus(
    tokenizer=tokenizer,
    fingerprint=key,
    splits=splits,
    documents=_documents(config, builder),
  )


def _documents(config, builder) -> dict[str, Any]:
  if config.source not in OWN_SOURCES:
    return {}
  return {
    'source': config.source,
    'duplicates': config.duplicates,
    **builder.info.metadata['counts'],
    'list': str(builder.data_path / builders.DROPPED),
  }


def _prepare_tasks(config, tokenizer) -> Corpus:
  """Returns the corpora of a mixture; the first one's tokenizer reads all."""
  found = {}
  for name, own in config_lib.parts(config).items():
    found[name] = prepare(own, tokenizer)
    tokenizer = found[name].tokenizer
  splits = {}
  for name in dict.fromkeys([config.train_split, *config.eval_splits]):
    streams = (own.streams(name) for own in found.values())
    splits[name] = sum(streams, ())
  prints = [(name, own.fingerprint) for name, own in found.items()]
  return Corpus(
    tokenizer=tokenizer,
    fingerprint=_hash(prints),
    splits=splits,
    tasks=found,
  )


def check_source(config: config_lib.DataConfig) -> None:
  """Raises a ValueError if the source is unknown."""
  name = config.source.partition('/')[0].partition(':')[0]
  if name in OWN_SOURCES:
    return
  known = [*OWN_SOURCES, *tfds.list_builders(with_community_datasets=False)]
  if name in known:
    return
  close = difflib.get_close_matches(name, known, n=1)
  hint = f' Did you mean {close[0]!r}?' if close else ''
  raise ValueError(
    f'Unknown data.source={config.source!r}.{hint} Expected installed_docs, '
    'text_files, or a name from tfds.list_builders().'
  )


def open_builder(config: config_lib.DataConfig) -> tfds.core.DatasetBuilder:
  """Returns the prepared dataset that `config` names."""
  check_source(config)
  data_dir = config_lib.directory(config)
  if config.source == 'installed_docs':
    return builders.prepare(
      builders.installed_docs_builder(data_dir, config.duplicates)
    )
  if config.source == 'text_files':
    return builders.prepare(
      builders.text_files_builder(
        data_dir,
        config.files,
        config.text_field,
        config.target_field,
        config.duplicates,
      )
    )
  try:
    with builders.quiet():
      builder = tfds.builder(
        config.source, data_dir=data_dir, file_format=builders.FILE_FORMAT
      )
      builder.download_and_prepare()
  except Exception as error:  # Each dataset fails in its own way.
    raise ValueError(
      f'data.source={config.source!r}: TFDS cannot prepare it here '
      f'({type(error).__name__}: {error}). Prepare it where TFDS can, with '
      f'file_format={builders.FILE_FORMAT!r} and data_dir={data_dir!r}, and '
      'copy that directory; or use text_files.'
    ) from error
  return builder


def _fields(config, builder) -> tuple[str, ...]:
  """Returns the features to read, one a stream."""
  pair = config.target_field is not None
  if config.source in OWN_SOURCES:
    return ('text', 'target') if pair else ('text',)
  fields = (config.text_field, config.target_field)[: 1 + pair]
  known = sorted(builder.info.features)
  for field in fields:
    if field not in known:
      raise ValueError(
        f'data.source={config.source!r} has no field {field!r}; it has '
        f'{known}. Set data.text_field (and, for pairs, data.target_field).'
      )
  return fields


def _check_split(name: str, builder) -> None:
  try:
    builders.open_split(builder, name)
  except ValueError as error:
    raise ValueError(
      f'Unknown or empty split {name!r} of {builder.name} ({error}); it has '
      f'{sorted(builder.info.splits)}. Set data.train_split or '
      'data.eval_splits.'
    ) from error


def _fingerprint(builder) -> str:
  metadata = builder.info.metadata or {}
  if 'fingerprint' in metadata:
    return metadata['fingerprint']
  sizes = [
    (n, s.num_examples, s.num_bytes) for n, s in builder.info.splits.items()
  ]
  return _hash(builder.info.full_name, sizes)


def _tokenizer(config, builder, fields, content, root) -> tokenizers.Tokenizer:
  """Returns the tokenizer of this corpus, trained on its training split."""
  if isinstance(config.tokenizer, tokenizers.Pretrained):
    return tokenizer_loading.read(config.tokenizer)
  key = _hash(content, fields, config.train_split, config.tokenizer)
  path = root / 'tokenizers' / key
  if not path.exists():
    source = builders.open_split(builder, config.train_split)
    chunks = _chunks(source, fields, *fields[1:])
    texts = (t for chunk in chunks for side in chunk for t in side)
    try:
      tokenizer = tokenizer_loading.train(config.tokenizer, texts)
    except ValueError as error:
      where = f'{config.source} {config.files}'.strip()
      raise ValueError(f'{where}: {error}') from error
    with files.new_directory(path) as temporary:
      tokenizer.save(temporary)
    _log.info('Tokenizer: %d ids.', tokenizer.vocab_size)
  return tokenizer_loading.load(path)


def _tokenize(source, fields, tokenizer, path: pathlib.Path) -> None:
  """Writes the streams of one split."""
  # A pair needs no start: the decoder begins with padding, as T5's does.
  start = [] if len(fields) > 1 else [tokenizer.bos_id]

  def encoded(field) -> Iterator[tuple[list[np.ndarray], int]]:
    for (texts,) in _chunks(source, (field,), *fields[1:]):
      all_ids = tokenizer.encode_batch(texts)
      documents = [
        np.array([*start, *ids, tokenizer.eos_id], np.uint32) for ids in all_ids
      ]
      yield documents, sum(len(t.encode()) for t in texts)

  with files.new_directory(path) as temporary:
    for i, field in enumerate(fields):
      token_store.write(temporary, str(i), encoded(field), tokenizer.vocab_size)


def _chunks(source, fields, target='') -> Iterator[list[list[str]]]:
  """Yields for some documents at a time the texts of each field.

  That of targets may hold numbers, which become text.
  """
  features = source.dataset_info.features
  for start in range(0, len(source), _CHUNK):
    # One batched read costs a fifth of single ones.
    examples = source.__getitems__(
      list(range(start, min(start + _CHUNK, len(source))))
    )
    yield [
      [_text(e[field], field, features[field], target) for e in examples]
      for field in fields
    ]


def _text(value, field: str, feature, target: str) -> str:
  if isinstance(feature, tfds.features.ClassLabel):
    return feature.int2str(int(value))
  if isinstance(value, str):
    return value
  if field == target and isinstance(value, np.generic | int | float):
    plain = np.asarray(value).item()
    if isinstance(plain, float):  # 0.1 in float32, not 0.10000000149.
      plain = float(str(feature.np_dtype(value)))
    return text_files.label_text(plain, f'Field {field!r}')
  if not isinstance(value, bytes):
    raise ValueError(
      f'Field {field!r} must be text, found {type(value).__name__}. Set '
      'data.text_field (and, for pairs, data.target_field) to text.'
    )
  return value.decode('utf-8')


def _hash(*facts) -> str:
  return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
