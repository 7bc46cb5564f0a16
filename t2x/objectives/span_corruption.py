"""Span corruption, the objective of T5 (Raffel et al., 2020, section 3.1.4).

Random spans of each document in a row are dropped. The encoder reads the rest,
with one sentinel for each span; the decoder predicts sentinels and spans in
turn:

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
  """Predicts dropped spans of each document.

  A row is made from as many raw tokens as fill the encoder if they are one long
  document (T5's `random_spans_helper`). Many short documents need more room for
  sentinels and end tokens: those that do not fit are cut or left out on both
  sides, so inputs and targets always belong together.

  Attributes:
    rate: share of the tokens that are dropped.
    mean_span: average number of tokens in a span.
  """

  rate: float = 0.15
  mean_span: float = 3.0

  kind: ClassVar[str] = 'span_corruption'
  has_encoder: ClassVar[bool] = True

  def __post_init__(self) -> None:
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
    """Returns the largest number of raw tokens whose corruption fits a row."""
    raw = length
    while self.sides(raw + 1)[0] <= length:
      raw += 1
    return raw

  def target_length(self, length: int) -> int:
    """Returns the number of targets of a row, a multiple of 64."""
    _, needed = self.sides(self.source_length(length))
    return -(-needed // 64) * 64

  def num_noise(self, num_tokens: int) -> tuple[int, int]:
    """Returns the number of dropped tokens of a document, and of spans."""
    if num_tokens < 2:
      return 0, 0
    dropped = min(max(round(num_tokens * self.rate), 1), num_tokens - 1)
    spans = max(round(dropped / self.mean_span), 1)
    return dropped, min(spans, num_tokens - dropped)

  def sides(self, num_tokens: int) -> tuple[int, int]:
    """Returns the number of ids of a document in the encoder and decoder."""
    dropped, spans = self.num_noise(num_tokens)
    return num_tokens - dropped + spans + 1, dropped + spans + 1

  def lengths(self, length: int) -> dict[str, int]:
    """Returns the length of a row in each array of a batch, by name."""
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
    """Returns the encoder-decoder batch made from raw rows."""
    return noised.examples(
      source,
      noise.uniform(keys, 2 * source.tokens.shape[1]),
      lengths=(length, self.target_length(length)),
      sides=self.sides,
      make=lambda tokens, uniform: self.corrupt(tokens, uniform, vocab),
      vocab=vocab,
    )

  def corrupt(
    self, tokens: np.ndarray, uniform: np.ndarray, vocab: vocab_lib.Vocab
  ) -> noised.Pair:
    """Returns the encoder's and the decoder's ids of one document.

    Args:
      tokens: the document's tokens.
      uniform: random numbers in [0, 1), two for each token except the last.
      vocab: vocabulary, which has the sentinels.
    """
    dropped, spans = self.num_noise(len(tokens))
    eos = np.array([vocab.eos])
    if not dropped:
      return np.append(tokens, eos), eos
    half = len(uniform) // 2
    kept_lengths = _partition(len(tokens) - dropped, spans, uniform[:half])
    drop_lengths = _partition(dropped, spans, uniform[half:])
    # Kept and dropped spans alternate, beginning with a kept one.
    lengths = np.stack([kept_lengths, drop_lengths], axis=1).ravel()
    span = np.repeat(np.arange(2 * spans), lengths)
    is_kept = span % 2 == 0
    sentinels = np.asarray(vocab.sentinel_ids[:spans])
    drop_starts = np.cumsum(drop_lengths) - drop_lengths
    inputs = np.insert(tokens[is_kept], np.cumsum(kept_lengths), sentinels)
    targets = np.insert(tokens[~is_kept], drop_starts, sentinels)
    return np.append(inputs, eos), np.append(targets, eos)


def _partition(num: int, parts: int, uniform: np.ndarray) -> np.ndarray:
  """Returns `parts` positive lengths of sum `num`, all equally likely."""
  cuts = 1 + np.sort(np.argsort(uniform[: num - 1])[: parts - 1])
  return np.diff(cuts, prepend=0, append=num)
