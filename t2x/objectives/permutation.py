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
  """Predicts the last tokens of a random order from all before them in it.

  The order leaves each token where it stands; it says who sees whom. Of a row,
  `rate` of the tokens are the last of its order and predicted (the paper's 1 /
  K, with K = 6 or 7), and `masking` says which are chosen together; those
  before them see each other. The model has two streams (`model.two_stream`):
  of a token that is predicted one sees it, for those after it, and one asks.
  """

  rate: float = 1 / 6
  masking: masking_lib.Config = masking_lib.Spans()

  kind: ClassVar[str] = 'permutation'

  def __post_init__(self):
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
    """How long the arrays of a batch are, by name."""
    seen: tuple[str, ...] = ('inputs', 'segments', 'positions', 'ranks')
    asked: tuple[str, ...] = ('targets', 'weights', *_ASKED)
    return dict.fromkeys(seen, length) | dict.fromkeys(
      asked, self._masked.num_targets(length)
    )

  def check(self, length: int) -> None:
    """Raises ValueError where no token of a row would be predicted."""
    self._masked.check(length)

  def examples(
    self,
    source: rows_lib.Rows,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the batch of `source`; only text tokens are ever predicted.

    Tokens that are not predicted have rank 0, the others 1, 2, ...; a token
    sees those of a rank not above its own.
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
    there = weights_BM > 0
    ranks_BT[rows_BM[there], places_BM[there]] = ranks_BM[there]
    positions_BT = rows_lib.positions(segments_BT)
    at = lambda a: np.take_along_axis(a, places_BM, axis=1)
    return {
      'inputs': tokens_BT,
      'segments': segments_BT,
      'positions': positions_BT,
      'ranks': ranks_BT.astype(np.int32),
      'targets': at(tokens_BT),
      'weights': weights_BM,
      'query_segments': at(segments_BT) * there,
      'query_positions': at(positions_BT),
      'query_places': places_BM,
      # One that asks does not see its own token.
      'query_ranks': (ranks_BM - 1).astype(np.int32),
    }


_ASKED: tuple[str, ...] = (
  'query_segments',
  'query_positions',
  'query_places',
  'query_ranks',
)
