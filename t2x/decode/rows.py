"""The sequences of a decode step as arrays, one row a sequence.

Shape suffixes: B rows, V vocabulary, E ends, W words of 32 tokens, M tokens
with raised logits.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from t2x.decode import engine_programs
from t2x.decode import processors
from t2x.decode import prompts as prompts_lib
from t2x.decode import requests as requests_lib
from t2x.decode import sampling as sampling_lib

_MOST_RAISED = 64  # The most tokens of a row whose logits are raised.


def column(
  values: Iterable[float],
  rows: int,
  fill: int = 0,
  dtype: npt.DTypeLike = np.int32,
) -> np.ndarray:
  """Returns an array of one number a row, padded to `rows` with `fill`."""
  values = list(values)
  return np.array([*values, *[fill] * (rows - len(values))], dtype)


class Settings:
  """Sampling settings of a step's rows, rebuilt only if the rows change."""

  def __init__(self, vocab_size: int):
    self._vocab_size = vocab_size
    self._last: tuple[Any, Any] = (None, None)

  def of(
    self, requests: Sequence[requests_lib.Request], rows: int
  ) -> tuple[sampling_lib.Rows, np.ndarray]:
    """Returns the settings of each row, and its end tokens (B, E).

    Args:
      requests: requests of the first rows.
      rows: number of rows, padding included.
    """
    key = (rows, *map(id, requests))
    if self._last[0] != key:
      # Banned words are part of each sequence's mask; see
      # `requests.GeneratedSequence`.
      configs = [
        dataclasses.replace(request.sampling, banned_words=None)
        for request in requests
      ]
      settings = sampling_lib.rows(configs, rows, self._vocab_size)
      settings = sampling_lib.canonical(settings, self._vocab_size)
      width = max(4, *(len(request.ends) for request in requests))
      ends_BE = prompts_lib.pad(
        [request.ends for request in requests],
        (rows, prompts_lib.power_of_two(width)),
        processors.NONE,
      )
      # The requests are kept, so that no other object can get their ids.
      self._last = key, (settings, ends_BE, requests)
    settings, ends_BE, _ = self._last[1]
    return settings, ends_BE


def history(
  sequences: Sequence[requests_lib.GeneratedSequence],
  settings: sampling_lib.Rows,
  rows: int,
  vocab_size: int,
) -> sampling_lib.History:
  """Returns the sampling history of each row.

  Args:
    sequences: the sequences of the first rows.
    settings: sampling settings of the rows.
    rows: number of rows, padding included.
    vocab_size: size of the vocabulary.
  """
  prompts = [sequence.all_tokens for sequence in sequences]
  prompts += [[]] * (rows - len(sequences))
  result = sampling_lib.begin(settings, prompts, vocab_size)
  if result.counts_BV is None:
    return result
  for row_V, sequence in zip(result.counts_BV, sequences):
    if sequence.counts_V is None:
      sequence.counts_V = np.zeros(vocab_size, np.int32)
      np.add.at(sequence.counts_V, np.array(sequence.tokens, int), 1)
    row_V[:] = sequence.counts_V
  return result


def controls(
  masks: Sequence[requests_lib.Mask | None], rows: int
) -> engine_programs.TokenConstraints | None:
  """Joins the masks of the next tokens; returns None if there are none.

  Args:
    masks: mask of each sequence; None if it has no constraint.
    rows: number of rows, padding included.
  """
  given = [mask for mask in masks if mask is not None]
  if not given:
    return None
  allowed_BW = np.full((rows, len(given[0][0])), 0xFFFFFFFF, np.uint32)
  raised_BM = np.full((rows, _MOST_RAISED), processors.NONE, np.int32)
  amounts_BM = np.zeros((rows, _MOST_RAISED), np.float32)
  for row, mask in enumerate(masks):
    if mask is None:
      continue
    allowed_BW[row], raised = mask
    for place, (token, amount) in enumerate(
      list(raised.items())[:_MOST_RAISED]
    ):
      raised_BM[row, place], amounts_BM[row, place] = token, amount
  return engine_programs.TokenConstraints(
    allowed_BW=allowed_BW, raised_BM=raised_BM, amounts_BM=amounts_BM
  )
