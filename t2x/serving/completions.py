"""Answers in the form of the completion interface.

One `Choice` follows one text of the engine: from its tokens to pieces of text,
log-probabilities and the reason of its end.
"""

import collections
from collections.abc import Sequence
import dataclasses
from typing import Any

from t2x.inference import text_stream
from t2x.serving import engine_thread
from t2x.serving import log_probs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
  """What a choice has more than before.

  Attributes:
    index: of the choice.
    text: that is certain by now.
    tokens: whose places in the text are certain by now.
    reason: why it is over: `stop`, `length`; None while it goes on.
  """

  index: int
  text: str = ''
  tokens: Sequence[log_probs.Told] = ()
  reason: str | None = None


class Failed(Exception):
  """A text could not be written on.

  Attributes:
    is_own_fault: whether the request is to blame, and not the server.
  """

  def __init__(self, message: str, *, is_own_fault: bool):
    super().__init__(message)
    self.is_own_fault = is_own_fault


class Choice:
  """One text that is written for a request."""

  def __init__(
    self,
    index: int,
    stream: engine_thread.Stream,
    text: text_stream.TextStream,
    prefix: str | None = None,
  ):
    """Follows a stream.

    Args:
      index: of the choice.
      stream: of its tokens.
      text: turns them into text.
      prefix: what `text` told of the prompt, with which the answer begins;
        None where it does not.
    """
    self.index, self.stream, self._text = index, stream, text
    self._prefix = prefix or ''
    # Tokens that have no place yet, and how many have one.
    self._waiting: collections.deque[log_probs.Told] = collections.deque()
    request = stream.request
    is_skipped = prefix is not None and not request.scores_prompt
    self._number = len(request.prompt) if is_skipped else 0
    self.num_tokens = 0
    self.num_shared = 0

  async def deltas(self):
    """Yields what comes; the last one has a reason.

    Raises:
      Failed: the text could not be written on.
    """
    # Its tokens come with the first piece.
    scores_prompt = self.stream.request.scores_prompt
    if self._prefix and not scores_prompt:
      yield Delta(index=self.index, text=self._prefix)
    async for piece in self.stream:
      if piece.reason in ('error', 'failed'):
        own = piece.reason == 'error'
        raise Failed(piece.error, is_own_fault=own)
      self.num_shared = piece.num_shared
      if piece.prompt_scores is not None:
        self._waiting.extend(self._prompt(piece.prompt_scores))
        yield self._delta(self._prefix)
      if piece.token >= 0:
        self.num_tokens += 1
        self._waiting.append(_told(piece))
      if piece.reason is not None:
        yield self._last(piece.reason)
        return
      new = self._text.add([piece.token])
      if self._text.stopped:
        self.stream.cancel()
        yield self._delta(new, 'stop')
        return
      yield self._delta(new)

  def _prompt(self, scores) -> list[log_probs.Told]:
    """Returns the tokens of the prompt, of which the first has no scores."""
    tokens = self.stream.request.prompt
    tops = [None, *(scores.top or [()] * len(scores.log_probs))]
    return [
      log_probs.Told(token=token, log_prob=log_prob, top=top)
      for token, log_prob, top in zip(tokens, [None, *scores.log_probs], tops)
    ]

  def _last(self, reason: str) -> Delta:
    rest = self._text.finish()
    reason = 'length' if reason == 'length' else 'stop'
    return self._delta(rest, 'stop' if self._text.stopped else reason)

  def _delta(self, text: str, reason: str | None = None) -> Delta:
    """Returns some text, and the tokens that have a place now."""
    tokens = []
    while self._waiting:
      # What ends a text is no part of it, whatever text it would have.
      is_end = self._waiting[0].is_end
      place = self._text.num_told if is_end else self._text.place(self._number)
      if place is None:
        break
      told = self._waiting.popleft()
      tokens.append(dataclasses.replace(told, place=place))
      self._number += 1
    return Delta(index=self.index, text=text, tokens=tokens, reason=reason)


def _told(piece: engine_thread.Piece) -> log_probs.Told:
  return log_probs.Told(
    token=piece.token,
    log_prob=piece.log_prob,
    top=piece.top,
    is_end=piece.reason is not None,
  )


def joined(deltas: Sequence[Delta]) -> Delta:
  """Returns the deltas of one choice as one."""
  return Delta(
    index=deltas[0].index,
    text=''.join(delta.text for delta in deltas),
    tokens=[told for delta in deltas for told in delta.tokens],
    reason=deltas[-1].reason,
  )


class Completions:
  """The form of /v1/completions."""

  prefix = 'cmpl'
  kind = chunk_kind = 'text_completion'

  def __init__(self, token_bytes: Sequence[bytes], num_top: int | None):
    """As below; `num_top` None tells no log-probabilities."""
    self._token_bytes, self._num_top = token_bytes, num_top

  def choice(self, delta: Delta, *, is_chunk: bool) -> dict[str, Any]:
    del is_chunk  # Both have one form.
    return {
      'index': delta.index,
      'text': delta.text,
      'logprobs': self._log_probs(delta),
      'finish_reason': delta.reason,
    }

  def opening(self, index: int) -> dict[str, Any] | None:
    """Returns what a stream begins with."""
    del index
    return None

  def _log_probs(self, delta: Delta):
    if self._num_top is None:
      return None
    with_top = self._num_top > 0
    return log_probs.completion(delta.tokens, self._token_bytes, with_top)


class Chats:
  """The form of /v1/chat/completions."""

  prefix = 'chatcmpl'
  kind = 'chat.completion'
  chunk_kind = 'chat.completion.chunk'

  def __init__(self, token_bytes: Sequence[bytes], num_top: int | None):
    """As `Completions`."""
    self._token_bytes, self._num_top = token_bytes, num_top

  def choice(self, delta: Delta, *, is_chunk: bool) -> dict[str, Any]:
    content = {'content': delta.text}
    if not is_chunk:
      content = {'role': 'assistant', **content}
    return {
      'index': delta.index,
      'delta' if is_chunk else 'message': content,
      'logprobs': self._log_probs(delta),
      'finish_reason': delta.reason,
    }

  def opening(self, index: int) -> dict[str, Any] | None:
    return {
      'index': index,
      'delta': {'role': 'assistant', 'content': ''},
      'logprobs': None,
      'finish_reason': None,
    }

  def _log_probs(self, delta: Delta):
    if self._num_top is None:
      return None
    return log_probs.chat(delta.tokens, self._token_bytes)


def usage(num_prompt: int, choices: Sequence[Choice]) -> dict[str, Any]:
  """Returns tokens read and written.

  Args:
    num_prompt: tokens of the prompts.
    choices: that were written for them.
  """
  written = sum(choice.num_tokens for choice in choices)
  shared = sum(choice.num_shared for choice in choices)
  return {
    'prompt_tokens': num_prompt,
    'completion_tokens': written,
    'total_tokens': num_prompt + written,
    'prompt_tokens_details': {'cached_tokens': min(shared, num_prompt)},
  }
