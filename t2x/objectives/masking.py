"""Maskings: which tokens a masked language model predicts.

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
