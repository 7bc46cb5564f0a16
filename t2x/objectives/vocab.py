"""Which ids are special: those of t2x's own tokenizers, and of others'."""

import dataclasses
import functools

import numpy as np

from t2x.objectives import lexicon as lexicon_lib

# Of t2x's own tokenizers.
PAD = 0  # T5's ids for padding (also its decoder's start), end and unknown.
EOS = 1
UNK = 2
BOS = 3
MASK = 4
NUM_NAMED = 5  # Sentinels follow, then the ids that stand for text.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocab:
  """By default t2x's own: special ids, then `num_sentinels`, then text.

  `lexicon` is what is known of the tokens, and `labels` what the classes of
  texts are called (ids), for objectives that ask.

  >>> Vocab(size=361, num_sentinels=100).first_text_id
  105

  Attributes:
    size: ids in all.
    num_sentinels: of t2x's own.
    eos: ends a text.
    bos: begins a text.
    mask: stands for a hidden token; None where there is none.
    start: what an encoder-decoder's targets go on from.
    sentinels: ids of <extra_id_0>, <extra_id_1>, ... that lie elsewhere.
    special: all ids that do not stand for text, where they lie elsewhere.
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
    """Of t2x's own: the first id that stands for text."""
    return NUM_NAMED + self.num_sentinels

  def is_text(self, tokens: np.ndarray) -> np.ndarray:
    """Returns which tokens stand for text, of the shape of `tokens`."""
    if self.special is None:
      return tokens >= self.first_text_id
    return _is_text(self.size, self.special)[tokens]

  def draw(self, uniform: np.ndarray) -> np.ndarray:
    """Returns ids of text, each as likely, by numbers in [0, 1)."""
    if self.special is None:
      num_text = self.size - self.first_text_id
      return self.first_text_id + np.floor(uniform * num_text)
    ids = np.flatnonzero(_is_text(self.size, self.special))
    return ids[np.floor(uniform * len(ids)).astype(int)]

  @property
  def mask_id(self) -> int:
    """Returns `mask`.

    Raises:
      ValueError: there is none.
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
  result = np.ones(size, bool)
  result[list(special)] = False
  return result
