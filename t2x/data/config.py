"""The settings of the data side."""

import dataclasses
import os
from typing import ClassVar

from t2x import field_checks
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
  """Rows are full: documents follow each other and do not see each other."""

  kind: ClassVar[str] = 'pack'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
  """As `Pack`, in order: row b of a step goes on where row b ended before.

  For models that remember (`model.memory`). Each of the rows of a batch reads a
  part of the split from start to end, then again.
  """

  kind: ClassVar[str] = 'stream'


FULL = Pack | Stream  # Documents follow each other in a row.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pad:
  """One document a row, cut to the row and padded to the smallest bucket.

  Each batch comes from one bucket, so a step compiles once for each.

  Attributes:
    buckets: row lengths, ascending; none means `DataConfig.length` alone.
  """

  buckets: tuple[int, ...] = ()

  kind: ClassVar[str] = 'pad'

  def __post_init__(self):
    if list(self.buckets) != sorted(set(self.buckets)) or any(
      b < 1 for b in self.buckets
    ):
      raise ValueError(
        f'data.batching.buckets={self.buckets} must be ascending positive '
        'lengths, such as (64, 128, 256).'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """What to read, and how it becomes batches.

  Attributes:
    source: 'installed_docs', 'text_files', or the name of a TFDS dataset.
    files: for text_files, comma-separated globs of .txt and .jsonl files, each
      also as .gz.
    text_field: the field with the text (or, for pairs, the source's text).
    target_field: for supervised pairs, the field with the target's text.
    duplicates: which documents of the first two sources are dropped as copies:
      `exact`, byte-equal ones (of pairs, both sides equal); `near`, those too
      that share many runs of words; `none`. See `data.documents`.
    data_dir: where prepared data is kept; None means $T2X_DATA_DIR, or
      ~/.cache/t2x.
    train_split: the split to train on; TFDS slices such as 'train[:90%]' work.
    eval_splits: the splits to evaluate on.
    length: tokens a row.
    batch_size: rows a step, over all hosts.
    tokenizer: how text becomes ids.
    batching: how documents become rows.
    objective: what is predicted.
    num_threads: threads that prepare batches ahead of time.
    num_workers: processes that do; 0 means that threads suffice.
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

  def __post_init__(self):
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
    isinstance(own.batching, FULL) and not own.objective.paired
    for own in parts(config).values()
  )


def parts(config: DataConfig) -> dict[str, DataConfig]:
  """Returns the data of each task of a mixture; else itself, without a name."""
  if not isinstance(config.objective, mixture.Mixture):
    return {'': config}
  found = {}
  for task in config.objective.tasks:
    own = ('source', 'files', 'text_field', 'target_field', 'duplicates')
    given = {name: getattr(task, name) for name in own}
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(task.objective, ONE_A_ROW):
      given['batching'] = Pad()
    found[task.name] = dataclasses.replace(
      config, objective=task.objective, **given
    )
  return found


# They may leave no position of a row to predict.
CHECKED = (
  masked_lm.MaskedLM | next_sentence.NextSentence | permutation.Permutation
)
# Their rows are no pieces of documents that follow each other.
ONE_A_ROW = next_sentence.NextSentence | classification.Classification


def target_length(config: DataConfig) -> int:
  """Returns the positions of a whole row that layers compute; a decoder's."""
  return config.objective.lengths(config.length)['inputs']


def num_targets(config: DataConfig, length: int) -> int:
  """Returns the positions of a row of `length` that reach the head."""
  return config.objective.lengths(length)['targets']


def directory(config: DataConfig) -> str:
  """Returns where prepared data is kept."""
  default = os.environ.get('T2X_DATA_DIR') or '~/.cache/t2x'
  return os.path.expanduser(config.data_dir or default)
