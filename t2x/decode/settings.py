"""Sampling settings: those of one sequence, and those of a batch as arrays.

Shape suffixes: B batch, V vocabulary, M words, W tokens of a word.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from t2x.decode import banned as banned_lib
from t2x.decode import processors
from t2x.decode import prompts as prompts_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """Sampling settings; the default draws from the model's distribution.

  >>> SamplingConfig(temperature=0.8, top_p=0.9).top_p
  0.9

  Attributes:
    temperature: divisor of the logits; 0 takes the most likely token.
    top_k: number of most likely tokens to keep; None keeps all.
    top_p: probability mass p; of the tokens that top-k keeps, the most likely
      ones are kept, as few as sum to at least p. None keeps all.
    min_p: fraction of the largest probability below which tokens are dropped;
      None keeps all.
    typical_p: probability mass p; the tokens whose surprise is nearest to the
      entropy are kept, as few as sum to at least p. None keeps all.
    repetition_penalty: divisor of the positive logits, and factor of the
      negative ones, of tokens that occur in the prompt or the new tokens.
    presence_penalty: amount subtracted from the logits of tokens that were
      already generated.
    frequency_penalty: amount subtracted from the logits of tokens for each time
      that they were generated.
    min_tokens: number of new tokens before an end token is allowed.
    bias: amounts added to logits, by token id; -inf bans the token.
    banned: words as token ids; the token that would complete one is banned.
    banned_words: strings that the sequence never contains, however they are
      tokenized; see `Trained.banned`.
    first: token that is forced at the beginning of the new tokens; None forces
      none.
    not_first: tokens that are banned at the beginning of the new tokens, or
      after `first` if it is given.
    calibration: divisor of the logits before all else, which also applies to
      the log-probabilities that are reported; see `t2x.inference.calibration`.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None
  min_p: float | None = None
  typical_p: float | None = None
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  min_tokens: int = 0
  bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
  banned: Sequence[Sequence[int]] = ()
  banned_words: banned_lib.Banned | None = None
  first: int | None = None
  not_first: Sequence[int] = ()
  calibration: float = 1.0

  def __post_init__(self) -> None:
    if not (math.isfinite(self.temperature) and self.temperature >= 0):
      raise ValueError(
        f'sampling.temperature={self.temperature}; it must be 0 (the most '
        'likely token) or a positive number (1 is the model itself).'
      )
    if not 0 < self.calibration < math.inf:
      raise ValueError(
        f'sampling.calibration={self.calibration}; it must be above 0; 1 '
        'leaves the model as it is.'
      )
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(
        f'sampling.top_k={self.top_k}; it must be 1 or more, or none to keep '
        'every token.'
      )
    for name in ('top_p', 'min_p', 'typical_p'):
      value = getattr(self, name)
      if value is not None and not 0 < value <= 1:
        raise ValueError(
          f'sampling.{name}={value}; it must be in (0, 1], or none to keep '
          'every token.'
        )
    if not 0 < self.repetition_penalty < math.inf:
      raise ValueError(
        f'sampling.repetition_penalty={self.repetition_penalty}; it must be '
        'above 0; 1 changes nothing.'
      )
    for name in ('presence_penalty', 'frequency_penalty'):
      if not math.isfinite(getattr(self, name)):
        raise ValueError(
          f'sampling.{name}={getattr(self, name)}; it must be a number; 0 '
          'changes nothing.'
        )
    if self.min_tokens < 0:
      raise ValueError(
        f'sampling.min_tokens={self.min_tokens}; it is 0 or more.'
      )
    if any(math.isnan(x) or x > 1e30 for x in self.bias.values()):
      raise ValueError(
        'sampling.bias holds what is no number, or inf; -inf bans a token.'
      )
    if any(not len(word) for word in self.banned):
      raise ValueError(
        'sampling.banned holds a word without tokens, which would ban all.'
      )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingRows:
  """Sampling settings of each row, as arrays.

  The attributes are those of `SamplingConfig`, None if no row uses them. If
  `temperature_B` is None, all temperatures are 0. `words_BMW` are the words of
  `banned`, padded on the left; `bans` are the automata of `banned_words`;
  `most_k` is an upper bound of every k, None if there is none.
  """

  temperature_B: Any = None
  top_k_B: Any = None
  top_p_B: Any = None
  min_p_B: Any = None
  typical_B: Any = None
  repetition_B: Any = None
  presence_B: Any = None
  frequency_B: Any = None
  min_tokens_B: Any = None
  bias_BV: Any = None
  words_BMW: Any = None
  first_B: Any = None
  not_first_BM: Any = None
  calibration_B: Any = None
  bans: banned_lib.BannedRows | None = None
  most_k: int | None = dataclasses.field(
    default=None, metadata={'static': True}
  )


def rows(
  configs: Sequence[SamplingConfig], num_rows: int, vocab_size: int
) -> SamplingRows:
  """Returns the sampling settings of a batch as arrays.

  Args:
    configs: settings of the first rows; the last one also applies to the rest.
    num_rows: number of rows of the padded batch.
    vocab_size: size of the vocabulary.

  Raises:
    ValueError: an id is outside the vocabulary, or banned words are of another
      vocabulary.
  """
  configs = [configs[min(i, len(configs) - 1)] for i in range(num_rows)]
  for config in configs:
    check_ids(config, vocab_size)
  plain = SamplingConfig()

  def column(
    name: str, dtype: npt.DTypeLike, empty: float | None = None
  ) -> np.ndarray | None:
    values = [getattr(config, name) for config in configs]
    if all(value == getattr(plain, name) for value in values):
      return None
    return np.array([empty if v is None else v for v in values], dtype)

  temperature_B = np.array([c.temperature for c in configs], np.float32)
  counts = [
    column(f'{n}_penalty', np.float32) for n in ('presence', 'frequency')
  ]
  if any(column is not None for column in counts):
    zeros = np.zeros(num_rows, np.float32)
    counts = [zeros if column is None else column for column in counts]
  ks = [config.top_k for config in configs if config.top_k is not None]
  return SamplingRows(
    temperature_B=temperature_B if temperature_B.any() else None,
    top_k_B=column('top_k', np.int32, vocab_size),
    # Rounded up, so that different k share few programs.
    most_k=prompts_lib.power_of_two(max(ks)) if len(ks) == num_rows else None,
    top_p_B=column('top_p', np.float32, 1.0),
    min_p_B=column('min_p', np.float32, 0.0),
    typical_B=column('typical_p', np.float32, 1.0),
    repetition_B=column('repetition_penalty', np.float32),
    presence_B=counts[0],
    frequency_B=counts[1],
    min_tokens_B=column('min_tokens', np.int32),
    bias_BV=_bias(configs, vocab_size),
    words_BMW=_words(configs),
    first_B=column('first', np.int32, processors.NONE),
    not_first_BM=_not_first(configs),
    calibration_B=column('calibration', np.float32),
    bans=banned_lib.rows([config.banned_words for config in configs]),
  )


def canonical(settings: SamplingRows, vocab_size: int) -> SamplingRows:
  """Returns equivalent settings in one of few forms, to share programs.

  If one of several related settings is used, the others are set as well, to
  values that change nothing. Without banned words and first tokens, there are
  ten forms: greedy; drawing; drawing with top-p and min-p; the latter two with
  a top-k up to 64, up to 256 and above; and everything.

  Args:
    settings: sampling settings of each row.
    vocab_size: size of the vocabulary.
  """
  if settings.words_BMW is not None:
    words_BMW = _padded(settings.words_BMW)
    settings = dataclasses.replace(settings, words_BMW=words_BMW)
  rare = ('typical_B', 'repetition_B', 'presence_B', 'frequency_B')
  rare = (*rare, 'min_tokens_B', 'bias_BV')
  common = ('top_p_B', 'min_p_B')
  given = lambda names: any(getattr(settings, n) is not None for n in names)
  if settings.temperature_B is None and not given(rare):
    names = 'words_BMW', 'first_B', 'not_first_BM', 'calibration_B', 'bans'
    return SamplingRows(**{name: getattr(settings, name) for name in names})
  B = len(jax.tree.leaves(settings)[0])
  full = lambda value, dtype: np.full(B, value, dtype)
  neutral: dict[str, Any] = {}
  if given((*common, *rare)):
    neutral |= {name: full(x, np.float32) for name, x in zip(common, (1, 0))}
  if given(rare):
    zeros = ('temperature_B', 'presence_B', 'frequency_B')
    neutral |= {name: full(0, np.float32) for name in zeros}
    ones = ('typical_B', 'repetition_B')
    neutral |= {name: full(1, np.float32) for name in ones}
    neutral['top_k_B'] = full(vocab_size, np.int32)
    neutral['min_tokens_B'] = full(0, np.int32)
    neutral['bias_BV'] = np.zeros((B, vocab_size), np.float32)
  new = {n: x for n, x in neutral.items() if getattr(settings, n) is None}
  most_k = None
  if settings.most_k is not None and not given(rare):
    sizes = (64, processors.MOST_SORTED)
    most_k = next((n for n in sizes if settings.most_k <= n), None)
  return dataclasses.replace(settings, most_k=most_k, **new)


def _padded(words_BMW: np.ndarray) -> np.ndarray:
  """Pads banned words to one of few shapes, on the left."""
  _, M, W = words_BMW.shape
  size = lambda n, sizes: next((s for s in sizes if n <= s), n)
  more = size(M, (16, 128)) - M, size(W, (4, 16)) - W
  pads = (0, 0), (0, more[0]), (more[1], 0)
  return np.pad(words_BMW, pads, constant_values=processors.NONE)


def check_ids(config: SamplingConfig, vocab_size: int) -> None:
  """Raises ValueError if ids are outside the vocabulary, or all are banned."""
  banned = {i for i, value in config.bias.items() if value == -math.inf}
  banned |= {word[0] for word in config.banned if len(word) == 1}
  banned |= set(config.not_first)
  if len(banned) >= vocab_size:
    raise ValueError(
      'sampling.bias, banned and not_first leave none of '
      f'{vocab_size} tokens to draw.'
    )
  ids_of = {
    'bias': config.bias,
    'banned': [i for word in config.banned for i in word],
    'first': [] if config.first is None else [config.first],
    'not_first': config.not_first,
  }
  for name, ids in ids_of.items():
    for i in ids:
      if not 0 <= i < vocab_size:
        raise ValueError(
          f'sampling.{name} names the token id {i}, and the vocabulary has '
          f'{vocab_size} tokens, 0 to {vocab_size - 1}.'
        )
  words = config.banned_words
  if words is not None and words.num_tokens != vocab_size:
    raise ValueError(
      f'sampling.banned_words is of a vocabulary of {words.num_tokens} tokens, '
      f'and the model has {vocab_size}. Make it with the model that writes.'
    )


def _bias(
  configs: Sequence[SamplingConfig], vocab_size: int
) -> np.ndarray | None:
  if not any(config.bias for config in configs):
    return None
  bias_BV = np.zeros((len(configs), vocab_size), np.float32)
  for row, config in zip(bias_BV, configs):
    row[list(config.bias)] = list(config.bias.values())
  return bias_BV


def _words(configs: Sequence[SamplingConfig]) -> np.ndarray | None:
  """Returns banned words; their number and length are rounded up."""
  longest = max((len(w) for c in configs for w in c.banned), default=0)
  if not longest:
    return None
  most = max(len(config.banned) for config in configs)
  up = prompts_lib.power_of_two
  shape = len(configs), up(most), up(longest)
  words_BMW = np.full(shape, processors.NONE, np.int32)
  for words_MW, config in zip(words_BMW, configs):
    for row, word in zip(words_MW, config.banned):
      row[-len(word) :] = word
  return words_BMW


def _not_first(configs: Sequence[SamplingConfig]) -> np.ndarray | None:
  """Returns the tokens banned at the beginning; their number is rounded up."""
  most = max(len(config.not_first) for config in configs)
  if not most:
    return None
  shape = len(configs), max(16, prompts_lib.power_of_two(most))
  rows = [config.not_first for config in configs]
  return prompts_lib.pad(rows, shape, processors.NONE)
