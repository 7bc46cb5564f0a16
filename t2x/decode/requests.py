"""Requests to an engine, and the sequences that it generates for them."""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Protocol

import numpy as np

from t2x.decode import banned as banned_lib
from t2x.decode import page_table
from t2x.decode import prompts as prompts_lib
from t2x.decode import sampling as sampling_lib


class Constraint(Protocol):
  """A constraint on the next token; see `t2x.inference.constraints`."""

  def allowed(self) -> np.ndarray:
    """Returns the allowed tokens as bits of uint32 words, lowest bit first."""
    ...

  def advance(self, token: int) -> None:
    """Updates the state with the token that was drawn.

    Raises:
      ValueError: no token can follow; the sequence ends with reason `error`.
    """
    ...

  def raised(self) -> Mapping[int, float]:
    """Returns the amounts to add to logits, by token id."""
    ...

  @property
  def is_done(self) -> bool:
    """Whether the sequence is complete, so that only an end may follow."""
    ...

  def begin(self, prompt: Sequence[int]) -> 'Constraint':
    """Returns this constraint for a new sequence, which follows `prompt`."""
    ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A request for the generation of one sequence.

  Attributes:
    prompt: token ids of the prompt, at least one.
    num_tokens: the most new tokens; 0 for the scores of the prompt alone.
    sampling: sampling settings.
    seed: random seed.
    row: number that distinguishes the draws of requests with one seed, as the
      row number does in `generate`.
    ends: tokens that end the sequence.
    num_top: number of likeliest tokens that are reported at each new token.
    control: constraint on the new tokens; None if there is none.
    scores_prompt: whether the log-probabilities of the prompt's tokens are
      reported; the whole prompt is then computed, without shared pages.
  """

  prompt: Sequence[int]
  num_tokens: int
  sampling: sampling_lib.SamplingConfig = sampling_lib.SamplingConfig()
  seed: int = 0
  row: int = 0
  ends: Sequence[int] = ()
  num_top: int = 0
  control: Constraint | None = None
  scores_prompt: bool = False


# The tokens that may come next, as bits of uint32 words, and the amounts to add
# to the logits of some.
Mask = tuple[np.ndarray, Mapping[int, float]]
# The likeliest tokens at one position, with their log-probabilities.
Top = list[tuple[int, float]]


@dataclasses.dataclass(kw_only=True)
class Scores:
  """Log-probabilities of consecutive tokens, each given those before it.

  Attributes:
    log_probs: log-probability of each token under the model itself.
    top: likeliest tokens at the position of each; empty unless requested.
  """

  log_probs: list[float] = dataclasses.field(default_factory=list)
  top: list[Top] = dataclasses.field(default_factory=list)

  def add(
    self,
    log_probs: np.ndarray,
    top: Sequence[np.ndarray] | None,
    num: int,
  ) -> None:
    """Appends the scores of some tokens.

    Args:
      log_probs: log-probability of each token.
      top: log-probabilities and ids of the likeliest tokens at the position of
        each, two arrays; None only if `num` is 0.
      num: number of likeliest tokens to keep.
    """
    self.log_probs += [float(value) for value in log_probs]
    if num:
      assert top is not None
      self.top += [
        list(zip(ids[:num].tolist(), values[:num].tolist()))
        for values, ids in zip(*top)
      ]


@dataclasses.dataclass(eq=False)
class GeneratedSequence:
  """The sequence of one request, while it is generated and after.

  Attributes:
    request: the request.
    tokens: new tokens, without the end token.
    log_probs: log-probability of each new token under the model itself.
    top: likeliest tokens at the position of each new token, with their
      log-probabilities; empty unless requested.
    end: end token and its scores; None if no token ended the sequence.
    prompt_scores: scores of the prompt's tokens except the first; empty unless
      requested.
    num_shared: number of prompt tokens whose pages another sequence had filled.
    reason: reason for its end: `stop` (an end token, or a complete control),
      `length`, `cancelled` or `error`; None before the end.
    error: message of the error; '' without one.
    lease: lease of its pages; None before prefill.
    num_cached: number of prompt tokens in the caches.
    counts_V: number of times that each token was generated; None unless a
      sampling setting needs it.
    begun: state of the automaton of its banned words; 0 without any.
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
  num_cached: int = 0
  counts_V: np.ndarray | None = None
  begun: int = 0

  def __post_init__(self) -> None:
    if self._banned is not None:
      self.begun = self._banned.start(self.request.prompt)

  @property
  def _banned(self) -> banned_lib.Banned | None:
    return self.request.sampling.banned_words

  def mask(self) -> Mask | None:
    """Returns the mask of the next token; None if there is no constraint.

    Raises:
      ValueError: the control allows no token.
    """
    control, mask = self.request.control, None
    if control is not None:
      mask = control.allowed(), control.raised()
    if self._banned is None:
      return mask
    free = ~self._banned.hidden(self.begun)
    return (free, {}) if mask is None else (mask[0] & free, mask[1])

  def add(self, token: int, scores: Scores) -> None:
    """Appends a new token.

    Args:
      token: id of the token.
      scores: scores at its position.

    Raises:
      ValueError: the control does not allow the token.
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
    """Prompt and new tokens."""
    return [*self.request.prompt, *self.tokens]


class Overloaded(ValueError):
  """The queue of requests is full."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineConfig:
  """Sizes of an engine.

  Attributes:
    num_slots: number of sequences that are decoded at a time.
    page_size: number of positions in a page, a power of two; sequences share
      whole pages.
    num_pages: number of pages in the pool; None takes as many as all slots need
      at full length. With fewer, requests wait for pages.
    max_length: the most tokens of a sequence, new ones included; None is the
      model's limit.
    max_waiting: the most requests that wait for a slot; others are rejected.
    chunks: sizes of the chunks of prefill; each is a compiled program.
    read: least number of prompt tokens to prefill in each step, if so many
      wait. More shortens the wait for the first token, fewer the time between
      tokens.
    cache_dtype: dtype of cached keys and values; see `prefill.Options`.
    num_top: the largest `Request.num_top`.
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

  def __post_init__(self) -> None:
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
