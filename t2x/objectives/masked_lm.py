"""Masked language modelling (Devlin et al., 2019).

Shape suffixes: B rows, T tokens of a row, M tokens that are predicted.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from t2x.objectives import choosing
from t2x.objectives import masking as masking_lib
from t2x.objectives import noise
from t2x.objectives import objective
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLM(objective.Objective):
  """Predicts a random share of the tokens from all the others.

  A row has as many chosen tokens as BERT's: the number nearest to the rate, and
  at least one. Only they reach the output head, so its cost falls with the
  rate. Some of them become <mask>, some become a random token, and the rest
  stay as they are, so that the model cannot rely on its inputs.

  Attributes:
    rate: share of the tokens that are predicted.
    masking: rule by which tokens are chosen together, or more often than
      others.
    static: whether masks are drawn once for each row, as in BERT's data, and
      not each time that a row is read (RoBERTa, Liu et al., 2019).
    dropped: whether the encoder does not see the chosen tokens at all, which
      lowers its cost by their rate. The model's `query_layers` then predict the
      tokens at their places (He et al., 2022, for images; Meng et al., 2024,
      for text). A row with too few chosen tokens is cut at its end.
    mask_share: share of the chosen tokens that become <mask>.
    random_share: share of the chosen tokens that become a random token.
  """

  rate: float = 0.15
  masking: masking_lib.Config = masking_lib.Tokens()
  static: bool = False
  dropped: bool = False
  mask_share: float = 0.8
  random_share: float = 0.1

  kind: ClassVar[str] = 'masked_lm'

  @property
  def token_masking(self) -> masking_lib.Config:
    return self.masking

  @property
  def drops_tokens(self) -> bool:
    return self.dropped

  @property
  def draws_once(self) -> bool:
    return self.static

  def __post_init__(self) -> None:
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
    if self.dropped and isinstance(self.masking, masking_lib.ByLoss):
      raise ValueError(
        'data.objective.dropped=true takes tokens out of rows before a step, '
        'and masking=by_loss chooses them in it. Set one of them.'
      )

  def num_targets(self, length: int) -> int:
    """Returns how many positions of a row reach the head, a multiple of 8."""
    return _room(max(round(self.rate * length), 1), length)

  def num_left(self, length: int) -> int:
    """Returns how many positions the encoder sees, a multiple of 8."""
    if not self.dropped:
      return length
    return _room(length - round(self.rate * length), length)

  def lengths(self, length: int) -> dict[str, int]:
    """Returns the length of a row in each array of a batch, by name."""
    if self.dropped:
      left = dict.fromkeys(_SEEN, self.num_left(length))
      return left | dict.fromkeys(_ASKED, self.num_targets(length))
    predicted = dict.fromkeys(
      ('targets', 'weights', 'target_positions'), self.num_targets(length)
    )
    if not isinstance(self.masking, masking_lib.ByLoss):
      return rows_lib.lengths(length) | predicted
    # Arrays from which a training step draws masks itself.
    more = dict.fromkeys(('originals', 'noised', 'maskable'), length)
    return rows_lib.lengths(length) | predicted | more | {'mask_keys': 1}

  def check(self, length: int) -> None:
    """Raises a ValueError if no token of a row would be predicted."""
    if self.rate * length < 0.5:
      raise ValueError(
        f'data.objective.rate={self.rate} of data.length={length} leaves no '
        'position to predict, rounded. Raise one of the two.'
      )

  def chosen(
    self,
    source: rows_lib.Rows,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns the places of the tokens to predict, in order, and weights."""
    return _places(self._choose(source, keys, vocab), self.num_targets(length))

  def _choose(
    self, source: rows_lib.Rows, keys: np.ndarray, vocab: vocab_lib.Vocab
  ) -> np.ndarray:
    """Returns a mask of the tokens to predict, all of them text, (B, T)."""
    tokens_BT, segments_BT = source
    is_text_BT = _is_text(source, vocab)
    num_text_B = is_text_BT.sum(1)
    num_B = np.clip(np.round(self.rate * num_text_B), 1, num_text_B)
    if self.dropped:
      # The tokens that are left must fit, even if the row is full; a longer
      # row of the same document drops as many.
      used_B = (segments_BT != 0).sum(1)
      rooms = [self.num_left(n) for n in range(tokens_BT.shape[1] + 1)]
      needed_B = used_B - np.array(rooms)[used_B]
      num_B = np.minimum(np.maximum(num_B, needed_B), num_text_B)
    return choosing.choose(
      self.masking,
      tokens_BT,
      segments_BT,
      is_text_BT,
      num_B.astype(np.int64),
      keys,
      vocab.lexicon,
    )

  def examples(
    self,
    source: rows_lib.Rows,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the batch made from raw rows; only text tokens are predicted.

    Args:
      source: raw rows, tokens and segments (B, T).
      keys: (B,) uint64 keys of the random draws, `noise.keys(seed, numbers)`.
      vocab: vocabulary, with a lexicon for maskings of words.
      length: number of tokens in a row, T.
    """
    tokens_BT, segments_BT = source
    T = tokens_BT.shape[1]
    is_chosen_BT = self._choose(source, keys, vocab)
    places_BM, weights_BM = _places(is_chosen_BT, self.num_targets(length))
    if self.dropped:
      is_left_BT = (segments_BT != 0) & ~is_chosen_BT
      left_BT, is_left_BT = _places(is_left_BT, self.num_left(length))
      left, asked = (left_BT, is_left_BT), (places_BM, weights_BM)
      return _without(source, left, asked, vocab.mask_id)

    random_BT = vocab.draw(noise.uniform(keys, T, stream=1))
    fate_BT = noise.uniform(keys, T, stream=2)
    noised_BT = np.where(fate_BT < self.mask_share, vocab.mask_id, tokens_BT)
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
      batch['maskable'] = _is_text(source, vocab).astype(np.int32)
      low_B1 = keys[:, None] & np.uint64(0x7FFFFFFF)
      batch['mask_keys'] = low_B1.astype(np.int32)
    return batch


# Places in a row, and 1 for each that is used, 0 for the others.
_Places = tuple[np.ndarray, np.ndarray]
_SEEN: tuple[str, ...] = 'inputs', 'segments', 'positions', 'places'
_ASKED: tuple[str, ...] = (
  'targets',
  'weights',
  'query_inputs',
  'query_segments',
  'query_positions',
  'query_places',
)


def _without(
  source: rows_lib.Rows, left: _Places, asked: _Places, mask: int
) -> dict[str, np.ndarray]:
  """Returns a batch of the tokens that are left, and queries for the others.

  Args:
    source: raw rows.
    left: places of the tokens that the encoder sees.
    asked: places of the tokens that are predicted.
    mask: id of the mask token.
  """
  arrays = *source, rows_lib.positions(source.segments)

  def at(where: _Places) -> tuple[np.ndarray, ...]:
    places, is_there = where
    is_there = is_there.astype(np.int32)
    taken = (np.take_along_axis(a, places, axis=1) * is_there for a in arrays)
    return *taken, places

  targets, *queries = at(asked)
  batch = dict(zip(_SEEN, at(left)))
  inputs = np.full_like(targets, mask)
  return batch | dict(
    zip(_ASKED, (targets, asked[1], inputs, *queries), strict=True)
  )


def _room(num: int, length: int) -> int:
  """Returns `num` rounded up to a multiple of 8, at most `length`."""
  return min(-(-num // 8) * 8, length)


def _is_text(source: rows_lib.Rows, vocab: vocab_lib.Vocab) -> np.ndarray:
  """Returns a mask of the tokens that are text, (B, T)."""
  return (source.segments != 0) & vocab.is_text(source.tokens)


def _places(
  is_chosen_BT: np.ndarray, num: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns `num` places, the chosen tokens first in order, and weights."""
  # A stable sort puts the chosen tokens first and keeps their order.
  places_BM = np.argsort(~is_chosen_BT, axis=1, kind='stable')[:, :num]
  weights_BM = np.take_along_axis(is_chosen_BT, places_BM, axis=1)
  return (
    np.where(weights_BM, places_BM, 0).astype(np.int32),
    weights_BM.astype(np.float32),
  )
