"""Rows of documents that are noised one by one, for an encoder-decoder.

Shape suffixes: B rows, T tokens of a row.
"""

from collections.abc import Callable

import numpy as np

from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib

Pair = tuple[np.ndarray, np.ndarray]  # What the encoder and the decoder have.


def examples(
  source: rows_lib.Rows,
  uniform_BT: np.ndarray,
  *,
  lengths: tuple[int, int],
  sides: Callable[[int], tuple[int, int]],
  make: Callable[[np.ndarray, np.ndarray], Pair],
  vocab: vocab_lib.Vocab,
) -> dict[str, np.ndarray]:
  """Returns the encoder-decoder batch of `source`.

  Documents for which there is no room on one side are cut, or left out, on
  both.

  Args:
    source: raw rows.
    uniform_BT: numbers in [0, 1), as many for each token.
    lengths: of the encoder's and the decoder's rows.
    sides: number of a document's tokens -> the most ids on each side.
    make: a document's tokens and its numbers -> its ids on each side.
    vocab: only text tokens are given to `make`.
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


def _documents(tokens, segments, uniform, lengths, sides, make, vocab):
  """Yields each document's segment, and where its ids go on both sides."""
  used, each = [0, 0], len(uniform) // len(tokens)
  starts = np.flatnonzero(np.diff(segments, prepend=0) * (segments != 0))
  for start in starts:
    segment = segments[start]
    end = start + np.count_nonzero(segments == segment)
    text = tokens[start:end]
    text = text[vocab.is_text(text)]
    num, room = len(text), [n - u for n, u in zip(lengths, used)]
    while num and any(n > r for n, r in zip(sides(num), room)):
      num -= 1
    if not num:
      continue
    ids = make(text[:num], uniform[each * start : each * end])
    yield segment, list(zip(used, ids))
    used = [u + len(side) for u, side in zip(used, ids)]
