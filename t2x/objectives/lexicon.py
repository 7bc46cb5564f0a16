"""What is known of a corpus's tokens: where words begin, counts, phrases.

Shape suffixes: B rows, T tokens of a row, V vocabulary, P phrases.
"""

import dataclasses

import numpy as np

from t2x.objectives import segments as segments_lib

_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Lexicon:
  """Tables over the vocabulary.

  Attributes:
    begins_V: the token begins a word.
    breaks_V: the token is a word of its own: white space between bytes.
    ends_V: the token ends a sentence.
    counts_V: how often it occurs in the training text.
    phrases: for each length, from 2 on, the sorted hashes of its phrases.
  """

  begins_V: np.ndarray
  breaks_V: np.ndarray
  ends_V: np.ndarray
  counts_V: np.ndarray
  phrases: tuple[np.ndarray, ...] = ()


def word_starts(tokens_BT, segments_BT, lexicon: Lexicon) -> np.ndarray:
  """Returns the tokens that begin a word or a document, (B, T)."""
  breaks_BT = lexicon.breaks_V[tokens_BT]
  starts_BT = lexicon.begins_V[tokens_BT] | breaks_BT
  starts_BT[:, 1:] |= breaks_BT[:, :-1]
  return starts_BT | segments_lib.starts(segments_BT)


def hashes(tokens: np.ndarray, num: int) -> np.ndarray:
  """Returns a hash of every run of `num` tokens along the last axis."""
  width = tokens.shape[-1] - num + 1
  result = np.zeros((*tokens.shape[:-1], max(width, 0)), np.uint64)
  for i in range(num):
    part = tokens[..., i : i + width].astype(np.uint64) + np.uint64(1)
    result = (result ^ part) * _MULTIPLIER
    result ^= result >> np.uint64(29)
  return result


def phrase_starts(tokens_BT, segments_BT, lexicon: Lexicon) -> np.ndarray:
  """Returns the tokens that begin a phrase or stand alone, (B, T).

  From the left, the longest phrase at each place (Levine et al., 2021).
  """
  T = tokens_BT.shape[1]
  length_BT = np.ones(tokens_BT.shape, np.int64)
  for num, known in enumerate(lexicon.phrases, start=2):
    if not len(known) or num > T:
      continue
    found = hashes(tokens_BT, num)
    place = np.searchsorted(known, found).clip(max=len(known) - 1)
    width = found.shape[1]
    inside = segments_BT[:, :width] == segments_BT[:, num - 1 :]
    is_phrase = (known[place] == found) & inside
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

  Of a run w of tokens, log p(w) less the most that any cut into parts explains,
  max over cuts of the sum of log p(part) (Levine et al., 2021, equation 3).

  Args:
    tokens: the training text.
    is_inside: of each token, whether it is text and goes on with the document
      of the token before.
    longest: tokens of a phrase.
    most: phrases in all.
    least_count: how often each occurs, at the least.
  """
  known: list[tuple[np.ndarray, np.ndarray]] = []  # Sorted hashes, log p.
  scored = []
  for num in range(1, longest + 1):
    found = hashes(tokens, num)
    whole = np.ones(len(found), bool)
    for i in range(1, num):
      whole &= is_inside[i : i + len(found)]
    place = np.flatnonzero(whole)
    kinds, first, counts = np.unique(
      found[place], return_index=True, return_counts=True
    )
    log_p = np.log(counts / max(len(place), 1))
    known.append((kinds, log_p))
    if num == 1:
      continue
    often = counts >= least_count
    starts = place[first[often]]
    explained = _explained(tokens, starts, num, known)
    scored.append((kinds[often], log_p[often] - explained))
  scores = np.concatenate([s for _, s in scored] or [np.zeros(0)])
  bar = np.sort(scores)[::-1][most - 1] if len(scores) > most else -np.inf
  return tuple(np.sort(k[s >= max(bar, 0.0)]) for k, s in scored)


def _explained(tokens, starts, num, known):
  """The most log-probability of the parts of any cut of runs of `num`."""
  runs = tokens[starts[:, None] + np.arange(num)]

  def log_p(first, last):
    kinds, values = known[last - first - 1]
    found = hashes(runs[:, first:last], last - first)[:, 0]
    return values[np.searchsorted(kinds, found).clip(max=len(kinds) - 1)]

  # best[i] explains the tokens from i on; the whole run is no cut.
  best = [np.full(len(runs), -np.inf) for _ in range(num)] + [0.0]
  for first in reversed(range(num)):
    for last in range(first + 1, num + 1):
      if (first, last) != (0, num):
        value = log_p(first, last) + best[last]
        best[first] = np.maximum(best[first], value)
  return best[0]
