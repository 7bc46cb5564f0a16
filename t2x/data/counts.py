"""How much of a split its rows hold."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t2x.data import token_store


class Count(NamedTuple):
  """What an epoch reads.

  Attributes:
    tokens: those in a row, on both sides where there are two.
    documents: or pairs.
    cut: documents that are not in rows whole.
    lost: tokens that are in no row.
    most: tokens that a document loses at the most.
  """

  tokens: int
  documents: int
  cut: int = 0
  lost: int = 0
  most: int = 0

  @property
  def text(self) -> str:
    """In words: what is read, and what is cut away."""
    read = f'{self.tokens:,} tokens'
    if not self.cut:
      return read
    return (
      f'{read} of {self.tokens + self.lost:,} ({self.cut:,} of '
      f'{self.documents:,} documents are cut, by {self.lost / self.cut:,.0f} '
      f'tokens on average and {self.most:,} at most)'
    )


def of_lost(lengths: np.ndarray, lost: np.ndarray) -> Count:
  """Returns the count of documents of which some tokens are in no row."""
  return Count(
    tokens=int((lengths - lost).sum()),
    documents=len(lost),
    cut=int((lost > 0).sum()),
    lost=int(lost.sum()),
    most=int(lost.max(initial=0)),
  )


def of_cut(streams: Sequence[token_store.Stream], room: int) -> Count:
  """Returns the count of documents cut to `room` tokens on each side."""
  lengths = np.stack([np.diff(s.offsets) for s in streams])
  lost = np.maximum(lengths - room, 0)
  return of_lost(lengths.sum(axis=0), lost.sum(axis=0))
