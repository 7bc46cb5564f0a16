"""UL2: a mixture of denoisers, each named by its mode (Tay et al., 2022)."""

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
  """One way to split a document.

  Attributes:
    mode: R (regular), X (extreme) drop spans; S (sequential) drops the end.
    rate: share of the tokens that are dropped; of S the mean, the share is
      uniform up to twice that.
    mean_span: tokens of a span, on average; S has one.
    weight: share among the denoisers.
  """

  mode: Literal['R', 'S', 'X'] = 'R'
  rate: float = 0.15
  mean_span: float = 3.0
  weight: float = 1.0

  def __post_init__(self):
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
    return span_corruption.SpanCorruption(
      rate=self.rate, mean_span=self.mean_span
    )

  def sides(self, num: int) -> tuple[int, int]:
    """Returns the most ids of a document on each side, its mode included."""
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
  """Each document draws a denoiser; its mode is the encoder's first token.

  Modes are the last three sentinels. S alone is a prefix language model.
  """

  denoisers: tuple[Denoiser, ...] = DENOISERS

  kind: ClassVar[str] = 'ul2'
  has_encoder: ClassVar[bool] = True

  def __post_init__(self):
    if not self.denoisers:
      raise ValueError('data.objective.denoisers is empty; give one or more.')

  def source_length(self, length: int) -> int:
    """Raw tokens that one row of `length` is made from."""
    return max(length - 2, 1)

  def target_length(self, length: int) -> int:
    """Targets of one long document by any denoiser, a multiple of 64."""
    num = self.source_length(length)
    needed = max(d.sides(num)[1] for d in self.denoisers)
    return -(-needed // 64) * 64

  def num_spans(self, length: int) -> int:
    """The most spans of a document."""
    num = self.source_length(length)
    return max(
      1 if d.mode == 'S' else d.spans.num_noise(num)[1] for d in self.denoisers
    )

  def lengths(self, length: int) -> dict[str, int]:
    """How long the arrays of a batch are, by name."""
    return rows_lib.encoder_decoder_lengths(length, self.target_length(length))

  def examples(
    self,
    source: rows_lib.Rows,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the encoder-decoder batch of `source`."""
    shares = np.cumsum([d.weight for d in self.denoisers])
    shares /= shares[-1]

    def make(text, uniform):
      # Two numbers a token; those of the last token choose.
      number = np.searchsorted(shares, uniform[-1], side='right')
      return _split(self.denoisers[number], text, uniform[:-2], uniform, vocab)

    most = [d.sides for d in self.denoisers]
    return noised.examples(
      source,
      noise.uniform(keys, 2 * source.tokens.shape[1]),
      lengths=(length, self.target_length(length)),
      sides=lambda num: tuple(np.max([side(num) for side in most], axis=0)),
      make=make,
      vocab=vocab,
    )


def _split(denoiser, text, uniform, choice, vocab) -> noised.Pair:
  """Returns a document's ids on both sides, its mode first."""
  mode = vocab.sentinel_ids[-1 - MODES.index(denoiser.mode)]
  if denoiser.mode == 'S':
    dropped = round(choice[-2] * 2 * denoiser.rate * len(text))
    cut = len(text) - min(max(dropped, 1), len(text))
    sentinel, end = vocab.sentinel_ids[0], vocab.eos
    encoder = np.concatenate([text[:cut], [sentinel, end]])
    decoder = np.concatenate([[sentinel], text[cut:], [end]])
  else:
    encoder, decoder = denoiser.spans.corrupt(text, uniform, vocab)
  return np.insert(encoder, 0, mode), decoder
