"""Encoder-decoder batches of documents that are noised one by one.

Shape suffixes: B rows, T tokens of a row.
"""

from collections.abc import Callable
from collections.abc import Iterator

import numpy as np

from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib

Pair = tuple[np.ndarray, np.ndarray]  # Ids of the encoder and the decoder.


def examples(
  source: rows_lib.Rows,
  uniform_BT: np.ndarray,
  *,
  lengths: tuple[int, int],
  sides: Callable[[int], tuple[int, int]],
  make: Callable[[np.ndarray, np.ndarray], Pair],
  vocab: vocab_lib.Vocab,
) -> dict[str, np.ndarray]:
  """Returns the encoder-decoder batch made from raw rows.

  A document that does not fit on one side is cut, or left out, on both.

  Args:
    source: raw rows.
    uniform_BT: random numbers in [0, 1), the same number for each token.
    lengths: row lengths of the encoder and the decoder.
    sides: function from a document's number of tokens to the largest number of
      ids on each side.
    make: function from a document's text tokens and its random numbers to its
      ids on each side.
    vocab: vocabulary of the tokenizer.
  """
  encoder, decoder = (
    rows_lib.Rows(
      np.zeros((len(uniform_BT), n), np.int32),
      np.zeros((len(uniform_BT), n), np.int32),
    )
    for n in lengths
  )
  for row, uniform in enumerate(uniform_BT):
    parts = source.tokens[row], source.segments[row], uniform
    for segment, pair in _documents(*parts, lengths, sides, make, vocab):
      for side, (start, ids) in zip((encoder, decoder), pair):
        to = slice(start, start + len(ids))
        side.tokens[row, to], side.segments[row, to] = ids, segment
  return rows_lib.encoder_decoder(encoder, decoder, vocab.start)


def _documents(
  tokens: np.ndarray,
  segments: np.ndarray,
  uniform: np.ndarray,
  lengths: tuple[int, int],
  sides: Callable[[int], tuple[int, int]],
  make: Callable[[np.ndarray, np.ndarray], Pair],
  vocab: vocab_lib.Vocab,
) -> Iterator[tuple[int, list[tuple[int, np.ndarray]]]]:
  """Yields the segment of each document, and (place, ids) on both sides."""
  used, each = [0, 0], len(uniform) // len(tokens)
  starts = np.flatnonzero(np.diff(segments, prepend=0) * (segments != 0))
  for start in starts:
    segment = segments[start]
    end = start + np.count_nonzero(segments == segment)
    document = tokens[start:end]
    document = document[vocab.is_text(document)]
    num, room = len(document), [n - u for n, u in zip(lengths, used)]
    while num and any(n > r for n, r in zip(sides(num), room)):
      num -= 1
    if not num:
      continue
    ids = make(document[:num], uniform[each * start : each * end])
    yield segment, list(zip(used, ids))
    used = [u + len(side) for u, side in zip(used, ids)]
