"""Counts of the documents and tokens of a split that its rows hold."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from t2x.data import token_store


class Count(NamedTuple):
  """The documents and tokens that an epoch reads.

  Attributes:
    tokens: number of tokens in rows, both sides of pairs included.
    documents: number of documents, or of pairs.
    cut: number of documents that lose some of their tokens.
    lost: number of tokens that are in no row.
    most: largest number of tokens that one document loses.
  """

  tokens: int
  documents: int
  cut: int = 0
  lost: int = 0
  most: int = 0

  @property
  def text(self) -> str:
    """A phrase that says how many tokens are read and how many are cut off."""
    read = f'{self.tokens:,} tokens'
    if not self.cut:
      return read
    return (
      f'{read} of {self.tokens + self.lost:,} ({self.cut:,} of '
      f'{self.documents:,} documents are cut, by {self.lost / self.cut:,.0f} '
      f'tokens on average and {self.most:,} at most)'
    )


def of_lost(lengths: np.ndarray, lost: np.ndarray) -> Count:
  """Returns the count of documents that lose some of their tokens.

  Args:
    lengths: (documents,) number of tokens of each document.
    lost: (documents,) number of tokens of each that are in no row.
  """
  return Count(
    tokens=int((lengths - lost).sum()),
    documents=len(lost),
    cut=int((lost > 0).sum()),
    lost=int(lost.sum()),
    most=int(lost.max(initial=0)),
  )


def of_cut(streams: Sequence[token_store.TokenStream], room: int) -> Count:
  """Returns the count of documents that are cut to a number of tokens.

  Args:
    streams: the token stream, or those of both sides of pairs.
    room: largest number of tokens that is kept on each side.
  """
  lengths = np.stack([np.diff(s.offsets) for s in streams])
  lost = np.maximum(lengths - room, 0)
  return of_lost(lengths.sum(axis=0), lost.sum(axis=0))
