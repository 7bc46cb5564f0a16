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
  """Predicts the rest of each document after a prefix of random length.

  As `CausalLM`, except that the tokens of the prefix attend to each other in
  both directions and are no targets.

  Attributes:
    least: smallest share of a document in its prefix.
    most: largest share; shares between the two are equally likely.
  """

  least: float = 0.0
  most: float = 1.0

  kind: ClassVar[str] = 'prefix_lm'

  def __post_init__(self) -> None:
    if not 0 <= self.least <= self.most <= 1:
      raise ValueError(
        f'data.objective.least={self.least}, most={self.most}: shares from 0 '
        'to 1, the least not above the most.'
      )

  def source_length(self, length: int) -> int:
    """Returns the number of raw tokens that a row of `length` is made from."""
    return length + 1

  def stride(self, length: int) -> int:
    """Returns the number of raw tokens between the starts of two rows."""
    return length

  def lengths(self, length: int) -> dict[str, int]:
    """Returns the length of a row in each array of a batch, by name."""
    return rows_lib.lengths(length) | {'prefix_ends': length}

  def examples(
    self,
    source: rows_lib.Rows,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the batch made from rows of `length + 1` tokens.

    `prefix_ends` holds for each token the place in its row where the prefix of
    its document ends.
    """
    batch = causal_lm.CausalLM().examples(
      source, keys=keys, vocab=vocab, length=length
    )
    segments_BT, positions_BT = batch['segments'], batch['positions']
    T = segments_BT.shape[1]
    place_T = np.arange(T)
    start_BT = place_T - positions_BT
    # The last token of the raw row counts, although it is only a target, so
    # that a document that just fits is as long as in a longer row.
    ends_BT = _ends(source.segments)[:, :-1]
    # One random number for each document: that of its first token.
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
  """Returns for each token the place after its document's last token."""
  T = segments_BT.shape[1]
  is_last_BT = np.ones(segments_BT.shape, bool)
  is_last_BT[:, :-1] = segments_lib.starts(segments_BT)[:, 1:]
  ends_BT = np.where(is_last_BT, np.arange(T) + 1, T)
  return np.minimum.accumulate(ends_BT[:, ::-1], axis=1)[:, ::-1]
