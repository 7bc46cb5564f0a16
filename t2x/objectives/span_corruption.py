"""Span corruption, the objective of T5 (Raffel et al., 2020, section 3.1.4).

Each document in a row loses random spans; the encoder reads what is left, with
one sentinel for each span, and the decoder writes sentinel and span in turn:

  text      Thank you for inviting me to your party last week
  inputs    Thank you <extra_id_0> me to your party <extra_id_1> week <eos>
  targets   <extra_id_0> for inviting <extra_id_1> last <eos>
"""

import dataclasses
from typing import ClassVar

import numpy as np

from t2x.objectives import noise
from t2x.objectives import noised
from t2x.objectives import objective
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpanCorruption(objective.Objective):
  """Drops a `rate` of the tokens in spans of `mean_span` tokens on average.

  Rows are made of so many raw tokens that one long document fills the encoder
  (T5's `random_spans_helper`). Many short documents need more room for
  sentinels and ends: those that do not fit are cut or left out on both sides,
  so inputs and targets always belong together.
  """

  rate: float = 0.15
  mean_span: float = 3.0

  kind: ClassVar[str] = 'span_corruption'
  has_encoder: ClassVar[bool] = True

  def __post_init__(self):
    if not 0 < self.rate < 1:
      raise ValueError(
        f'data.objective.rate={self.rate} must be between 0 and 1, both '
        'excluded; T5 uses 0.15.'
      )
    if self.mean_span < 1:
      raise ValueError(
        f'data.objective.mean_span={self.mean_span} must be at least 1 token; '
        'T5 uses 3.'
      )

  def source_length(self, length: int) -> int:
    """The most raw tokens whose corrupted form fits `length`."""
    raw = length
    while self.sides(raw + 1)[0] <= length:
      raw += 1
    return raw

  def target_length(self, length: int) -> int:
    """Targets of one long document, up to a multiple of 64."""
    _, needed = self.sides(self.source_length(length))
    return -(-needed // 64) * 64

  def num_noise(self, num_tokens: int) -> tuple[int, int]:
    """Returns how many of `num_tokens` are dropped, and in how many spans."""
    if num_tokens < 2:
      return 0, 0
    dropped = min(max(round(num_tokens * self.rate), 1), num_tokens - 1)
    spans = max(round(dropped / self.mean_span), 1)
    return dropped, min(spans, num_tokens - dropped)

  def sides(self, num_tokens: int) -> tuple[int, int]:
    """Returns the encoder's and decoder's length for one document."""
    dropped, spans = self.num_noise(num_tokens)
    return num_tokens - dropped + spans + 1, dropped + spans + 1

  def lengths(self, length: int) -> dict[str, int]:
    """How long the arrays of a batch are, by name."""
    target_length = self.target_length(length)
    return rows_lib.encoder_decoder_lengths(length, target_length)

  def examples(
    self,
    source: rows_lib.Rows,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the encoder-decoder batch of `source`."""
    return noised.examples(
      source,
      noise.uniform(keys, 2 * source.tokens.shape[1]),
      lengths=(length, self.target_length(length)),
      sides=self.sides,
      make=lambda text, uniform: self.corrupt(text, uniform, vocab),
      vocab=vocab,
    )

  def corrupt(
    self, text: np.ndarray, uniform: np.ndarray, vocab: vocab_lib.Vocab
  ) -> noised.Pair:
    """Returns the encoder's and the decoder's ids of one document.

    Args:
      text: its tokens.
      uniform: numbers in [0, 1), twice as many as tokens but for two.
      vocab: names the sentinels.
    """
    dropped, spans = self.num_noise(len(text))
    eos = np.array([vocab.eos])
    if not dropped:
      return np.append(text, eos), eos
    half = len(uniform) // 2
    kept_lengths = _partition(len(text) - dropped, spans, uniform[:half])
    drop_lengths = _partition(dropped, spans, uniform[half:])
    # Kept and dropped spans alternate; the text begins with a kept one.
    lengths = np.stack([kept_lengths, drop_lengths], axis=1).ravel()
    span = np.repeat(np.arange(2 * spans), lengths)
    is_kept = span % 2 == 0
    sentinels = np.asarray(vocab.sentinel_ids[:spans])
    drop_starts = np.cumsum(drop_lengths) - drop_lengths
    inputs = np.insert(text[is_kept], np.cumsum(kept_lengths), sentinels)
    targets = np.insert(text[~is_kept], drop_starts, sentinels)
    return np.append(inputs, eos), np.append(targets, eos)


def _partition(num: int, parts: int, uniform: np.ndarray) -> np.ndarray:
  """Splits `num` into `parts` positive lengths, all splits equally likely."""
  cuts = 1 + np.sort(np.argsort(uniform[: num - 1])[: parts - 1])
  return np.diff(cuts, prepend=0, append=num)
