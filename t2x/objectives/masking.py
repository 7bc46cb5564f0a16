"""Which tokens a masked language model predicts.

A strategy cuts each row into units (tokens, words, runs of words, phrases) and
gives every unit a number drawn from a hash of the row's key: units with the
smallest numbers are chosen, as long as they fit the row's count. All of it is
numpy over whole batches.

Shape suffixes: B rows, T tokens of a row, U units of a row, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
import importlib
import inspect
from typing import ClassVar
from typing import Literal

import numpy as np

from t2x.objectives import lexicon as lexicon_lib
from t2x.objectives import noise
from t2x.objectives import segments as segments_lib

Level = Literal['tokens', 'words', 'spans', 'phrases']
_STREAM = 16  # Of random numbers; those below are the objective's own.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
  """Single tokens (Devlin et al., 2019): pieces, with `Bytes` characters."""

  kind: ClassVar[str] = 'tokens'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
  """All pieces of a word together (whole-word masking of BERT's release)."""

  kind: ClassVar[str] = 'words'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans:
  """Runs of words whose number is geometric (SpanBERT, Joshi et al., 2020).

  Attributes:
    end: chance that a run ends after each word.
    longest: words of a run; longer ones are not drawn (mean 3.8 with 0.2, 10).
  """

  kind: ClassVar[str] = 'spans'
  end: float = 0.2
  longest: int = 10

  def __post_init__(self):
    if not 0 < self.end <= 1:
      raise ValueError(
        f'data.objective.masking.end={self.end}; it is a chance above 0, at '
        'most 1. SpanBERT uses 0.2.'
      )
    if self.longest < 1:
      raise ValueError(
        f'data.objective.masking.longest={self.longest}; it is 1 or more.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phrases:
  """Tokens that come together more often than chance, as one unit.

  PMI-masking (Levine et al., 2021): phrases of the training text with the
  highest pointwise mutual information are masked whole, other tokens alone.

  Attributes:
    longest: tokens of a phrase.
    most: phrases that are kept; None is as many as the vocabulary has tokens.
    least_count: how often a phrase occurs at the least.
  """

  kind: ClassVar[str] = 'phrases'
  longest: int = 4
  most: int | None = None
  least_count: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hierarchy:
  """Each row draws its level, from the smallest units to the largest.

  Attributes:
    tokens: weight of single tokens (characters with `Bytes`).
    words: weight of whole words.
    spans: weight of runs of words.
    phrases: weight of phrases.
    run: how runs are drawn.
    phrase: which phrases there are.
  """

  kind: ClassVar[str] = 'hierarchy'
  tokens: float = 1.0
  words: float = 1.0
  spans: float = 1.0
  phrases: float = 0.0
  run: Spans = Spans()
  phrase: Phrases = Phrases()

  def __post_init__(self):
    weights = self.tokens, self.words, self.spans, self.phrases
    if min(weights) < 0 or sum(weights) <= 0:
      raise ValueError(
        f'data.objective.masking: the weights tokens={self.tokens}, words='
        f'{self.words}, spans={self.spans}, phrases={self.phrases} must not '
        'be negative, and not all 0.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rare:
  """Rare tokens more often: a word's chance grows as count^-power.

  Attributes:
    power: 0 is as whole words; 1 makes each type of word as likely.
  """

  kind: ClassVar[str] = 'rare'
  power: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
  """Words as often as a rule of your own says.

  Attributes:
    rule: `package.module:function`. It is called with the tokens (B, T), their
      segments (B, T) and the `lexicon.Lexicon` of the training text, all NumPy
      arrays, and returns a weight for each token, (B, T), 0 for never. A word's
      weight is the largest of its tokens'.
  """

  kind: ClassVar[str] = 'scored'
  rule: str = ''

  def __post_init__(self):
    try:
      inspect.signature(self.function()).bind(None, None, None)
    except TypeError as error:
      raise ValueError(
        f'data.objective.masking.rule={self.rule!r} is called with tokens, '
        f'segments and a lexicon, and does not take them ({error}). Name a '
        'function of three arguments.'
      ) from error

  def function(self) -> Callable[..., np.ndarray]:
    """Returns the rule.

    Raises:
      ValueError: there is none of this name.
    """
    module, _, name = self.rule.partition(':')
    try:
      return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
      raise ValueError(
        f'data.objective.masking.rule={self.rule!r} cannot be imported '
        f'({error}). Name a function as package.module:function, of a module '
        'that Python finds (PYTHONPATH).'
      ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByLoss:
  """Tokens that are hard to predict more often.

  Each step draws masks by a moving average of the loss of each token of the
  vocabulary, which is part of the state of training. Evaluation masks tokens as
  `Tokens`, so that its losses are comparable.

  Attributes:
    decay: of the average, at each step that predicts the token.
    power: a token's chance grows as loss^power; 0 is as single tokens.
  """

  kind: ClassVar[str] = 'by_loss'
  decay: float = 0.9
  power: float = 1.0

  def __post_init__(self):
    if not 0 <= self.decay < 1:
      raise ValueError(
        f'data.objective.masking.decay={self.decay}; it is in [0, 1).'
      )


Config = Tokens | Words | Spans | Phrases | Hierarchy | Rare | Scored | ByLoss


def units(
  config: Config,
  tokens_BT: np.ndarray,
  segments_BT: np.ndarray,
  keys_B: np.ndarray,
  lexicon: lexicon_lib.Lexicon | None,
) -> np.ndarray:
  """Returns the number of each token's unit in its row, from 0, (B, T)."""
  if isinstance(config, Tokens | ByLoss):
    T = tokens_BT.shape[1]
    return np.broadcast_to(np.arange(T), tokens_BT.shape)
  assert lexicon is not None, 'words and phrases are known from a corpus'
  if isinstance(config, Hierarchy):
    weights = config.tokens, config.words, config.spans, config.phrases
    shares = np.cumsum(weights) / sum(weights)
    drawn_B1 = noise.uniform(keys_B, 1, stream=_STREAM)
    level_B1 = np.searchsorted(shares, drawn_B1, side='right')
    parts = Tokens(), Words(), config.run, config.phrase
    result = np.zeros(tokens_BT.shape, np.int64)
    for number, (part, weight) in enumerate(zip(parts, weights)):
      if weight:
        own = units(part, tokens_BT, segments_BT, keys_B, lexicon)
        result = np.where(level_B1 == number, own, result)
    return result
  find = lexicon_lib.word_starts
  if isinstance(config, Phrases):
    find = lexicon_lib.phrase_starts
  starts_BT = find(tokens_BT, segments_BT, lexicon)
  if isinstance(config, Spans):
    starts_BT = _run_starts(starts_BT, segments_BT, keys_B, config)
  return np.cumsum(starts_BT, axis=1) - 1


def _run_starts(starts_BT, segments_BT, keys_B, config: Spans) -> np.ndarray:
  """Keeps the starts of words that begin a run."""
  chance = config.end * (1 - config.end) ** np.arange(config.longest)
  bounds = np.cumsum(chance / chance.sum())
  drawn_BT = noise.uniform(keys_B, starts_BT.shape[1], stream=_STREAM + 1)
  lengths_BU = np.searchsorted(bounds, drawn_BT, side='right') + 1
  # Words at which runs end, and so the first word of each run.
  first_BU = np.cumsum(lengths_BU, axis=1)
  word_BT = np.cumsum(starts_BT, axis=1) - 1
  begins_BU = np.zeros((len(starts_BT), int(first_BU.max()) + 1), bool)
  begins_BU[:, 0] = True
  np.put_along_axis(begins_BU, first_BU, True, axis=1)
  begins_BT = np.take_along_axis(begins_BU, word_BT.clip(min=0), axis=1)
  return starts_BT & (begins_BT | segments_lib.starts(segments_BT))


def choose(
  config: Config,
  tokens_BT: np.ndarray,
  segments_BT: np.ndarray,
  is_text_BT: np.ndarray,
  num_B: np.ndarray,
  keys_B: np.ndarray,
  lexicon: lexicon_lib.Lexicon | None,
) -> np.ndarray:
  """Returns which tokens are chosen, at most `num_B` of each row, (B, T).

  Units are taken in the order of their numbers; one that no longer fits is
  passed over.
  """
  unit_BT = units(config, tokens_BT, segments_BT, keys_B, lexicon)
  T = tokens_BT.shape[1]
  drawn_BT = noise.uniform(keys_B, T, stream=0)
  weights_BT = _weights(config, tokens_BT, segments_BT, lexicon)
  if weights_BT is not None:
    drawn_BT, heavy_BU = _weighted(drawn_BT, unit_BT, weights_BT * is_text_BT)
    is_text_BT = is_text_BT & np.take_along_axis(heavy_BU, unit_BT, axis=1)
  drawn_BT = np.take_along_axis(drawn_BT, unit_BT, axis=1)
  # Tokens that are not text are no part of their unit.
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


def _first(open_BT, drawn_BT, unit_BT, num_B):
  """Returns the units that come first and fit together."""
  order_BT = np.argsort(np.where(open_BT, drawn_BT, 2.0), axis=1, kind='stable')
  rank_BT = np.empty_like(order_BT)
  np.put_along_axis(rank_BT, order_BT, np.arange(order_BT.shape[1])[None], 1)
  # A unit fits if its last token does.
  late_BT = open_BT & (rank_BT >= num_B[:, None])
  return _sums(late_BT, unit_BT) == 0


def _sums(values_BT, unit_BT):
  """Returns for each token the sum over its unit."""
  rows = np.arange(len(values_BT))[:, None] * values_BT.shape[1]
  place_BT = rows + unit_BT
  sums = np.bincount(
    place_BT.ravel(), weights=values_BT.ravel(), minlength=values_BT.size
  )
  return sums[place_BT]


def _weights(config, tokens_BT, segments_BT, lexicon):
  """Returns the weight of each token, or None where all are alike."""
  if isinstance(config, Rare):
    return (lexicon.counts_V[tokens_BT] + 1.0) ** -config.power
  if not isinstance(config, Scored):
    return None
  weights_BT = np.asarray(config.function()(tokens_BT, segments_BT, lexicon))
  if weights_BT.shape != tokens_BT.shape or not (weights_BT >= 0).all():
    raise ValueError(
      f'data.objective.masking.rule={config.rule!r} returned weights of shape '
      f'{weights_BT.shape}, the least {weights_BT.min()}; it must return '
      f'{tokens_BT.shape} numbers, none negative.'
    )
  if segments_BT.any() and not weights_BT.any():
    raise ValueError(
      f'data.objective.masking.rule={config.rule!r} gave every token of a '
      'batch the weight 0, so nothing would be predicted. Let it return some '
      'above 0.'
    )
  return weights_BT.astype(float)


def _weighted(drawn_BT, unit_BT, weights_BT):
  """Numbers of units that come first as often as their weights say, (B, U).

  -log(u) / w (Efraimidis and Spirakis, 2006), with w the largest weight of a
  unit's tokens. And whether each unit has any weight.
  """
  rows = np.broadcast_to(np.arange(len(unit_BT))[:, None], unit_BT.shape)
  largest_BU = np.zeros(unit_BT.shape)
  np.maximum.at(largest_BU, (rows, unit_BT), weights_BT)
  # To [0, 1], in the same order.
  race_BU = -np.log1p(-drawn_BT) / np.maximum(largest_BU, 1e-300)
  return race_BU / (1.0 + race_BU), largest_BU > 0
