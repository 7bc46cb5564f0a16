"""TFDS builders that need no download.

A builder's config is named after what it reads, so that other files, or other
installed packages, are prepared beside the old ones instead of over them.
"""

from collections.abc import Iterable
import contextlib
import dataclasses
import io
import logging
from typing import Any
from typing import cast

from absl import logging as absl_logging
import tensorflow_datasets as tfds

from t2x.data import documents as documents_lib
from t2x.data import installed_docs
from t2x.data import text_files

_log = logging.getLogger(__name__)

# Parquet was seen to lose examples; tfrecord needs TensorFlow.
FILE_FORMAT = 'array_record'


@dataclasses.dataclass(eq=False, kw_only=True)
class TextFilesConfig(tfds.core.BuilderConfig):
  """Which files to read; see `text_files`."""

  paths: tuple[str, ...] = ()
  text_field: str = 'text'
  target_field: str | None = None


class _Documents(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Splits documents and writes them."""

  VERSION = tfds.core.Version('1.0.0')
  RELEASE_NOTES = {'1.0.0': 'First release.'}
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

  def _split_generators(self, dl_manager) -> dict[str, Any]:
    del dl_manager  # Nothing to download.
    split = documents_lib.split(list(self._documents()))
    if not split.train or not split.validation:
      raise ValueError(
        f'{self.name}: the corpus has too little text: {split.counts}. It '
        'needs at least two documents that differ, one of them to hold out. '
        'Give more files.'
      )
    both = [*split.train, *split.validation]
    metadata = cast(tfds.core.MetadataDict, self.info.metadata)
    metadata.update(
      counts=split.counts, fingerprint=documents_lib.fingerprint(both)
    )
    return {
      'train': self._generate_examples(split.train),
      'validation': self._generate_examples(split.validation),
    }

  def _generate_examples(self, documents):
    for document in documents:
      yield document.id, document._asdict()


class InstalledDocs(_Documents):
  """The documentation installed with Python and the packages t2x needs."""

  def _documents(self):
    return installed_docs.read()


class TextFiles(_Documents):
  """Local .txt and .jsonl files."""

  def _documents(self):
    config = cast(TextFilesConfig, self.builder_config)
    return text_files.read(
      list(config.paths), config.text_field, config.target_field
    )


def prepare(builder: tfds.core.DatasetBuilder) -> tfds.core.DatasetBuilder:
  """Builds a dataset unless it is there, and returns it opened for reading."""
  path = builder.data_path
  if not path.exists():
    with quiet():
      builder.download_and_prepare()
    metadata = cast(tfds.core.MetadataDict, builder.info.metadata)
    _log.info('%s: %s', builder.name, metadata['counts'])
  # Without its class, so that worker processes can unpickle it.
  with quiet():
    builder = tfds.builder_from_directory(path)
  written = cast(tfds.core.MetadataDict, builder.info.metadata)['counts']
  for name in builder.info.splits:
    found = len(open_split(builder, name))
    assert found == written[name], (path, name, found, written)
  return builder


def open_split(builder: Any, split: str) -> Any:
  """Returns the examples of a split, by index."""
  return builder.as_data_source(split=split)


def installed_docs_builder(data_dir: str) -> tfds.core.DatasetBuilder:
  """Returns the builder of this machine's documentation."""
  config = tfds.core.BuilderConfig(name=installed_docs.key())
  return _make(InstalledDocs, data_dir, config)


def text_files_builder(
  data_dir: str, files: str, text_field: str, target_field: str | None
) -> tfds.core.DatasetBuilder:
  """Returns the builder of the files that `files` matches now."""
  paths = text_files.find(files)
  config = TextFilesConfig(
    name=text_files.key(paths, text_field, target_field),
    paths=tuple(paths),
    text_field=text_field,
    target_field=target_field,
  )
  return _make(TextFiles, data_dir, config)


def _make(cls, data_dir: str, config: tfds.core.BuilderConfig):
  with quiet():
    return cls(data_dir=data_dir, config=config, file_format=FILE_FORMAT)


@contextlib.contextmanager
def quiet():
  """Holds back what TFDS prints and logs, errors excepted."""
  tfds.disable_progress_bar()
  level = absl_logging.get_verbosity()
  absl_logging.set_verbosity(absl_logging.ERROR)
  try:
    with contextlib.redirect_stdout(io.StringIO()):
      yield
  finally:
    absl_logging.set_verbosity(level)
