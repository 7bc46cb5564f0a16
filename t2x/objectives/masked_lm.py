"""Masked language modelling (Devlin et al., 2019).

Shape suffixes: B rows, T tokens of a row, M tokens that are predicted.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from t2x.objectives import masking as masking_lib
from t2x.objectives import noise
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM:
  """Predicts a random `rate` of the tokens from all the others.

  A row has as many chosen tokens as BERT's: the nearest number to the rate, one
  at least. They alone reach the head, whose cost so falls with the rate.

  `masking` says which tokens are chosen together or more often than others.

  Of the chosen tokens, `mask_share` become <mask>, `random_share` a random
  token, and the rest stay as they are, so that the model cannot trust what it
  sees. Masks are drawn anew each time a row is visited (RoBERTa, Liu et al.,
  2019), or once for each row if `static`, as BERT's data has them.
  """

  rate: float = 0.15
  masking: masking_lib.Config = masking_lib.Tokens()
  static: bool = False
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
    if self.static and isinstance(self.masking, masking_lib.ByLoss):
      raise ValueError(
        'data.objective.static=true draws masks once, and masking=by_loss anew '
        'at each step. Set one of them.'
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

  def num_targets(self, length: int) -> int:
    """Positions of a row that reach the head, up to a multiple of 8."""
    return min(-(-max(round(self.rate * length), 1) // 8) * 8, length)

  def lengths(self, length: int) -> dict[str, int]:
    """How long the arrays of a batch are, by name."""
    few = dict.fromkeys(
      ('targets', 'weights', 'target_positions'), self.num_targets(length)
    )
    # What a step needs to mask by itself.
    by_loss = isinstance(self.masking, masking_lib.ByLoss)
    more = ('originals', 'noised', 'maskable') if by_loss else ()
    return rows_lib.lengths(length) | few | dict.fromkeys(more, length)

  def check(self, length: int) -> None:
    """Raises ValueError where no token of a row would be predicted."""
    if self.rate * length < 0.5:
      raise ValueError(
        f'data.objective.rate={self.rate} of data.length={length} leaves no '
        'position to predict, rounded. Raise one of the two.'
      )

  def examples(
    self,
    source: rows_lib.Rows,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the batch of `source`; only text tokens are ever chosen."""
    tokens_BT, segments_BT = source
    T = tokens_BT.shape[1]
    is_text_BT = (segments_BT != 0) & (tokens_BT >= vocab.first_text_id)
    num_text_B = is_text_BT.sum(1)
    num_B = np.clip(np.round(self.rate * num_text_B), 1, num_text_B)
    is_chosen_BT = masking_lib.choose(
      self.masking,
      tokens_BT,
      segments_BT,
      is_text_BT,
      num_B.astype(np.int64),
      keys,
      vocab.lexicon,
    )
    places_BM, weights_BM = _places(is_chosen_BT, self.num_targets(length))

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
    batch = {
      'inputs': np.where(is_chosen_BT, noised_BT, tokens_BT).astype(np.int32),
      'targets': np.take_along_axis(tokens_BT, places_BM, axis=1),
      'weights': weights_BM,
      'target_positions': places_BM,
      'segments': segments_BT,
      'positions': rows_lib.positions(segments_BT),
    }
    if isinstance(self.masking, masking_lib.ByLoss):
      batch['originals'] = tokens_BT
      batch['noised'] = noised_BT.astype(np.int32)
      batch['maskable'] = is_text_BT.astype(np.int32)
    return batch


def _places(is_chosen_BT, num: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the places of the chosen tokens in order, and 1 for each."""
  # A stable sort has the chosen ones first, each in its order.
  places_BM = np.argsort(~is_chosen_BT, axis=1, kind='stable')[:, :num]
  weights_BM = np.take_along_axis(is_chosen_BT, places_BM, axis=1)
  return (
    np.where(weights_BM, places_BM, 0).astype(np.int32),
    weights_BM.astype(np.float32),
  )
