"""Prefix language modelling (Liu et al., 2018; Raffel et al., 2020, 3.2).

Shape suffixes: B rows, T tokens of a row.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from t2x.objectives import causal_lm
from t2x.objectives import noise
from t2x.objectives import objective
from t2x.objectives import rows as rows_lib
from t2x.objectives import segments as segments_lib
from t2x.objectives import vocab as vocab_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixLM(objective.Objective):
  """Each document's first part is seen as a whole, its rest is predicted.

  As `CausalLM`, but that tokens of a prefix of random length see each other in
  both directions and are no targets.

  Attributes:
    least: share of a document that its prefix has at the least.
    most: at the most; between the two all shares are as likely.
  """

  least: float = 0.0
  most: float = 1.0

  kind: ClassVar[str] = 'prefix_lm'

  def __post_init__(self):
    if not 0 <= self.least <= self.most <= 1:
      raise ValueError(
        f'data.objective.least={self.least}, most={self.most}: shares from 0 '
        'to 1, the least not above the most.'
      )

  def source_length(self, length: int) -> int:
    """Raw tokens that one row of `length` is made from."""
    return length + 1

  def stride(self, length: int) -> int:
    """Raw tokens from the start of one row to the start of the next."""
    return length

  def lengths(self, length: int) -> dict[str, int]:
    """How long the arrays of a batch are, by name."""
    return rows_lib.lengths(length) | {'prefix_ends': length}

  def examples(
    self,
    source: rows_lib.Rows,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the batch of `source`, whose rows hold `length + 1` tokens.

    `prefix_ends` has for each token the place in its row where the prefix of
    its document ends.
    """
    parts = {'keys': keys, 'vocab': vocab, 'length': length}
    batch = causal_lm.CausalLM().examples(source, **parts)
    segments_BT, positions_BT = batch['segments'], batch['positions']
    T = segments_BT.shape[1]
    place_T = np.arange(T)
    start_BT = place_T - positions_BT
    # With the row's last token, which is a target alone: a document that just
    # fits is as long as in a longer row.
    ends_BT = _ends(source.segments)[:, :-1]
    # One number for each document: that of its first token.
    drawn_BT = np.take_along_axis(noise.uniform(keys, T), start_BT, axis=1)
    share_BT = self.least + drawn_BT * (self.most - self.least)
    size_BT = np.floor(share_BT * (ends_BT - start_BT)).astype(np.int64)
    prefix_BT = np.minimum(start_BT + size_BT, T)
    prefix_BT = np.where(segments_BT != 0, prefix_BT, 0)
    # The last token of a prefix predicts the first of the rest.
    weights_BT = batch['weights'] * (place_T >= prefix_BT - 1)
    return batch | {
      'weights': weights_BT.astype(np.float32),
      'prefix_ends': prefix_BT.astype(np.int32),
    }


def _ends(segments_BT: np.ndarray) -> np.ndarray:
  """Returns for each token the place after the last one of its document."""
  T = segments_BT.shape[1]
  is_last_BT = np.ones(segments_BT.shape, bool)
  is_last_BT[:, :-1] = segments_lib.starts(segments_BT)[:, 1:]
  ends_BT = np.where(is_last_BT, np.arange(T) + 1, T)
  return np.minimum.accumulate(ends_BT[:, ::-1], axis=1)[:, ::-1]
