"""Permutation language modelling (XLNet, Yang et al., 2019).

Shape suffixes: B rows, T tokens of a row, M tokens that are predicted.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from t2x.objectives import masked_lm
from t2x.objectives import masking as masking_lib
from t2x.objectives import noise
from t2x.objectives import objective
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Permutation(objective.Objective):
  """Predicts the last tokens of a random order from the tokens before them.

  Tokens keep their positions; the order says which token attends to which. The
  tokens that are not predicted come first and attend to each other. The model
  has two streams (`model.two_stream`): for each predicted token, the content
  stream sees it, for the tokens after it, and the query stream does not.

  Attributes:
    rate: share of the tokens that are predicted (1 / K in the paper, with K = 6
      or 7).
    masking: rule by which predicted tokens are chosen together.
  """

  rate: float = 1 / 6
  masking: masking_lib.Config = masking_lib.Spans()

  kind: ClassVar[str] = 'permutation'

  def __post_init__(self) -> None:
    assert self._masked  # Its construction checks the rate.
    if isinstance(self.masking, masking_lib.ByLoss):
      raise ValueError(
        'data.objective.masking=by_loss is for data.objective=masked_lm. Set '
        'another masking.'
      )

  @property
  def _masked(self) -> masked_lm.MaskedLM:
    return masked_lm.MaskedLM(rate=self.rate, masking=self.masking)

  def lengths(self, length: int) -> dict[str, int]:
    """Returns the length of a row in each array of a batch, by name."""
    seen: tuple[str, ...] = ('inputs', 'segments', 'positions', 'ranks')
    asked: tuple[str, ...] = ('targets', 'weights', *_ASKED)
    return dict.fromkeys(seen, length) | dict.fromkeys(
      asked, self._masked.num_targets(length)
    )

  def check(self, length: int) -> None:
    """Raises a ValueError if no token of a row would be predicted."""
    self._masked.check(length)

  def examples(
    self,
    source: rows_lib.Rows,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the batch made from raw rows; only text tokens are predicted.

    Tokens that are not predicted have rank 0, the others 1, 2, ...; a token
    attends to tokens whose rank is not above its own.
    """
    tokens_BT, segments_BT = source
    places_BM, weights_BM = self._masked.chosen(source, keys, vocab, length)
    num = places_BM.shape[1]
    drawn_BM = noise.uniform(keys, num, stream=3)
    # Places without a token to predict come last in the order of the draws.
    drawn_BM = np.where(weights_BM > 0, drawn_BM, 2.0)
    ranks_BM = drawn_BM.argsort(axis=1).argsort(axis=1) + 1
    ranks_BM = np.where(weights_BM > 0, ranks_BM, 0)
    ranks_BT = np.zeros_like(tokens_BT)
    rows_BM = np.arange(len(ranks_BM))[:, None] * np.ones((1, num), int)
    is_used = weights_BM > 0
    ranks_BT[rows_BM[is_used], places_BM[is_used]] = ranks_BM[is_used]
    positions_BT = rows_lib.positions(segments_BT)
    at = lambda a: np.take_along_axis(a, places_BM, axis=1)
    return {
      'inputs': tokens_BT,
      'segments': segments_BT,
      'positions': positions_BT,
      'ranks': ranks_BT.astype(np.int32),
      'targets': at(tokens_BT),
      'weights': weights_BM,
      'query_segments': at(segments_BT) * is_used,
      'query_positions': at(positions_BT),
      'query_places': places_BM,
      # A query does not attend to its own token.
      'query_ranks': (ranks_BM - 1).astype(np.int32),
    }


_ASKED: tuple[str, ...] = (
  'query_segments',
  'query_positions',
  'query_places',
  'query_ranks',
)
