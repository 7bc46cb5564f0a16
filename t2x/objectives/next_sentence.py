"""Next-sentence prediction with masked tokens, the joint objective of BERT.

Shape suffixes: B rows, T tokens of a row.
"""

import dataclasses
from typing import ClassVar

import numpy as np

from t2x.objectives import masked_lm
from t2x.objectives import masking as masking_lib
from t2x.objectives import objective
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib

FOLLOWS, WRONG = 0, 1  # The two classes, as BERT's release numbers them.


@dataclasses.dataclass(frozen=True, kw_only=True)
class NextSentence(objective.Objective):
  """Predicts whether text B follows text A, and masked tokens of both.

  A row is <bos> A <eos> B <eos>, made from one document that is cut after a
  sentence; the class is predicted at its first token. If B does not follow A,
  the weights `random`, `hard` and `swapped` say what replaces it. Random alone
  is the task of BERT (Devlin et al., 2019), swapped alone is the sentence order
  prediction of ALBERT (Lan et al., 2020). The topic of a text does not give
  away swapped and hard negatives.

  Attributes:
    masked: the masked language modelling of both texts.
    positive: share of the rows whose B follows A.
    random: weight of a B from another document.
    hard: weight of a B from elsewhere in the same document; if there is no
      other place, A and B are swapped.
    swapped: weight of A and B in the wrong order.
  """

  masked: masked_lm.MaskedLM = masked_lm.MaskedLM()
  positive: float = 0.5
  random: float = 1.0
  hard: float = 0.0
  swapped: float = 0.0

  kind: ClassVar[str] = 'next_sentence'
  follows_text: ClassVar[bool] = False

  def __post_init__(self) -> None:
    if not 0 < self.positive < 1:
      raise ValueError(
        f'data.objective.positive={self.positive} must be between 0 and 1, '
        'both excluded: with one class alone there is nothing to tell.'
      )
    negatives = self.random, self.hard, self.swapped
    if min(negatives) < 0 or sum(negatives) <= 0:
      raise ValueError(
        f'data.objective: the weights random={self.random}, hard={self.hard}, '
        f'swapped={self.swapped} must not be negative, and not all 0.'
      )

  @property
  def token_masking(self) -> masking_lib.Config:
    return self.masked.token_masking

  @property
  def drops_tokens(self) -> bool:
    return self.masked.drops_tokens

  @property
  def draws_once(self) -> bool:
    return self.masked.draws_once

  def source_length(self, length: int) -> int:
    """Returns the largest number of raw tokens of A and B in a row."""
    return length - 3

  def lengths(self, length: int) -> dict[str, int]:
    """Returns the length of a row in each array of a batch, by name."""
    more = {'token_types': length, 'sentence_targets': 1, 'sentence_weights': 1}
    return self.masked.lengths(length) | more

  def check(self, length: int) -> None:
    """Raises a ValueError if a row has no room for two sentences."""
    if length < 8:
      raise ValueError(
        f'data.length={length} has no room for two sentences and three special '
        'tokens. Set it to 8 or more.'
      )
    self.masked.check(length)

  def examples(
    self,
    source: rows_lib.Rows,
    types_BT: np.ndarray,
    wrong_B: np.ndarray,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the batch of rows of two sentences.

    Args:
      source: raw rows, as `t2x.data.sentences` makes them.
      types_BT: token types, 0 in A and 1 in B.
      wrong_B: whether B does not follow A.
      keys: (B,) uint64 keys of the random draws.
      vocab: vocabulary of the tokenizer.
      length: number of tokens in a row.
    """
    batch = self.masked.examples(source, keys=keys, vocab=vocab, length=length)
    is_row_B = source.segments[:, 0] != 0
    return batch | {
      'token_types': types_BT.astype(np.int32),
      'sentence_targets': np.where(wrong_B, WRONG, FOLLOWS)[:, None].astype(
        np.int32
      ),
      'sentence_weights': is_row_B[:, None].astype(np.float32),
    }
