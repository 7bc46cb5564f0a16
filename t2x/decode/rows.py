"""Arrays over the rows of a step, from the texts that are written in it.

Shape suffixes: B rows, V vocabulary, E ends, W words of 32 tokens, M tokens
that are raised.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from t2x.decode import engine_programs
from t2x.decode import processors
from t2x.decode import prompts as prompts_lib
from t2x.decode import requests as requests_lib
from t2x.decode import sampling as sampling_lib

_MOST_RAISED = 64  # Tokens of a row.


def column(values, rows: int, fill: int = 0, dtype: Any = np.int32):
  """Returns one number a row, filled up."""
  values = list(values)
  return np.array([*values, *[fill] * (rows - len(values))], dtype)


class Settings:
  """How tokens are drawn, made anew where the rows of a step change."""

  def __init__(self, vocab_size: int):
    self._vocab_size = vocab_size
    self._last: tuple[Any, Any] = (None, None)

  def of(
    self, requests: Sequence[requests_lib.Request], rows: int
  ) -> tuple[sampling_lib.Rows, np.ndarray]:
    """Returns the settings of each row, and the tokens that end it (B, E)."""
    key = (rows, *map(id, requests))
    if self._last[0] != key:
      # Texts know the words that are banned; see `Engine`.
      configs = [
        dataclasses.replace(request.sampling, banned_words=None)
        for request in requests
      ]
      settings = sampling_lib.rows(configs, rows, self._vocab_size)
      settings = sampling_lib.few(settings, self._vocab_size)
      width = max(4, *(len(request.ends) for request in requests))
      ends_BE = prompts_lib.pad(
        [request.ends for request in requests],
        (rows, prompts_lib.power_of_two(width)),
        processors.NONE,
      )
      # Requests are kept, or another one might come to have an id of theirs.
      self._last = key, (settings, ends_BE, requests)
    settings, ends_BE, _ = self._last[1]
    return settings, ends_BE


def history(
  texts: Sequence[requests_lib.Text],
  settings: sampling_lib.Rows,
  rows: int,
  vocab_size: int,
) -> sampling_lib.History:
  """Returns what processors know of each row's text."""
  prompts = [text.all_tokens for text in texts]
  prompts += [[]] * (rows - len(texts))
  result = sampling_lib.begin(settings, prompts, vocab_size)
  if result.counts_BV is None:
    return result
  for row_V, text in zip(result.counts_BV, texts):
    if text.counts_V is None:
      text.counts_V = np.zeros(vocab_size, np.int32)
      np.add.at(text.counts_V, np.array(text.tokens, int), 1)
    row_V[:] = text.counts_V
  return result


def controls(masks, rows: int) -> engine_programs.Controls | None:
  """Returns what controls say of the next tokens; None if there are none."""
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
    some = list(raised.items())[:_MOST_RAISED]
    for place, (token, amount) in enumerate(some):
      raised_BM[row, place], amounts_BM[row, place] = token, amount
  return engine_programs.Controls(
    allowed_BW=allowed_BW, raised_BM=raised_BM, amounts_BM=amounts_BM
  )
