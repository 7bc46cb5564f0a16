"""Rows of two texts, for next-sentence prediction.

A document is cut into chunks of whole sentences that fit a row. A chunk is cut
once more, into texts A and B, after any of its sentences.

Shape suffixes: B rows, T tokens of a row, V vocabulary.
"""

import functools

import numpy as np

from t2x.data import config as config_lib
from t2x.data import counts
from t2x.data import layouts
from t2x.data import token_store
from t2x.objectives import next_sentence
from t2x.objectives import noise
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib

_STREAM = 32  # Stream of random numbers; maskings use those below.


class SentencePairs(layouts.OneGroup):
  """One chunk of a document per row; some rows have another text B.

  Raises:
    ValueError: if negatives come from other documents, and there is only one.
  """

  def __init__(
    self,
    config: config_lib.DataConfig,
    stream: token_store.TokenStream,
    vocab: vocab_lib.Vocab,
  ):
    assert isinstance(config.objective, next_sentence.NextSentence)
    self._objective = config.objective
    self._stream = stream
    self._vocab = vocab
    self._length = config.length
    self._room = config.objective.source_length(config.length)
    if self._objective.random and len(stream.offsets) < 3:
      raise ValueError(
        f'data.source={config.source!r} has {len(stream.offsets) - 1} document '
        'in a split, and data.objective.random='
        f'{self._objective.random} takes sentences of other documents. Give '
        'more documents, or set random=0 and hard or swapped above 0.'
      )

  @property
  def order(self) -> tuple:
    return 'sentences', self._length

  def count(self) -> counts.Count:
    """Returns the count of chunks, without the starts and ends of documents."""
    start, stop, document = self._chunks.T
    lengths = np.diff(self._stream.offsets) - 2
    lost = lengths.copy()
    np.subtract.at(lost, document, stop - start)
    return counts.of_lost(lengths, lost)

  def group_sizes(self) -> tuple[int, ...]:
    return (len(self._chunks),)

  def read(
    self, group: int, rows: np.ndarray, keys: np.ndarray
  ) -> tuple[rows_lib.Rows, np.ndarray, np.ndarray]:
    """Returns the rows, token types (1 in text B), and which B are wrong."""
    del group  # There is one.
    shape = len(rows), self._length
    tokens_BT, segments_BT, types_BT = np.zeros((3, *shape), np.int32)
    wrong_B = np.zeros(len(rows), bool)
    draws = noise.uniform(keys, 4, stream=_STREAM)
    for i in np.flatnonzero(rows >= 0):
      first, second, wrong_B[i] = self._pair(int(rows[i]), draws[i])
      bos, eos = self._vocab.bos, self._vocab.eos
      ids = [bos, *first, eos, *second, eos]
      tokens_BT[i, : len(ids)], segments_BT[i, : len(ids)] = ids, 1
      types_BT[i, len(first) + 2 : len(ids)] = 1
    return rows_lib.Rows(tokens_BT, segments_BT), types_BT, wrong_B

  def _pair(
    self, row: int, draws: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray, bool]:
    """Returns texts A and B, and whether B does not follow A."""
    start, stop, _ = self._chunks[row]
    cut = self._cut(start, stop, draws[0])
    tokens = self._stream.tokens
    first, second = tokens[start:cut], tokens[cut:stop]
    objective = self._objective
    if draws[1] < objective.positive:
      return first, second, False
    shares = np.cumsum([objective.random, objective.hard, objective.swapped])
    kind = np.searchsorted(shares / shares[-1], draws[2], side='right')
    other = self._other(row, int(kind), draws[3])
    if other is None:
      return second, first, True
    start, stop, _ = self._chunks[other]
    return first, tokens[start:stop][: self._room - len(first)], True

  def _cut(self, start: int, stop: int, draw: float) -> int:
    """Returns the place between texts A and B, after a sentence.

    In a chunk of one sentence, any place between two tokens.

    Args:
      start: place of the chunk's first token in the stream.
      stop: place after its last token.
      draw: a random number in [0, 1).
    """
    low, high = np.searchsorted(self._ends, (start, stop - 1), side='right')
    if low < high:
      return int(self._ends[low + int(draw * (high - low))])
    return start + 1 + int(draw * (stop - start - 1))

  def _other(self, row: int, kind: int, draw: float) -> int | None:
    """Returns the chunk of a wrong text B; None to swap A and B.

    Args:
      row: number of the chunk of text A.
      kind: 0 for a chunk of another document, 1 for one of the same document.
      draw: a random number in [0, 1).
    """
    document = self._chunks[:, 2]
    low, high = np.searchsorted(document, document[row] + np.array([0, 1]))
    num = len(document) - (high - low)
    if kind == 0 and num:
      other = int(draw * num)
      return other + (high - low) * (other >= low)
    # Chunks of the same document, except this one and the next.
    away = [i for i in range(low, high) if i not in (row, row + 1)]
    return away[int(draw * len(away))] if kind == 1 and away else None

  @functools.cached_property
  def _ends(self) -> np.ndarray:
    """The places after the last token of each sentence, ascending."""
    lexicon = self._vocab.lexicon
    assert lexicon is not None, 'a lexicon knows where sentences end'
    tokens = np.asarray(self._stream.tokens)
    # A run of end tokens (an ellipsis) ends one sentence.
    is_end = lexicon.ends_V[tokens]
    is_end[:-1] &= ~is_end[1:].copy()
    inside = np.flatnonzero(is_end) + 1
    return np.union1d(inside, self._stream.offsets[1:] - 1)

  @functools.cached_property
  def _chunks(self) -> np.ndarray:
    """(chunks, 3) start, stop and document of each chunk."""
    chunks, ends = [], self._ends
    offsets = self._stream.offsets
    for document in range(len(offsets) - 1):
      # Without the tokens that start and end a document.
      start, stop = int(offsets[document]) + 1, int(offsets[document + 1]) - 1
      while stop - start > 1:
        most = min(start + self._room, stop)
        last = np.searchsorted(ends, most, side='right') - 1
        cut = int(ends[last]) if last >= 0 else 0
        cut = cut if cut > start + 1 else most
        chunks.append((start, cut, document))
        start = cut
    return np.array(chunks, np.int64).reshape(-1, 3)
