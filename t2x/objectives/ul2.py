"""UL2, a mixture of denoisers with mode tokens (Tay et al., 2022)."""

import dataclasses
from typing import ClassVar
from typing import Literal

import numpy as np

from t2x.objectives import noise
from t2x.objectives import noised
from t2x.objectives import objective
from t2x.objectives import rows as rows_lib
from t2x.objectives import span_corruption
from t2x.objectives import vocab as vocab_lib

MODES = 'R', 'S', 'X'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoiser:
  """A denoiser: one way to corrupt a document.

  Attributes:
    mode: R (regular) and X (extreme) drop spans; S (sequential) drops the end.
    rate: share of the tokens that are dropped. For S it is the mean: the share
      is uniform between 0 and twice the rate.
    mean_span: average number of tokens in a span; S has one span.
    weight: weight of the denoiser in the mixture.
  """

  mode: Literal['R', 'S', 'X'] = 'R'
  rate: float = 0.15
  mean_span: float = 3.0
  weight: float = 1.0

  def __post_init__(self) -> None:
    assert self.spans  # Its construction checks the numbers.
    if self.mode == 'S' and self.rate > 0.5:
      raise ValueError(
        f'data.objective.denoisers: rate={self.rate} of mode S; it is at most '
        '0.5, since shares up to twice that are drawn.'
      )
    if self.weight <= 0:
      raise ValueError(
        f'data.objective.denoisers: weight={self.weight}; it is above 0.'
      )

  @property
  def spans(self) -> span_corruption.SpanCorruption:
    """The span corruption of modes R and X."""
    return span_corruption.SpanCorruption(
      rate=self.rate, mean_span=self.mean_span
    )

  def sides(self, num: int) -> tuple[int, int]:
    """Returns the largest number of ids on each side, the mode included."""
    if self.mode == 'S':
      return num + 2, num + 2
    encoder, decoder = self.spans.sides(num)
    return encoder + 1, decoder


# Table 1 of the paper.
DENOISERS = (
  Denoiser(mode='R', rate=0.15, mean_span=3.0),
  Denoiser(mode='R', rate=0.15, mean_span=8.0),
  Denoiser(mode='S', rate=0.25),
  Denoiser(mode='X', rate=0.5, mean_span=3.0),
  Denoiser(mode='X', rate=0.5, mean_span=8.0),
  Denoiser(mode='X', rate=0.15, mean_span=64.0),
  Denoiser(mode='X', rate=0.5, mean_span=64.0),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class UL2(objective.Objective):
  """Predicts documents that are corrupted by one of several denoisers.

  Each document draws a denoiser, whose mode is the encoder's first token. Modes
  are the last three sentinels. S alone is a prefix language model.

  Attributes:
    denoisers: the denoisers of the mixture.
  """

  denoisers: tuple[Denoiser, ...] = DENOISERS

  kind: ClassVar[str] = 'ul2'
  has_encoder: ClassVar[bool] = True

  def __post_init__(self) -> None:
    if not self.denoisers:
      raise ValueError('data.objective.denoisers is empty; give one or more.')

  def source_length(self, length: int) -> int:
    """Returns the number of raw tokens that a row of `length` is made from."""
    return max(length - 2, 1)

  def target_length(self, length: int) -> int:
    """Returns the number of targets of a row, a multiple of 64."""
    num = self.source_length(length)
    needed = max(d.sides(num)[1] for d in self.denoisers)
    return -(-needed // 64) * 64

  def num_spans(self, length: int) -> int:
    """Returns the largest number of dropped spans of a document."""
    num = self.source_length(length)
    return max(
      1 if d.mode == 'S' else d.spans.num_noise(num)[1] for d in self.denoisers
    )

  def lengths(self, length: int) -> dict[str, int]:
    """Returns the length of a row in each array of a batch, by name."""
    return rows_lib.encoder_decoder_lengths(length, self.target_length(length))

  def examples(
    self,
    source: rows_lib.Rows,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the encoder-decoder batch made from raw rows."""
    shares = np.cumsum([d.weight for d in self.denoisers])
    shares /= shares[-1]

    def make(tokens: np.ndarray, uniform: np.ndarray) -> noised.Pair:
      # Two numbers for each token; those of the last token choose.
      denoiser = self.denoisers[np.searchsorted(shares, uniform[-1], 'right')]
      return _split(denoiser, tokens, uniform[:-2], uniform, vocab)

    most = [d.sides for d in self.denoisers]
    return noised.examples(
      source,
      noise.uniform(keys, 2 * source.tokens.shape[1]),
      lengths=(length, self.target_length(length)),
      sides=lambda num: tuple(np.max([side(num) for side in most], axis=0)),
      make=make,
      vocab=vocab,
    )


def _split(
  denoiser: Denoiser,
  tokens: np.ndarray,
  uniform: np.ndarray,
  choice: np.ndarray,
  vocab: vocab_lib.Vocab,
) -> noised.Pair:
  """Returns the encoder's and the decoder's ids of one document.

  Args:
    denoiser: the denoiser to apply.
    tokens: the document's tokens.
    uniform: random numbers of the spans.
    choice: random numbers, the last but one of which draws the share of S.
    vocab: vocabulary, which has the sentinels.
  """
  mode = vocab.sentinel_ids[-1 - MODES.index(denoiser.mode)]
  if denoiser.mode == 'S':
    dropped = round(choice[-2] * 2 * denoiser.rate * len(tokens))
    cut = len(tokens) - min(max(dropped, 1), len(tokens))
    sentinel, end = vocab.sentinel_ids[0], vocab.eos
    encoder = np.concatenate([tokens[:cut], [sentinel, end]])
    decoder = np.concatenate([[sentinel], tokens[cut:], [end]])
  else:
    encoder, decoder = denoiser.spans.corrupt(tokens, uniform, vocab)
  return np.insert(encoder, 0, mode), decoder
