"""Denoising, the objective of BART (Lewis et al., 2020)."""

import dataclasses
from typing import ClassVar

import numpy as np

from t2x.objectives import noise
from t2x.objectives import noised
from t2x.objectives import objective
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Denoising(objective.Objective):
  """Predicts a document from its noised form.

  The encoder reads the noised document, the decoder predicts the original. The
  defaults are BART's: sentence permutation and text infilling. Noise is applied
  to a document in the order of the attributes.

  Attributes:
    permute: whether sentences are put into a random order.
    rotate: probability that a document is rotated to begin at a random token.
    infill: share of the tokens that are replaced in runs, each by one <mask>.
    mean_span: mean of the Poisson lengths of these runs; a run of length 0
      inserts a <mask>.
    mask: share of the remaining tokens that become <mask> one by one.
    delete: share of the remaining tokens that are deleted.
  """

  permute: bool = True
  rotate: float = 0.0
  infill: float = 0.3
  mean_span: float = 3.0
  mask: float = 0.0
  delete: float = 0.0

  kind: ClassVar[str] = 'denoising'
  has_encoder: ClassVar[bool] = True

  def __post_init__(self) -> None:
    for name in ('rotate', 'infill', 'mask', 'delete'):
      value = getattr(self, name)
      if not 0 <= value <= 1:
        raise ValueError(
          f'data.objective.{name}={value}; it is a share, from 0 to 1.'
        )
    if self.mean_span <= 0:
      raise ValueError(
        f'data.objective.mean_span={self.mean_span}; it is above 0. BART uses '
        '3.'
      )

  def lengths(self, length: int) -> dict[str, int]:
    """Returns the length of a row in each array of a batch, by name."""
    return rows_lib.encoder_decoder_lengths(length, length)

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
      noise.uniform(keys, source.tokens.shape[1]),
      lengths=(length, length),
      sides=lambda num: (num + 1, num + 1),
      make=lambda tokens, uniform: self._noised(tokens, uniform, vocab),
      vocab=vocab,
    )

  def _noised(
    self, tokens: np.ndarray, uniform: np.ndarray, vocab: vocab_lib.Vocab
  ) -> noised.Pair:
    """Returns the noised ids of a document, and the original ids."""
    rng = np.random.default_rng(int(uniform[0] * 2**53))
    ids = tokens
    if self.permute:
      assert vocab.lexicon, 'where sentences end is known from a corpus'
      ids = _permuted(ids, vocab.lexicon.ends_V, rng)
    if rng.random() < self.rotate:
      ids = np.roll(ids, -rng.integers(len(ids)))
    if self.infill:
      ids = _infilled(ids, self.infill, self.mean_span, vocab.mask_id, rng)
    fate = rng.random(len(ids))
    if self.mask:
      ids = np.where(fate < self.mask, vocab.mask_id, ids)
    ids = ids[rng.random(len(ids)) >= self.delete]
    end = [vocab.eos]
    return np.append(ids, end), np.append(tokens, end)


def _permuted(
  ids: np.ndarray, ends_V: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
  """Returns the ids of a document with its sentences in a random order."""
  cuts = np.flatnonzero(ends_V[ids][:-1]) + 1
  sentences = np.split(ids, cuts)
  return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


def _infilled(
  ids: np.ndarray,
  share: float,
  mean: float,
  mask: int,
  rng: np.random.Generator,
) -> np.ndarray:
  """Returns ids in which runs of Poisson lengths are replaced by one mask each.

  The result is never longer than the original: masks of runs of length 0 use
  only the room that other runs leave.

  Args:
    ids: ids of a document.
    share: share of the tokens to replace.
    mean: mean length of a run.
    mask: id of the mask token.
    rng: generator of random numbers.
  """
  left, lengths = round(share * len(ids)), []
  while left > 0:
    lengths.append(min(int(rng.poisson(mean)), left))
    left -= lengths[-1]
  runs = np.array([n for n in lengths if n], int)
  inserted = min(len(lengths) - len(runs), int((runs - 1).sum()))
  rng.shuffle(runs)
  # Kept tokens lie in the gaps around the runs, all ways equally likely.
  kept = len(ids) - runs.sum()
  bars = np.sort(rng.choice(kept + len(runs), len(runs), replace=False))
  gaps = np.diff(bars, prepend=-1) - 1
  starts = np.cumsum(gaps) + np.cumsum(runs) - runs
  is_kept = np.ones(len(ids), bool)
  for start, length in zip(starts, runs):
    is_kept[start : start + length] = False
  ids = ids.copy()
  ids[starts] = mask
  is_kept[starts] = True
  ids = ids[is_kept]
  places = rng.integers(0, len(ids) + 1, inserted)
  return np.insert(ids, places, mask)
