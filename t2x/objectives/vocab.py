"""The special ids of a vocabulary, of t2x's or a pretrained tokenizer."""

import dataclasses
import functools

import numpy as np

from t2x.objectives import lexicon as lexicon_lib

# Special ids of t2x's own tokenizers.
PAD = 0  # As in T5: padding (and the decoder's start), end and unknown.
EOS = 1
UNK = 2
BOS = 3
MASK = 4
NUM_NAMED = 5  # Sentinels follow, then the ids that stand for text.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocab:
  """The ids of a tokenizer.

  By default those of t2x's own tokenizers: special ids, then `num_sentinels`
  sentinels, then ids of text.

  >>> Vocab(size=361, num_sentinels=100).first_text_id
  105

  Attributes:
    size: number of ids.
    num_sentinels: number of sentinels of t2x's own tokenizers.
    eos: id of the token that ends a text.
    bos: id of the token that begins a text.
    mask: id of the mask token; None if there is none.
    start: id of the first decoder input of an encoder-decoder.
    sentinels: ids of <extra_id_0>, <extra_id_1>, ...; None for t2x's own.
    special: all ids that do not stand for text; None for t2x's own.
    lexicon: statistics of the tokens, for objectives that need them.
    labels: ids of the label of each class, for classification.
  """

  size: int
  num_sentinels: int = 100
  eos: int = EOS
  bos: int = BOS
  mask: int | None = MASK
  start: int = PAD
  sentinels: tuple[int, ...] | None = None
  special: tuple[int, ...] | None = None
  lexicon: lexicon_lib.Lexicon | None = dataclasses.field(
    default=None, compare=False
  )
  labels: tuple[tuple[int, ...], ...] = dataclasses.field(
    default=(), compare=False
  )

  @property
  def sentinel_ids(self) -> tuple[int, ...]:
    """Ids of <extra_id_0>, <extra_id_1>, ... in that order."""
    if self.sentinels is not None:
      return self.sentinels
    return tuple(range(NUM_NAMED, NUM_NAMED + self.num_sentinels))

  @property
  def first_text_id(self) -> int:
    """The first id of text in t2x's own tokenizers."""
    return NUM_NAMED + self.num_sentinels

  def is_text(self, tokens: np.ndarray) -> np.ndarray:
    """Returns a mask of the tokens that are text, of the shape of `tokens`."""
    if self.special is None:
      return tokens >= self.first_text_id
    return _is_text(self.size, self.special)[tokens]

  def draw(self, uniform: np.ndarray) -> np.ndarray:
    """Returns random ids of text, from uniform numbers in [0, 1)."""
    if self.special is None:
      num_text = self.size - self.first_text_id
      return self.first_text_id + np.floor(uniform * num_text)
    ids = np.flatnonzero(_is_text(self.size, self.special))
    return ids[np.floor(uniform * len(ids)).astype(int)]

  @property
  def mask_id(self) -> int:
    """The id of the mask token.

    Raises:
      ValueError: if there is none.
    """
    if self.mask is None:
      raise ValueError(
        'The tokenizer has no mask token, and the objective hides tokens '
        'behind one. Take another data.objective, such as causal_lm, or a '
        'tokenizer with a mask_token.'
      )
    return self.mask


@functools.lru_cache(maxsize=8)
def _is_text(size: int, special: tuple[int, ...]) -> np.ndarray:
  """Returns a mask of the ids that stand for text."""
  result = np.ones(size, bool)
  result[list(special)] = False
  return result
