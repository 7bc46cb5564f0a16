"""The settings of the data pipeline, and questions that they answer."""

import dataclasses
import os
from typing import ClassVar

from t2x import field_checks
from t2x import files
from t2x.data import documents
from t2x.data import tokenizers
from t2x.objectives import causal_lm
from t2x.objectives import classification
from t2x.objectives import masked_lm
from t2x.objectives import mixture
from t2x.objectives import next_sentence
from t2x.objectives import permutation

Objective = mixture.Single | mixture.Mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pack:
  """Full rows: documents follow each other, and attend to themselves alone."""

  kind: ClassVar[str] = 'pack'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
  """Full rows in text order: row b continues row b of the batch before.

  For models with a memory of earlier rows (`model.memory`). Each row of a batch
  reads one part of the split from start to end, again and again.
  """

  kind: ClassVar[str] = 'stream'


FULL = Pack | Stream  # Documents follow each other in a row.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pad:
  """One document per row, cut to the row's length and padded.

  A row has the smallest of the bucket lengths that holds its document. Each
  batch comes from one bucket, so a step is compiled once for each.

  Attributes:
    buckets: row lengths, ascending; none means `DataConfig.length` alone.
  """

  buckets: tuple[int, ...] = ()

  kind: ClassVar[str] = 'pad'

  def __post_init__(self) -> None:
    if list(self.buckets) != sorted(set(self.buckets)) or any(
      b < 1 for b in self.buckets
    ):
      raise ValueError(
        f'data.batching.buckets={self.buckets} must be ascending positive '
        'lengths, such as (64, 128, 256).'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """The corpus to read, and how it becomes batches.

  Attributes:
    source: 'installed_docs', 'text_files', or the name of a TFDS dataset.
    files: comma-separated globs of .txt and .jsonl files, each also as .gz, for
      the source text_files.
    text_field: name of the field with the text (of pairs, the source text).
    target_field: name of the field with the target text of supervised pairs;
      None without pairs.
    duplicates: documents of the first two sources that are dropped as copies.
      `exact` drops byte-equal ones (of pairs, both sides equal); `near` also
      those that share many runs of words; `none` drops nothing. See
      `data.documents`.
    data_dir: directory of prepared data; None means $T2X_DATA_DIR, or
      ~/.cache/t2x.
    train_split: the split to train on; TFDS slices such as 'train[:90%]' work.
    eval_splits: the splits to evaluate on.
    length: number of tokens in a row.
    batch_size: number of rows in a step, over all hosts.
    tokenizer: the tokenizer that turns text into ids.
    batching: rule by which documents become rows.
    objective: the training objective, or a mixture of several.
    num_threads: number of threads that prepare batches ahead of time.
    num_workers: number of processes that prepare batches; 0 uses threads alone.
  """

  source: str = 'installed_docs'
  files: str = ''
  text_field: str = 'text'
  target_field: str | None = None
  duplicates: documents.Duplicates = 'exact'
  data_dir: str | None = None
  train_split: str = 'train'
  eval_splits: tuple[str, ...] = ('validation',)
  length: int = 256
  batch_size: int = 32
  tokenizer: tokenizers.Config = tokenizers.SentencePiece()
  batching: Pack | Stream | Pad = Pack()
  objective: Objective = causal_lm.CausalLM()
  num_threads: int = 1
  num_workers: int = 0

  def __post_init__(self) -> None:
    field_checks.least(
      self, 'data.', length=1, batch_size=1, num_threads=0, num_workers=0
    )


def buckets(config: DataConfig) -> tuple[int, ...]:
  """Returns the row lengths that batches can have, ascending."""
  if isinstance(config.batching, Pad) and config.batching.buckets:
    return config.batching.buckets
  return (config.length,)


def is_full(config: DataConfig) -> bool:
  """Returns whether every place of a row holds a token."""
  return all(
    isinstance(part.batching, FULL) and not part.objective.paired
    for part in parts(config).values()
  )


def parts(config: DataConfig) -> dict[str, DataConfig]:
  """Returns the settings of each task of a mixture, by the task's name.

  Without a mixture, returns `config` itself under the empty name.
  """
  if not isinstance(config.objective, mixture.Mixture):
    return {'': config}
  configs = {}
  for task in config.objective.tasks:
    names = ('source', 'files', 'text_field', 'target_field', 'duplicates')
    given = {name: getattr(task, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(task.objective, ONE_A_ROW):
      given['batching'] = Pad()
    configs[task.name] = dataclasses.replace(
      config, objective=task.objective, **given
    )
  return configs


# Objectives that may leave no position of a row to predict.
CHECKED = (
  masked_lm.MaskedLM | next_sentence.NextSentence | permutation.Permutation
)
# Objectives with one text per row, not pieces of consecutive documents.
ONE_A_ROW = next_sentence.NextSentence | classification.Classification


def target_length(config: DataConfig) -> int:
  """Returns the number of positions per row that a decoder's layers compute."""
  return config.objective.lengths(config.length)['inputs']


def num_targets(config: DataConfig, length: int) -> int:
  """Returns how many positions of a row of `length` reach the output head."""
  return config.objective.lengths(length)['targets']


def directory(config: DataConfig) -> str:
  """Returns the path of the directory of prepared data."""
  return os.path.expanduser(config.data_dir or files.cache_directory())
