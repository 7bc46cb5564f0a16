"""Preparing a corpus: documents, a tokenizer, and token streams on disk.

  source -> documents (TFDS) -> tokenizer -> token streams

Each stage is built once and stored under a hash of what it was made from.
"""

from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import difflib
import hashlib
import logging
import pathlib
from typing import Any
from typing import cast

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

_CHUNK = 256  # Documents that are read and tokenised at once.
OWN_SOURCES = ('installed_docs', 'text_files')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """A tokenised corpus.

  Attributes:
    tokenizer: the tokenizer that made the tokens.
    fingerprint: a hash of the documents and the tokenizer.
    splits: token streams of each split, by its name: one stream; two (source,
      target) for pairs; those of all tasks for a mixture.
    tasks: corpus of each task of a mixture, by the task's name.
    documents: numbers of documents read, kept and dropped, and the path of the
      file that lists the dropped ones; empty for a TFDS dataset, which is used
      as it is.
  """

  tokenizer: tokenizers.Tokenizer
  fingerprint: str
  splits: dict[str, tuple[token_store.TokenStream, ...]]
  tasks: dict[str, 'Corpus'] = dataclasses.field(default_factory=dict)
  documents: dict[str, Any] = dataclasses.field(default_factory=dict)

  def streams(self, split: str) -> tuple[token_store.TokenStream, ...]:
    """Returns the token streams of a split.

    Raises:
      ValueError: if the corpus was not prepared with the split.
    """
    if split not in self.splits:
      raise ValueError(
        f'Unknown split {split!r}; this corpus was prepared with '
        f'{sorted(self.splits)}. Name it in data.train_split or '
        'data.eval_splits.'
      )
    return self.splits[split]

  def num_tokens(self, split: str) -> int:
    """Returns the number of tokens of a split, both sides of pairs included."""
    return sum(s.num_tokens for s in self.streams(split))

  def num_bytes(self, split: str) -> int:
    """Returns the UTF-8 bytes of the predicted text (of pairs, the targets)."""
    return self.streams(split)[-1].num_bytes


def prepare(
  config: config_lib.DataConfig,
  tokenizer: tokenizers.Tokenizer | None = None,
) -> Corpus:
  """Returns the corpus, after building the stages that are missing.

  Args:
    config: the source, its fields and splits, and the tokenizer's settings.
    tokenizer: tokenizer of a trained run to encode the text with; None for the
      tokenizer that `config` describes.

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
        token_store.TokenStream(path, str(i)) for i in range(len(fields))
      )
  return Corpus(
    tokenizer=tokenizer,
    fingerprint=key,
    splits=splits,
    documents=_documents(config, builder),
  )


def _documents(
  config: config_lib.DataConfig, builder: tfds.core.DatasetBuilder
) -> dict[str, Any]:
  if config.source not in OWN_SOURCES:
    return {}
  return {
    'source': config.source,
    'duplicates': config.duplicates,
    **cast(tfds.core.MetadataDict, builder.info.metadata)['counts'],
    'list': str(builder.data_path / builders.DROPPED),
  }


def _prepare_tasks(
  config: config_lib.DataConfig, tokenizer: tokenizers.Tokenizer | None
) -> Corpus:
  """Returns the corpus of a mixture, encoded by the first task's tokenizer."""
  tasks = {}
  for name, part in config_lib.parts(config).items():
    tasks[name] = prepare(part, tokenizer)
    tokenizer = tasks[name].tokenizer
  assert tokenizer is not None  # A mixture has tasks.
  splits = {}
  for name in dict.fromkeys([config.train_split, *config.eval_splits]):
    streams = (corpus.streams(name) for corpus in tasks.values())
    splits[name] = sum(streams, ())
  prints = [(name, corpus.fingerprint) for name, corpus in tasks.items()]
  return Corpus(
    tokenizer=tokenizer,
    fingerprint=_hash(prints),
    splits=splits,
    tasks=tasks,
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
  """Returns the prepared dataset that `config` names.

  Raises:
    ValueError: if the source is unknown, or cannot be prepared here.
  """
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


def _fields(
  config: config_lib.DataConfig, builder: tfds.core.DatasetBuilder
) -> tuple[str, ...]:
  """Returns the names of the features to read, one for each stream."""
  pair = config.target_field is not None
  if config.source in OWN_SOURCES:
    return ('text', 'target') if pair else ('text',)
  names = config.text_field, config.target_field
  fields = tuple(name for name in names if name is not None)
  features: Any = builder.info.features
  known = sorted(features)
  for field in fields:
    if field not in known:
      raise ValueError(
        f'data.source={config.source!r} has no field {field!r}; it has '
        f'{known}. Set data.text_field (and, for pairs, data.target_field).'
      )
  return fields


def _check_split(name: str, builder: tfds.core.DatasetBuilder) -> None:
  try:
    builders.open_split(builder, name)
  except ValueError as error:
    raise ValueError(
      f'Unknown or empty split {name!r} of {builder.name} ({error}); it has '
      f'{sorted(builder.info.splits)}. Set data.train_split or '
      'data.eval_splits.'
    ) from error


def _fingerprint(builder: tfds.core.DatasetBuilder) -> str:
  metadata: Any = builder.info.metadata or {}
  if 'fingerprint' in metadata:
    return metadata['fingerprint']
  sizes = [
    (n, s.num_examples, s.num_bytes) for n, s in builder.info.splits.items()
  ]
  return _hash(builder.info.full_name, sizes)


def _tokenizer(
  config: config_lib.DataConfig,
  builder: tfds.core.DatasetBuilder,
  fields: Sequence[str],
  content: str,
  root: pathlib.Path,
) -> tokenizers.Tokenizer:
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


def _tokenize(
  source: Any,
  fields: Sequence[str],
  tokenizer: tokenizers.Tokenizer,
  path: pathlib.Path,
) -> None:
  """Writes the token streams of one split to `path`, one for each field."""
  # A pair needs no start: the decoder begins with padding, as T5's does.
  start = [] if len(fields) > 1 else [tokenizer.bos_id]

  def encoded(field: str) -> Iterator[tuple[list[np.ndarray], int]]:
    for (texts,) in _chunks(source, (field,), *fields[1:]):
      all_ids = tokenizer.encode_batch(texts)
      documents = [
        np.array([*start, *ids, tokenizer.eos_id], np.uint32) for ids in all_ids
      ]
      yield documents, sum(len(t.encode()) for t in texts)

  with files.new_directory(path) as temporary:
    for i, field in enumerate(fields):
      token_store.write(temporary, str(i), encoded(field), tokenizer.vocab_size)


def _chunks(
  source: Any, fields: Sequence[str], target: str = ''
) -> Iterator[list[list[str]]]:
  """Yields the texts of each field, for a chunk of documents at a time.

  Args:
    source: TFDS data source of a split.
    fields: names of the fields to read.
    target: name of the field that may hold numbers, which become text.
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


def _text(value: Any, field: str, feature: Any, target: str) -> str:
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


def _hash(*facts: object) -> str:
  return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
