"""Statistics of the tokens of a corpus: words, counts and phrases.

Shape suffixes: B rows, T tokens of a row, V vocabulary, P phrases.
"""

import dataclasses
from typing import Any

import numpy as np

from t2x.objectives import segments as segments_lib

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lexicon:
  """Tables over the vocabulary.

  Attributes:
    begins_V: whether a token begins a word.
    breaks_V: whether a token is a word of its own, such as a blank byte.
    ends_V: whether a token ends a sentence.
    counts_V: number of times that a token occurs in the training text.
    phrases: sorted hashes of the phrases of each length, from 2 on.
  """

  begins_V: np.ndarray
  breaks_V: np.ndarray
  ends_V: np.ndarray
  counts_V: np.ndarray
  phrases: tuple[np.ndarray, ...] = ()


def word_starts(
  tokens_BT: np.ndarray, segments_BT: np.ndarray, lexicon: Lexicon
) -> np.ndarray:
  """Returns a mask of the tokens that begin a word or a document, (B, T)."""
  breaks_BT = lexicon.breaks_V[tokens_BT]
  starts_BT = lexicon.begins_V[tokens_BT] | breaks_BT
  starts_BT[:, 1:] |= breaks_BT[:, :-1]
  return starts_BT | segments_lib.starts(segments_BT)


def hashes(tokens: np.ndarray, num: int) -> np.ndarray:
  """Returns a uint64 hash of every run of `num` tokens along the last axis."""
  width = tokens.shape[-1] - num + 1
  result = np.zeros((*tokens.shape[:-1], max(width, 0)), np.uint64)
  for i in range(num):
    part = tokens[..., i : i + width].astype(np.uint64) + np.uint64(1)
    result = (result ^ part) * _MULTIPLIER
    result ^= result >> np.uint64(29)
  return result


def phrase_starts(
  tokens_BT: np.ndarray, segments_BT: np.ndarray, lexicon: Lexicon
) -> np.ndarray:
  """Returns a mask of the tokens that begin a phrase or stand alone, (B, T).

  Phrases are found from left to right, the longest at each place (Levine et
  al., 2021).
  """
  T = tokens_BT.shape[1]
  length_BT = np.ones(tokens_BT.shape, np.int64)
  for num, known in enumerate(lexicon.phrases, start=2):
    if not len(known) or num > T:
      continue
    run_hashes = hashes(tokens_BT, num)
    place = np.searchsorted(known, run_hashes).clip(max=len(known) - 1)
    width = run_hashes.shape[1]
    inside = segments_BT[:, :width] == segments_BT[:, num - 1 :]
    is_phrase = (known[place] == run_hashes) & inside
    length_BT[:, :width] = np.where(is_phrase, num, length_BT[:, :width])
  starts_BT = np.zeros(tokens_BT.shape, bool)
  left_B = np.zeros(len(tokens_BT), np.int64)
  for t in range(T):
    starts_BT[:, t] = left_B == 0
    left_B = np.where(left_B == 0, length_BT[:, t], left_B) - 1
  return starts_BT


def find_phrases(
  tokens: np.ndarray,
  is_inside: np.ndarray,
  *,
  longest: int,
  most: int,
  least_count: int,
) -> tuple[np.ndarray, ...]:
  """Returns the hashes of the phrases with the most mutual information.

  The score of a run w of tokens is log p(w) minus the maximum, over all cuts of
  w into parts, of the sum of log p(part) (Levine et al., 2021, equation 3).

  Args:
    tokens: token ids of the training text.
    is_inside: whether each token is text and continues the document of the
      token before.
    longest: largest number of tokens in a phrase.
    most: largest number of phrases.
    least_count: smallest number of times that a phrase occurs.

  Returns:
    The sorted hashes of the phrases of each length, from 2 on.
  """
  known: list[tuple[np.ndarray, np.ndarray]] = []  # Sorted hashes, log p.
  scored = []
  for num in range(1, longest + 1):
    run_hashes = hashes(tokens, num)
    whole = np.ones(len(run_hashes), bool)
    for i in range(1, num):
      whole &= is_inside[i : i + len(run_hashes)]
    place = np.flatnonzero(whole)
    distinct, first, counts = np.unique(
      run_hashes[place], return_index=True, return_counts=True
    )
    log_p = np.log(counts / max(len(place), 1))
    known.append((distinct, log_p))
    if num == 1:
      continue
    often = counts >= least_count
    starts = place[first[often]]
    explained = _explained(tokens, starts, num, known)
    scored.append((distinct[often], log_p[often] - explained))
  scores = np.concatenate([s for _, s in scored] or [np.zeros(0)])
  bar = np.sort(scores)[::-1][most - 1] if len(scores) > most else -np.inf
  return tuple(np.sort(k[s >= max(bar, 0.0)]) for k, s in scored)


def _explained(
  tokens: np.ndarray,
  starts: np.ndarray,
  num: int,
  known: list[tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
  """Returns the largest log-probability of any cut of each run, (runs,).

  Args:
    tokens: token ids of the training text.
    starts: place of the first token of each run.
    num: number of tokens in a run.
    known: sorted hashes and log-probabilities of the runs of each length, from
      1 on.
  """
  runs = tokens[starts[:, None] + np.arange(num)]

  def log_p(first: int, last: int) -> np.ndarray:
    distinct, values = known[last - first - 1]
    part = hashes(runs[:, first:last], last - first)[:, 0]
    return values[np.searchsorted(distinct, part).clip(max=len(distinct) - 1)]

  # best[i] is that of the tokens from i on; the whole run is no cut.
  best: list[Any] = [np.full(len(runs), -np.inf) for _ in range(num)] + [0.0]
  for first in reversed(range(num)):
    for last in range(first + 1, num + 1):
      if (first, last) != (0, num):
        value = log_p(first, last) + best[last]
        best[first] = np.maximum(best[first], value)
  return best[0]
