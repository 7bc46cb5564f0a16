"""The ids that every tokenizer shares."""

import dataclasses

from t2x.objectives import lexicon as lexicon_lib

PAD = 0  # T5's ids for padding (also its decoder's start), end and unknown.
EOS = 1
UNK = 2
BOS = 3
MASK = 4
NUM_NAMED = 5  # Sentinels follow, then the ids that stand for text.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocab:
  """Special ids first, then `num_sentinels` sentinels, then text.

  `lexicon` is what is known of the tokens, and `labels` what the classes of
  texts are called (ids), for objectives that ask.

  >>> Vocab(size=361, num_sentinels=100).first_text_id
  105
  """

  size: int
  num_sentinels: int = 100
  lexicon: lexicon_lib.Lexicon | None = dataclasses.field(
    default=None, compare=False
  )
  labels: tuple[tuple[int, ...], ...] = dataclasses.field(
    default=(), compare=False
  )

  @property
  def sentinel_ids(self) -> tuple[int, ...]:
    """Ids of <extra_id_0>, <extra_id_1>, ... in that order."""
    return tuple(range(NUM_NAMED, NUM_NAMED + self.num_sentinels))

  @property
  def first_text_id(self) -> int:
    """The first id that stands for text; all ids below are special."""
    return NUM_NAMED + self.num_sentinels
