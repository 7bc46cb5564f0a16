"""Texts that an engine is asked for, and what comes of them."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Protocol

import numpy as np

from t2x.decode import page_table
from t2x.decode import prompts as prompts_lib
from t2x.decode import sampling as sampling_lib


class Control(Protocol):
  """Says which tokens may come next; see `t2x.inference.constraints`."""

  def allowed(self) -> np.ndarray:
    """Returns uint32 words with a bit for each token that may be next."""
    ...

  def advance(self, token: int) -> None:
    """Goes on with a token.

    Raises:
      ValueError: nothing can go on from here; the text ends as `error`.
    """
    ...

  def raised(self) -> Mapping[int, float]:
    """Returns what is added to the logits of some tokens."""
    ...

  @property
  def is_done(self) -> bool:
    """Whether the text is complete and nothing may follow but its end."""
    ...

  def begin(self, prompt: Sequence[int]) -> 'Control':
    """Returns the same for a text that follows a prompt, at its beginning."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A text that is asked for.

  Attributes:
    prompt: its tokens so far, at least one.
    num_tokens: the most new tokens; 0 for the prompt's scores alone.
    sampling: how they are drawn.
    seed: of what is drawn.
    row: tells texts of one seed apart, as the rows of `generate`.
    ends: tokens that end the text.
    num_top: likeliest tokens that are told beside each new one.
    control: what may come next; None for anything.
    scores_prompt: whether the log-probabilities of the prompt's tokens are
      told; the whole prompt is read then, whatever others have read of it.
  """

  prompt: Sequence[int]
  num_tokens: int
  sampling: sampling_lib.SamplingConfig = sampling_lib.SamplingConfig()
  seed: int = 0
  row: int = 0
  ends: Sequence[int] = ()
  num_top: int = 0
  control: Control | None = None
  scores_prompt: bool = False


# The likeliest tokens in some place, with their log-probabilities.
Top = list[tuple[int, float]]


@dataclasses.dataclass(kw_only=True)
class Scores:
  """How likely some tokens were, each after those before it.

  Attributes:
    log_probs: of each, under the model itself.
    top: the likeliest tokens in the place of each, where they are asked for.
  """

  log_probs: list[float] = dataclasses.field(default_factory=list)
  top: list[Top] = dataclasses.field(default_factory=list)

  def add(self, log_probs, top, num: int) -> None:
    """Adds some tokens'.

    Args:
      log_probs: of each.
      top: values and ids of the likeliest in the place of each.
      num: of them that are kept.
    """
    self.log_probs += [float(value) for value in log_probs]
    if num:
      self.top += [
        list(zip(ids[:num].tolist(), values[:num].tolist()))
        for values, ids in zip(*top)
      ]


@dataclasses.dataclass(eq=False)
class Text:
  """One text as it comes about.

  Attributes:
    request: what was asked for.
    tokens: new tokens, without the one that ended it.
    log_probs: of each, under the model itself.
    top: the likeliest tokens in the place of each new one, with their
      log-probabilities, where they are asked for.
    end: the token that ended it, and its scores; None where none did.
    prompt_scores: of the prompt's tokens but the first, where they are asked
      for.
    num_shared: tokens of the prompt that another text had read.
    reason: why it is over: `stop` (an end token, or a control that is done),
      `length`, `cancelled`, `error`; None while it goes on.
    error: what is wrong with its control.
    lease: of its pages.
    num_read: positions whose entries are written.
    counts_V: how often each token was written, where a setting asks.
    begun: what it has begun of its banned words, if it has any; a state of
      `banned.Banned`.
  """

  request: Request
  tokens: list[int] = dataclasses.field(default_factory=list)
  log_probs: list[float] = dataclasses.field(default_factory=list)
  top: list[Top] = dataclasses.field(default_factory=list)
  end: tuple[int, Scores] | None = None
  prompt_scores: Scores = dataclasses.field(default_factory=Scores)
  num_shared: int = 0
  reason: str | None = None
  error: str = ''
  lease: page_table.Lease | None = None
  num_read: int = 0
  counts_V: np.ndarray | None = None
  begun: int = 0

  def __post_init__(self):
    if self._banned is not None:
      self.begun = self._banned.start(self.request.prompt)

  @property
  def _banned(self):
    return self.request.sampling.banned_words

  def mask(self) -> tuple[np.ndarray, Mapping[int, float]] | None:
    """Returns which tokens may come next and which are raised; None for all.

    Raises:
      ValueError: its control knows none.
    """
    control, found = self.request.control, None
    if control is not None:
      found = control.allowed(), control.raised()
    if self._banned is None:
      return found
    free = ~self._banned.hidden(self.begun)
    return (free, {}) if found is None else (found[0] & free, found[1])

  def add(self, token: int, scores: Scores) -> None:
    """Goes on with a token.

    Args:
      token: its id.
      scores: log-probabilities in its place.

    Raises:
      ValueError: its control does not.
    """
    self.tokens.append(token)
    self.log_probs += scores.log_probs
    self.top += scores.top
    if self.counts_V is not None:
      self.counts_V[token] += 1
    if self._banned is not None:
      self.begun = self._banned.after(self.begun, token)
    if self.request.control is not None:
      self.request.control.advance(token)

  @property
  def all_tokens(self) -> list[int]:
    return [*self.request.prompt, *self.tokens]


class Overloaded(ValueError):
  """So many requests wait that no more are taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
  """Sizes of an engine.

  Attributes:
    num_slots: rows that are written at a time.
    page_size: positions of a page, a power of two; prompts are shared by whole
      pages.
    num_pages: of the pool; None takes as many as all slots at full length
      need. With fewer, requests wait for pages.
    max_length: tokens of a row, new ones included; None takes the model's.
    max_waiting: requests that wait for a slot; more are refused.
    chunks: sizes in which prompts are read; each is a compiled program.
    read: tokens of prompts that are read, at least, before the rows that write
      get their next token: more favours those who wait, fewer those who write.
    cache_dtype: as in `prefill.Options`.
    num_top: most alternatives of a token that a request may ask for.
  """

  num_slots: int = 16
  page_size: int = 32
  num_pages: int | None = None
  max_length: int | None = None
  max_waiting: int = 256
  chunks: tuple[int, ...] = (16, 64)
  read: int = 64
  cache_dtype: str | None = None
  num_top: int = 20

  def __post_init__(self):
    counts = {
      name: getattr(self, name)
      for name in ('num_slots', 'page_size', 'num_pages', 'max_length', 'read')
    }
    prompts_lib.check_settings(counts, vocab_size=0, ids={})
    if self.page_size & (self.page_size - 1):
      raise ValueError(
        f'page_size={self.page_size}; it must be a power of two, such as 32.'
      )
    if self.max_waiting < 0:
      raise ValueError(f'max_waiting={self.max_waiting}; it is 0 or more.')
    if not self.chunks or min(self.chunks) < 1:
      raise ValueError(f'chunks={self.chunks}; give sizes of 1 or more.')
    prompts_lib.check_cache_dtype(self.cache_dtype)
