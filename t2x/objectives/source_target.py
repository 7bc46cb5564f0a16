"""Supervised pairs, such as translations, for an encoder-decoder."""

import dataclasses
from typing import ClassVar

import numpy as np

from t2x.objectives import objective
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceTarget(objective.Objective):
  """Predicts every token of the target text, given the source text.

  Both sides end with <eos> and hold at most `length` tokens. In a packed row
  the n-th source and the n-th target carry the same segment number.
  """

  kind: ClassVar[str] = 'source_target'
  follows_text: ClassVar[bool] = False
  has_encoder: ClassVar[bool] = True
  paired: ClassVar[bool] = True

  def lengths(self, length: int) -> dict[str, int]:
    """Returns the length of a row in each array of a batch, by name."""
    return rows_lib.encoder_decoder_lengths(length, length)

  def examples(
    self,
    source: rows_lib.Rows,
    target: rows_lib.Rows,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the encoder-decoder batch of rows of sources and targets."""
    del keys, length  # Nothing is random here.
    return rows_lib.encoder_decoder(source, target, vocab.start)
