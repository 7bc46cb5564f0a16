"""Choosing the tokens of a batch that a masking hides.

Each row is cut into units (tokens, words, runs of words, phrases). Every unit
draws a random number from a hash of the row's key, and the units with the
smallest numbers are chosen, as long as they fit the row's number of tokens. All
of it is NumPy over whole batches.

Shape suffixes: B rows, T tokens of a row, U units of a row, V vocabulary.
"""

import functools
import logging

import numpy as np

from t2x.objectives import lexicon as lexicon_lib
from t2x.objectives import masking
from t2x.objectives import noise
from t2x.objectives import segments as segments_lib

_log = logging.getLogger(__name__)
_STREAM = 16  # Stream of random numbers; objectives use those below.


def units(
  config: masking.Config,
  tokens_BT: np.ndarray,
  segments_BT: np.ndarray,
  keys_B: np.ndarray,
  lexicon: lexicon_lib.Lexicon | None,
) -> np.ndarray:
  """Returns the number of each token's unit in its row, from 0, (B, T).

  Args:
    config: the masking.
    tokens_BT: token ids.
    segments_BT: number of each token's document in its row; 0 is padding.
    keys_B: key of each row's random draws.
    lexicon: statistics of the tokens; None for maskings of single tokens.
  """
  if isinstance(config, masking.Tokens | masking.ByLoss):
    T = tokens_BT.shape[1]
    return np.broadcast_to(np.arange(T), tokens_BT.shape)
  assert lexicon is not None, 'words and phrases are known from a corpus'
  if isinstance(config, masking.Hierarchy):
    weights = config.tokens, config.words, config.spans, config.phrases
    shares = np.cumsum(weights) / sum(weights)
    drawn_B1 = noise.uniform(keys_B, 1, stream=_STREAM)
    level_B1 = np.searchsorted(shares, drawn_B1, side='right')
    parts = masking.Tokens(), masking.Words(), config.run, config.phrase
    result = np.zeros(tokens_BT.shape, np.int64)
    for number, (part, weight) in enumerate(zip(parts, weights)):
      if weight:
        units_BT = units(part, tokens_BT, segments_BT, keys_B, lexicon)
        result = np.where(level_B1 == number, units_BT, result)
    return result
  find = lexicon_lib.word_starts
  if isinstance(config, masking.Phrases):
    find = lexicon_lib.phrase_starts
  starts_BT = find(tokens_BT, segments_BT, lexicon)
  if isinstance(config, masking.Spans):
    starts_BT = _run_starts(starts_BT, segments_BT, keys_B, config)
  return np.cumsum(starts_BT, axis=1) - 1


def _run_starts(
  starts_BT: np.ndarray,
  segments_BT: np.ndarray,
  keys_B: np.ndarray,
  config: masking.Spans,
) -> np.ndarray:
  """Returns the starts of words that begin a run of words, (B, T)."""
  chance = config.end * (1 - config.end) ** np.arange(config.longest)
  bounds = np.cumsum(chance / chance.sum())
  drawn_BT = noise.uniform(keys_B, starts_BT.shape[1], stream=_STREAM + 1)
  lengths_BU = np.searchsorted(bounds, drawn_BT, side='right') + 1
  # The word after each run, which is the first word of the next.
  first_BU = np.cumsum(lengths_BU, axis=1)
  word_BT = np.cumsum(starts_BT, axis=1) - 1
  begins_BU = np.zeros((len(starts_BT), int(first_BU.max()) + 1), bool)
  begins_BU[:, 0] = True
  np.put_along_axis(begins_BU, first_BU, True, axis=1)
  begins_BT = np.take_along_axis(begins_BU, word_BT.clip(min=0), axis=1)
  return starts_BT & (begins_BT | segments_lib.starts(segments_BT))


def choose(
  config: masking.Config,
  tokens_BT: np.ndarray,
  segments_BT: np.ndarray,
  is_text_BT: np.ndarray,
  num_B: np.ndarray,
  keys_B: np.ndarray,
  lexicon: lexicon_lib.Lexicon | None,
) -> np.ndarray:
  """Returns a mask of the chosen tokens, (B, T).

  Units are taken in the order of their random numbers; a unit that does not fit
  any more is passed over.

  Args:
    config: the masking.
    tokens_BT: token ids.
    segments_BT: number of each token's document in its row; 0 is padding.
    is_text_BT: whether each token may be chosen.
    num_B: largest number of tokens to choose in each row.
    keys_B: key of each row's random draws.
    lexicon: statistics of the tokens; None for maskings of single tokens.
  """
  unit_BT = units(config, tokens_BT, segments_BT, keys_B, lexicon)
  T = tokens_BT.shape[1]
  drawn_BT = noise.uniform(keys_B, T, stream=0)
  weights_BT = _weights(config, tokens_BT, segments_BT, lexicon)
  if weights_BT is not None:
    drawn_BT, heavy_BU = _weighted(drawn_BT, unit_BT, weights_BT * is_text_BT)
    is_text_BT = is_text_BT & np.take_along_axis(heavy_BU, unit_BT, axis=1)
  drawn_BT = np.take_along_axis(drawn_BT, unit_BT, axis=1)
  # Tokens that are not text do not count in their unit.
  size_BT = _sums(is_text_BT, unit_BT)
  chosen_BT = np.zeros(tokens_BT.shape, bool)
  left_B = num_B.copy()
  for _ in range(4):
    open_BT = is_text_BT & ~chosen_BT & (size_BT <= left_B[:, None])
    new_BT = open_BT & _first(open_BT, drawn_BT, unit_BT, left_B)
    chosen_BT |= new_BT
    left_B = num_B - chosen_BT.sum(1)
    if not left_B.any():
      break
  return chosen_BT


def _first(
  open_BT: np.ndarray,
  drawn_BT: np.ndarray,
  unit_BT: np.ndarray,
  num_B: np.ndarray,
) -> np.ndarray:
  """Returns a mask of the tokens of first units that fit together, (B, T)."""
  order_BT = np.argsort(np.where(open_BT, drawn_BT, 2.0), axis=1, kind='stable')
  rank_BT = np.empty_like(order_BT)
  np.put_along_axis(rank_BT, order_BT, np.arange(order_BT.shape[1])[None], 1)
  # A unit fits if its last token does.
  late_BT = open_BT & (rank_BT >= num_B[:, None])
  return _sums(late_BT, unit_BT) == 0


def _sums(values_BT: np.ndarray, unit_BT: np.ndarray) -> np.ndarray:
  """Returns for each token the sum of values over its unit, (B, T)."""
  rows = np.arange(len(values_BT))[:, None] * values_BT.shape[1]
  place_BT = rows + unit_BT
  sums = np.bincount(
    place_BT.ravel(), weights=values_BT.ravel(), minlength=values_BT.size
  )
  return sums[place_BT]


def _weights(
  config: masking.Config,
  tokens_BT: np.ndarray,
  segments_BT: np.ndarray,
  lexicon: lexicon_lib.Lexicon | None,
) -> np.ndarray | None:
  """Returns the weight of each token, (B, T); None if all are equal."""
  if isinstance(config, masking.Rare):
    assert lexicon is not None, 'counts are known from a corpus'
    return (lexicon.counts_V[tokens_BT] + 1.0) ** -config.power
  if not isinstance(config, masking.Scored):
    return None
  weights_BT = np.asarray(config.function()(tokens_BT, segments_BT, lexicon))
  if weights_BT.shape != tokens_BT.shape or not (weights_BT >= 0).all():
    raise ValueError(
      f'data.objective.masking.rule={config.rule!r} returned weights of shape '
      f'{weights_BT.shape}, the least {weights_BT.min()}; it must return '
      f'{tokens_BT.shape} numbers, none negative.'
    )
  if segments_BT.any() and not weights_BT.any():
    _warn_of_zero_weights(config.rule)
  return weights_BT.astype(float)


@functools.cache  # Logged once; the last batch of a split may be small.
def _warn_of_zero_weights(rule: str) -> None:
  _log.warning(
    'data.objective.masking.rule=%r gave every token of a batch the weight 0, '
    'so none is predicted. Let it return some above 0.',
    rule,
  )


def _weighted(
  drawn_BT: np.ndarray, unit_BT: np.ndarray, weights_BT: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Returns random numbers that choose units in proportion to their weights.

  The number is -log(u) / w (Efraimidis and Spirakis, 2006), where w is the
  largest weight of a unit's tokens.

  Args:
    drawn_BT: uniform random numbers in [0, 1), one for each unit.
    unit_BT: number of each token's unit.
    weights_BT: weight of each token.

  Returns:
    The numbers, in [0, 1], and whether each unit has any weight, both (B, U).
  """
  rows = np.broadcast_to(np.arange(len(unit_BT))[:, None], unit_BT.shape)
  largest_BU = np.zeros(unit_BT.shape)
  np.maximum.at(largest_BU, (rows, unit_BT), weights_BT)
  # Mapped to [0, 1], which keeps the order.
  race_BU = -np.log1p(-drawn_BT) / np.maximum(largest_BU, 1e-300)
  return race_BU / (1.0 + race_BU), largest_BU > 0
