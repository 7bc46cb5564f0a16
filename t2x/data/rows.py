"""Layouts: how the documents of a split are arranged in rows.

A layout arranges documents in rows, in groups of equal row length, and reads
any rows of a group. Shape suffixes: B rows, T tokens of a row.
"""

import functools
from typing import Any

import numpy as np

from t2x.data import config as config_lib
from t2x.data import counts
from t2x.data import layouts
from t2x.data import sentences
from t2x.data import token_store
from t2x.objectives import classification
from t2x.objectives import next_sentence
from t2x.objectives import rows as rows_lib
from t2x.objectives import source_target
from t2x.objectives import vocab as vocab_lib

Streams = tuple[token_store.TokenStream, ...]


def make(
  config: config_lib.DataConfig,
  streams: Streams,
  vocab: vocab_lib.Vocab,
  *,
  full: bool = True,
) -> layouts.RowLayout:
  """Returns the layout that the objective and the batching ask for.

  Args:
    config: settings of one task.
    streams: token streams of a split.
    vocab: vocabulary of the tokenizer.
    full: whether each group must fill a batch, as training needs.
  """
  if isinstance(config.objective, next_sentence.NextSentence):
    return sentences.SentencePairs(config, streams[0], vocab)
  if isinstance(config.batching, config_lib.Pad):
    return Padded(config, streams, full=full)
  if isinstance(config.objective, source_target.SourceTarget):
    return PackedPairs(config, streams)
  return Windows(config.objective, config.length, streams[0])


class Windows(layouts.OneGroup):
  """Full rows: row r begins at token r * stride of the split."""

  def __init__(
    self,
    objective: Any,
    length: int,
    stream: token_store.TokenStream,
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

  def group_sizes(self) -> tuple[int, ...]:
    overlap = self._source_length - self._stride
    return (-(-(self._stream.num_tokens - overlap) // self._stride),)

  def continues(self, rows: np.ndarray) -> np.ndarray:
    """Returns whether each row continues the document of the row before."""
    start = np.maximum(rows, 1) * self._stride
    ends = self._stream.offsets[1:]
    of = lambda token: np.searchsorted(ends, token, side='right')
    return (rows > 0) & (of(start - 1) == of(start))

  def read(
    self, group: int, rows: np.ndarray, keys: np.ndarray
  ) -> tuple[rows_lib.Rows, ...]:
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


class Padded(layouts.RowLayout):
  """One document per row, in the smallest bucket that holds it."""

  def __init__(
    self, config: config_lib.DataConfig, streams: Streams, *, full: bool = True
  ):
    self._streams = streams
    self._objective: Any = config.objective  # The objective of one task.
    self._least = config.batch_size if full else 0
    self._buckets = config_lib.buckets(config)

  @property
  def order(self) -> tuple:
    return 'padded', self._buckets, self._limits

  def count(self) -> counts.Count:
    # The second stream of a classification holds labels, which are no text.
    has_labels = isinstance(self._objective, classification.Classification)
    sides = 1 if has_labels else None
    return counts.of_cut(self._streams[:sides], self._limits[-1])

  @property
  def _limits(self) -> tuple[int, ...]:
    """The largest number of tokens of a document in each bucket."""
    return tuple(self._objective.source_length(b) for b in self._buckets)

  @functools.cached_property
  def _groups(self) -> list[tuple[int, np.ndarray]]:
    """The row length and the documents of each group.

    If groups must be full, the documents of a bucket that do not fill a batch
    join the next bucket, since a batch of them would repeat some.
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
    """Returns the numbers of the documents of a group, ascending."""
    return self._groups[group][1]

  def examples(self, group: int, rows: np.ndarray) -> np.ndarray:
    return np.where(rows >= 0, self.documents(group)[rows], -1)

  def read(
    self, group: int, rows: np.ndarray, keys: np.ndarray
  ) -> tuple[rows_lib.Rows, ...]:
    del keys  # Nothing is drawn.
    source_length = self._objective.source_length(self._groups[group][0])
    chosen = self.examples(group, rows)
    counts = (chosen >= 0).astype(np.int64)
    return tuple(
      _gather(s, chosen, counts, source_length) for s in self._streams
    )


class PackedPairs(layouts.OneGroup):
  """Rows of as many consecutive pairs as fit on both sides."""

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
    """The first pair of each row, followed by the number of pairs."""
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

  def group_sizes(self) -> tuple[int, ...]:
    return (len(self._firsts) - 1,)

  def read(
    self, group: int, rows: np.ndarray, keys: np.ndarray
  ) -> tuple[rows_lib.Rows, ...]:
    del group, keys  # There is one, and nothing is drawn.
    firsts = np.where(rows >= 0, self._firsts[rows], -1)
    counts = np.where(rows >= 0, np.diff(self._firsts)[rows], 0)
    return tuple(
      _gather(s, firsts, counts, self._length) for s in self._streams
    )


def _gather(
  stream: token_store.TokenStream,
  firsts: np.ndarray,
  counts: np.ndarray,
  length: int,
) -> rows_lib.Rows:
  """Returns rows of consecutive documents.

  Args:
    stream: the token stream.
    firsts: (B,) first document of each row.
    counts: (B,) number of documents in each row.
    length: number of tokens that each document is cut to.
  """
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
