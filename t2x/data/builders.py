"""TFDS builders of the corpora that need no download.

A builder's config is named after a hash of what it reads. Other files, or other
installed packages, are therefore prepared beside the old data and do not
overwrite it.
"""

from collections.abc import Generator
from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import dataclasses
import io
import json
import logging
from typing import Any
from typing import cast

from absl import logging as absl_logging
from etils import epath
import tensorflow_datasets as tfds

from t2x.data import documents as documents_lib
from t2x.data import installed_docs
from t2x.data import text_files

_log = logging.getLogger(__name__)

# Parquet was seen to lose examples; tfrecord needs TensorFlow.
FILE_FORMAT = 'array_record'
DROPPED = 'dropped.jsonl'  # Beside the data: the documents left out of it.


@dataclasses.dataclass(eq=False, kw_only=True)
class DocumentsConfig(tfds.core.BuilderConfig):
  """TFDS config of a corpus that is built from documents.

  Attributes:
    duplicates: documents that count as copies; see `documents.split`.
    paired: whether every document needs a target text.
  """

  duplicates: documents_lib.Duplicates = 'exact'
  paired: bool = False


@dataclasses.dataclass(eq=False, kw_only=True)
class TextFilesConfig(DocumentsConfig):
  """TFDS config of a corpus that is read from files.

  Attributes:
    paths: paths of the files, sorted.
    text_field: name of the field with the text in .jsonl files.
    target_field: name of the field with the target text; None without pairs.
  """

  paths: tuple[str, ...] = ()
  text_field: str = 'text'
  target_field: str | None = None


class _Documents(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Splits the documents of a subclass into train and validation."""

  VERSION = tfds.core.Version('2.0.0')
  RELEASE_NOTES = {
    '1.0.0': 'First release.',
    '2.0.0': 'Documents with the same words are not all copies any more.',
  }
  # TFDS would look here for checksums of downloads; there are none, and its
  # search needs a package (importlib_resources) that it does not install.
  code_path = None

  def _info(self) -> tfds.core.DatasetInfo:
    # Not dataset_info_from_configs: it wants a package folder of its own.
    text = tfds.features.Text()
    return tfds.core.DatasetInfo(
      builder=self,
      features=tfds.features.FeaturesDict(
        {'id': text, 'text': text, 'target': text}
      ),
      description=self.__doc__ or '',
      metadata=tfds.core.MetadataDict(),
    )

  def _documents(self) -> Iterable[documents_lib.Document]:
    raise NotImplementedError

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Any]:
    del dl_manager  # Nothing to download.
    config = cast(DocumentsConfig, self.builder_config)
    split = documents_lib.split(
      list(self._documents()), config.duplicates, config.paired
    )
    if not split.train or not split.validation:
      raise ValueError(
        f'{self.name}: the corpus has too little text: '
        f'{documents_lib.summary(split.counts)}. It needs at least two '
        'documents that differ, one of them to hold out. Give more files.'
      )
    _write_dropped(self.data_path / DROPPED, split.dropped)
    both = [*split.train, *split.validation]
    metadata = cast(tfds.core.MetadataDict, self.info.metadata)
    metadata.update(
      counts=split.counts, fingerprint=documents_lib.fingerprint(both)
    )
    return {
      'train': self._generate_examples(split.train),
      'validation': self._generate_examples(split.validation),
    }

  def _generate_examples(
    self, documents: Iterable[documents_lib.Document]
  ) -> Iterator[tuple[str, dict[str, str]]]:
    for document in documents:
      yield document.id, document._asdict()


class InstalledDocs(_Documents):
  """The documentation installed with Python and the packages t2x needs."""

  def _documents(self) -> Iterable[documents_lib.Document]:
    return installed_docs.read()


class TextFiles(_Documents):
  """Local .txt and .jsonl files."""

  def _documents(self) -> Iterable[documents_lib.Document]:
    config = cast(TextFilesConfig, self.builder_config)
    return text_files.read(
      list(config.paths), config.text_field, config.target_field
    )


def _write_dropped(
  path: epath.Path, dropped: Iterable[documents_lib.Dropped]
) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  with path.open('w') as file:
    for document in dropped:
      file.write(json.dumps(document._asdict()) + '\n')


def prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
  """Returns a dataset opened for reading, after building it if it is missing.

  Args:
    builder: builder of one of the classes above.
  """
  path = builder.data_path
  if not path.exists():
    with quiet():
      builder.download_and_prepare()
  # Without its class, so that worker processes can unpickle it.
  with quiet():
    builder = tfds.builder_from_directory(path)
  written = cast(tfds.core.MetadataDict, builder.info.metadata)['counts']
  where = f', listed in {path / DROPPED}' if written['dropped'] else ''
  summary = documents_lib.summary(written)
  _log.info('%s: %s%s.', builder.name, summary, where)
  for name in builder.info.splits:
    num = len(open_split(builder, name))
    assert num == written[name], (path, name, num, written)
  return builder


def open_split(builder: tfds.core.DatasetBuilder, split: str) -> Any:
  """Returns the examples of a split as a TFDS data source, read by index."""
  # Its decorator hides its signature.
  return cast(Any, builder).as_data_source(split=split)


def installed_docs_builder(
  data_dir: str, duplicates: documents_lib.Duplicates
) -> tfds.core.DatasetBuilder:
  """Returns the builder of the documentation that is installed here.

  Args:
    data_dir: directory of prepared data.
    duplicates: documents that count as copies; see `documents.split`.
  """
  name = f'{installed_docs.key()}-{duplicates}'
  config = DocumentsConfig(name=name, duplicates=duplicates)
  return _make(InstalledDocs, data_dir, config)


def text_files_builder(
  data_dir: str,
  files: str,
  text_field: str,
  target_field: str | None,
  duplicates: documents_lib.Duplicates,
) -> tfds.core.DatasetBuilder:
  """Returns the builder of the files that the globs match now.

  Args:
    data_dir: directory of prepared data.
    files: comma-separated globs; see `text_files.find`.
    text_field: name of the field with the text in .jsonl files.
    target_field: name of the field with the target text; None without pairs.
    duplicates: documents that count as copies; see `documents.split`.

  Raises:
    ValueError: if a glob matches nothing or a file is of another type.
  """
  paths = text_files.find(files)
  key = text_files.key(paths, text_field, target_field)
  config = TextFilesConfig(
    name=f'{key}-{duplicates}',
    duplicates=duplicates,
    paired=target_field is not None,
    paths=tuple(paths),
    text_field=text_field,
    target_field=target_field,
  )
  return _make(TextFiles, data_dir, config)


def _make(
  cls, data_dir: str, config: tfds.core.BuilderConfig
) -> tfds.core.DatasetBuilder:
  with quiet():
    return cls(data_dir=data_dir, config=config, file_format=FILE_FORMAT)


@contextlib.contextmanager
def quiet() -> Generator[None, None, None]:
  """Suppresses what TFDS prints and logs, except errors."""
  tfds.disable_progress_bar()
  level = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    absl_logging.set_verbosity(level)
