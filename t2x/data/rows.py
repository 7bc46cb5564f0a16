"""Which tokens stand in which row.

A layout deals the documents of a corpus to rows, in groups of equal length, and
reads any rows of a group. Shape suffixes: B rows, T tokens of a row.
"""

import functools
from typing import Any
from typing import Protocol

import numpy as np

from t2x.data import config as config_lib
from t2x.data import counts
from t2x.data import sentences
from t2x.data import token_store
from t2x.objectives import classification
from t2x.objectives import next_sentence
from t2x.objectives import rows as rows_lib
from t2x.objectives import source_target
from t2x.objectives import vocab as vocab_lib

Streams = tuple[token_store.Stream, ...]


class Layout(Protocol):
  """Rows by group and number."""

  @property
  def order(self) -> tuple:
    """What decides which tokens a row has, but for those of the split."""
    ...

  def count(self) -> counts.Count:
    """Returns what is read in an epoch."""
    ...

  def group_lengths(self) -> tuple[int, ...]:
    """The row length of each group, ascending."""
    ...

  def group_sizes(self) -> tuple[int, ...]:
    """The number of rows in each group."""
    ...

  def examples(self, group: int, rows: np.ndarray) -> np.ndarray:
    """Returns the numbers of these rows in the split, whatever their group."""
    ...

  def read(self, group: int, rows: np.ndarray, keys: np.ndarray) -> tuple:
    """Returns what the objective takes of these rows.

    Args:
      group: the rows' group.
      rows: their numbers; a row of -1 is empty.
      keys: of what is drawn at random, one a row.
    """
    ...


def make(
  config: config_lib.DataConfig,
  streams: Streams,
  vocab: vocab_lib.Vocab,
  *,
  full: bool = True,
) -> Layout:
  """Returns the layout that `config` asks for.

  Args:
    config: of one task.
    streams: of a split.
    vocab: of the tokenizer.
    full: each group fills a batch, as training needs it.
  """
  if isinstance(config.objective, next_sentence.NextSentence):
    return sentences.SentencePairs(config, streams[0], vocab)
  if isinstance(config.batching, config_lib.Pad):
    return Padded(config, streams, full=full)
  if isinstance(config.objective, source_target.SourceTarget):
    return PackedPairs(config, streams)
  return Windows(config.objective, config.length, streams[0])


class Windows:
  """Full rows: row r begins at token r * stride of the whole split."""

  def __init__(
    self,
    objective: Any,
    length: int,
    stream: token_store.Stream,
  ):
    self._stream = stream
    self._length = length
    self._source_length = objective.source_length(length)
    self._stride = objective.stride(length)

  @property
  def order(self) -> tuple:
    return 'full', self._source_length, self._stride

  def count(self) -> counts.Count:
    return counts.Count(self._stream.num_tokens, self._stream.num_documents)

  def group_lengths(self) -> tuple[int, ...]:
    return (self._length,)

  def group_sizes(self) -> tuple[int, ...]:
    overlap = self._source_length - self._stride
    return (-(-(self._stream.num_tokens - overlap) // self._stride),)

  def examples(self, group: int, rows: np.ndarray) -> np.ndarray:
    del group  # There is one.
    return rows

  def continues(self, rows: np.ndarray) -> np.ndarray:
    """Returns whether each row goes on with the document of the one before."""
    start = np.maximum(rows, 1) * self._stride
    ends = self._stream.offsets[1:]
    of = lambda token: np.searchsorted(ends, token, side='right')
    return (rows > 0) & (of(start - 1) == of(start))

  def read(self, group: int, rows: np.ndarray, keys: np.ndarray):
    del group, keys  # There is one, and nothing is drawn.
    starts_B1 = rows[:, None] * self._stride
    index_BT = starts_B1 + np.arange(self._source_length)
    is_token_BT = (rows[:, None] >= 0) & (index_BT < self._stream.num_tokens)
    index_BT = np.where(is_token_BT, index_BT, 0)
    ends = self._stream.offsets[1:]
    document_BT = np.searchsorted(ends, index_BT, side='right')
    segments_BT = document_BT - document_BT[:, :1] + 1
    tokens_BT = np.where(
      is_token_BT, self._stream.tokens[index_BT], vocab_lib.PAD
    )
    segments_BT = np.where(is_token_BT, segments_BT, 0)
    return (
      rows_lib.Rows(tokens_BT.astype(np.int32), segments_BT.astype(np.int32)),
    )


class Padded:
  """One document a row, in the smallest bucket that holds it."""

  def __init__(
    self, config: config_lib.DataConfig, streams: Streams, *, full: bool = True
  ):
    self._streams = streams
    self._objective: Any = config.objective  # Of one task.
    self._least = config.batch_size if full else 0
    self._buckets = config_lib.buckets(config)

  @property
  def order(self) -> tuple:
    return 'padded', self._buckets, self._limits

  def count(self) -> counts.Count:
    # A label is no text that is read.
    labelled = isinstance(self._objective, classification.Classification)
    sides = 1 if labelled else None
    return counts.of_cut(self._streams[:sides], self._limits[-1])

  @property
  def _limits(self) -> tuple[int, ...]:
    """The most tokens of a document in each bucket."""
    return tuple(self._objective.source_length(b) for b in self._buckets)

  @functools.cached_property
  def _groups(self) -> list[tuple[int, np.ndarray]]:
    """The length and the documents of each group.

    Where groups are to be full, a bucket with less than a batch of documents
    is added to the next, as a batch of them would repeat some.
    """
    lengths = np.max([np.diff(s.offsets) for s in self._streams], axis=0)
    bucket = np.searchsorted(self._limits[:-1], lengths)
    groups = []
    waiting = np.zeros(0, np.int64)
    for i, length in enumerate(self._buckets):
      waiting = np.append(waiting, np.flatnonzero(bucket == i))
      if len(waiting) >= self._least:
        groups.append((length, np.sort(waiting)))
        waiting = waiting[:0]
    if len(waiting):
      if groups:
        waiting = np.append(groups.pop()[1], waiting)
      groups.append((self._buckets[-1], np.sort(waiting)))
    return groups

  def group_lengths(self) -> tuple[int, ...]:
    return tuple(length for length, _ in self._groups)

  def group_sizes(self) -> tuple[int, ...]:
    return tuple(len(documents) for _, documents in self._groups)

  def __len__(self) -> int:
    return len(self._groups)

  def documents(self, group: int) -> np.ndarray:
    """Returns the documents of a group, ascending."""
    return self._groups[group][1]

  def examples(self, group: int, rows: np.ndarray) -> np.ndarray:
    return np.where(rows >= 0, self.documents(group)[rows], -1)

  def read(self, group: int, rows: np.ndarray, keys: np.ndarray):
    del keys  # Nothing is drawn.
    source_length = self._objective.source_length(self._groups[group][0])
    chosen = self.examples(group, rows)
    counts = (chosen >= 0).astype(np.int64)
    return tuple(
      _gather(s, chosen, counts, source_length) for s in self._streams
    )


class PackedPairs:
  """As many neighbouring pairs a row as fit on both sides."""

  def __init__(self, config: config_lib.DataConfig, streams: Streams):
    self._streams = streams
    self._length = config.length

  @property
  def order(self) -> tuple:
    return 'pairs', self._length

  def count(self) -> counts.Count:
    return counts.of_cut(self._streams, self._length)

  @functools.cached_property
  def _firsts(self) -> np.ndarray:
    """The first pair of each row, and at the end the number of pairs."""
    ends = [
      np.cumsum(np.minimum(np.diff(s.offsets), self._length))
      for s in self._streams
    ]
    firsts = [0]
    while firsts[-1] < len(ends[0]):
      first = firsts[-1]
      used = [e[first - 1] if first else 0 for e in ends]
      # The first pair that no longer fits one of the sides.
      firsts.append(
        min(
          int(np.searchsorted(e, u + self._length, side='right'))
          for e, u in zip(ends, used)
        )
      )
    return np.array(firsts)

  def group_lengths(self) -> tuple[int, ...]:
    return (self._length,)

  def group_sizes(self) -> tuple[int, ...]:
    return (len(self._firsts) - 1,)

  def examples(self, group: int, rows: np.ndarray) -> np.ndarray:
    del group  # There is one.
    return rows

  def read(self, group: int, rows: np.ndarray, keys: np.ndarray):
    del group, keys  # There is one, and nothing is drawn.
    firsts = np.where(rows >= 0, self._firsts[rows], -1)
    counts = np.where(rows >= 0, np.diff(self._firsts)[rows], 0)
    return tuple(
      _gather(s, firsts, counts, self._length) for s in self._streams
    )


def _gather(
  stream: token_store.Stream,
  firsts: np.ndarray,
  counts: np.ndarray,
  length: int,
) -> rows_lib.Rows:
  """Returns rows of `counts` documents from `firsts` on, each cut to length."""
  tokens_BT = np.full((len(firsts), length), vocab_lib.PAD, np.int32)
  segments_BT = np.zeros((len(firsts), length), np.int32)
  for row, (first, count) in enumerate(zip(firsts, counts)):
    end = 0
    for i in range(count):
      start, stop = stream.offsets[first + i : first + i + 2]
      ids = stream.tokens[start : min(stop, start + length)]
      to = slice(end, end + len(ids))
      tokens_BT[row, to], segments_BT[row, to] = ids, i + 1
      end = to.stop
  return rows_lib.Rows(tokens_BT, segments_BT)
