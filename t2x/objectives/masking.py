"""Maskings: rules that choose the tokens a masked language model predicts.

Shape suffixes: B rows, T tokens of a row.
"""

from collections.abc import Callable
import dataclasses
import importlib
import inspect
from typing import ClassVar
from typing import Literal

import numpy as np

Level = Literal['tokens', 'words', 'spans', 'phrases']


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens:
  """Single tokens (Devlin et al., 2019): pieces, or bytes with `Bytes`."""

  kind: ClassVar[str] = 'tokens'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
  """Whole words: all pieces of a word together, as in BERT's release."""

  kind: ClassVar[str] = 'words'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans:
  """Runs of words whose number is geometric (SpanBERT, Joshi et al., 2020).

  Attributes:
    end: probability that a run ends after each word.
    longest: largest number of words in a run; with the defaults the mean is
      3.8.
  """

  kind: ClassVar[str] = 'spans'
  end: float = 0.2
  longest: int = 10

  def __post_init__(self) -> None:
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
  """Whole phrases: tokens that occur together more often than by chance.

  PMI-masking (Levine et al., 2021): phrases of the training text with the
  highest pointwise mutual information are masked whole, other tokens alone.

  Attributes:
    longest: largest number of tokens in a phrase.
    most: largest number of phrases; None for the size of the vocabulary.
    least_count: smallest number of times that a phrase occurs.
  """

  kind: ClassVar[str] = 'phrases'
  longest: int = 4
  most: int | None = None
  least_count: int = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hierarchy:
  """Units of several sizes: each row draws one level.

  Attributes:
    tokens: weight of single tokens (bytes with `Bytes`).
    words: weight of whole words.
    spans: weight of runs of words.
    phrases: weight of phrases.
    run: settings of the runs of words.
    phrase: settings of the phrases.
  """

  kind: ClassVar[str] = 'hierarchy'
  tokens: float = 1.0
  words: float = 1.0
  spans: float = 1.0
  phrases: float = 0.0
  run: Spans = Spans()
  phrase: Phrases = Phrases()

  def __post_init__(self) -> None:
    weights = self.tokens, self.words, self.spans, self.phrases
    if min(weights) < 0 or sum(weights) <= 0:
      raise ValueError(
        f'data.objective.masking: the weights tokens={self.tokens}, words='
        f'{self.words}, spans={self.spans}, phrases={self.phrases} must not '
        'be negative, and not all 0.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rare:
  """Rare words more often: the weight of a word is count^-power.

  Attributes:
    power: exponent; 0 is as `Words`, 1 makes all distinct words equally
      likely.
  """

  kind: ClassVar[str] = 'rare'
  power: float = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
  """Words in proportion to weights from a function of your own.

  Attributes:
    rule: name of the function, `package.module:function`. It is called with the
      tokens (B, T), their segments (B, T) and the `lexicon.Lexicon` of the
      training text, all NumPy arrays, and returns a weight for each token,
      (B, T); 0 means never. The weight of a word is the largest of its tokens.
  """

  kind: ClassVar[str] = 'scored'
  rule: str = ''

  def __post_init__(self) -> None:
    try:
      inspect.signature(self.function()).bind(None, None, None)
    except TypeError as error:
      raise ValueError(
        f'data.objective.masking.rule={self.rule!r} is called with tokens, '
        f'segments and a lexicon, and does not take them ({error}). Name a '
        'function of three arguments.'
      ) from error

  def function(self) -> Callable[..., np.ndarray]:
    """Returns the function that `rule` names.

    Raises:
      ValueError: if it cannot be imported.
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

  Each step draws masks from a moving average of the loss of each token of the
  vocabulary, which is part of the training state. Evaluation masks as `Tokens`,
  so that its losses are comparable.

  Attributes:
    decay: decay of the moving average, at each step that predicts the token.
    power: exponent of the loss in a token's weight; 0 is as `Tokens`.
  """

  kind: ClassVar[str] = 'by_loss'
  decay: float = 0.9
  power: float = 1.0

  def __post_init__(self) -> None:
    if not 0 <= self.decay < 1:
      raise ValueError(
        f'data.objective.masking.decay={self.decay}; it is in [0, 1).'
      )


Config = Tokens | Words | Spans | Phrases | Hierarchy | Rare | Scored | ByLoss
