"""Masked language modelling (Devlin et al., 2019).

Shape suffixes: B rows, T tokens of a row.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from t2x.objectives import noise
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM:
  """Predicts a random `rate` of the tokens from all the others.

  Of the chosen tokens, `mask_share` become <mask>, `random_share` a random
  token, and the rest stay as they are, so that the model cannot trust what it
  sees. Masks are drawn anew each time a row is visited (RoBERTa, Liu et al.,
  2019).
  """

  rate: float = 0.15
  mask_share: float = 0.8
  random_share: float = 0.1

  kind: ClassVar[str] = 'masked_lm'
  has_encoder: ClassVar[bool] = False
  paired: ClassVar[bool] = False

  def __post_init__(self):
    if not 0 < self.rate < 1:
      raise ValueError(
        f'data.objective.rate={self.rate} must be between 0 and 1, both '
        'excluded; BERT uses 0.15.'
      )
    shares = self.mask_share, self.random_share
    if min(shares) < 0 or sum(shares) > 1 + 1e-9:
      raise ValueError(
        f'data.objective.mask_share={self.mask_share} and random_share='
        f'{self.random_share} must not be negative nor add up to more than 1; '
        'what they leave is kept unchanged.'
      )

  def source_length(self, length: int) -> int:
    """Raw tokens that one row of `length` is made from."""
    return length

  def stride(self, length: int) -> int:
    """Raw tokens from the start of one row to the start of the next."""
    return length

  def target_length(self, length: int) -> int:
    """Targets of a row of `length`."""
    return length

  def examples(
    self,
    source: rows_lib.Rows,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the batch of `source`; only text tokens are ever chosen."""
    del length
    tokens_BT, segments_BT = source
    T = tokens_BT.shape[1]
    is_text_BT = (segments_BT != 0) & (tokens_BT >= vocab.first_text_id)
    is_chosen_BT = is_text_BT & (noise.uniform(keys, T, stream=0) < self.rate)

    num_text = vocab.size - vocab.first_text_id
    random_BT = vocab.first_text_id + np.floor(
      noise.uniform(keys, T, stream=1) * num_text
    )
    fate_BT = noise.uniform(keys, T, stream=2)
    noised_BT = np.where(fate_BT < self.mask_share, vocab_lib.MASK, tokens_BT)
    is_random_BT = (fate_BT >= self.mask_share) & (
      fate_BT < self.mask_share + self.random_share
    )
    noised_BT = np.where(is_random_BT, random_BT, noised_BT)
    return {
      'inputs': np.where(is_chosen_BT, noised_BT, tokens_BT).astype(np.int32),
      'targets': tokens_BT,
      'weights': is_chosen_BT.astype(np.float32),
      'segments': segments_BT,
      'positions': rows_lib.positions(segments_BT),
    }
