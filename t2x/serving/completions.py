"""Turns the tokens of the engine into answers in the interfaces' formats.

One `Choice` follows one sequence of the engine. It turns the tokens into pieces
of text, log-probabilities and a reason of the end.
"""

import collections
from collections.abc import AsyncIterator
from collections.abc import Sequence
import dataclasses
from typing import Any

from t2x.decode import engine as engine_lib
from t2x.inference import text_stream
from t2x.serving import engine_thread
from t2x.serving import log_probs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
  """The next part of a choice.

  Attributes:
    index: index of the choice among those of its request.
    text: text that is now certain.
    tokens: tokens whose places in the text are now certain.
    reason: reason of the end, `stop` or `length`; None while the text goes on.
  """

  index: int
  text: str = ''
  tokens: Sequence[log_probs.TokenScore] = ()
  reason: str | None = None


class Failed(Exception):
  """The error for a text that could not be continued.

  Attributes:
    is_own_fault: whether the request caused the error, and not the server.
  """

  def __init__(self, message: str, *, is_own_fault: bool):
    super().__init__(message)
    self.is_own_fault = is_own_fault


class Choice:
  """One text that is generated for a request.

  Attributes:
    index: index of the choice among those of its request.
    stream: tokens of the text.
    num_tokens: number of generated tokens so far.
    num_shared: number of the prompt's tokens that were in the prefix cache.
  """

  def __init__(
    self,
    index: int,
    stream: engine_thread.SequenceStream,
    text: text_stream.TextStream,
    prefix: str | None = None,
  ):
    """Begins to follow a stream.

    Args:
      index: index of the choice among those of its request.
      stream: stream of the text's tokens.
      text: detokenizer of the text.
      prefix: text of the prompt, from `TextStream.echo`, for an answer that
        begins with the prompt; None for others.
    """
    self.index, self.stream, self._text = index, stream, text
    self._prefix = prefix or ''
    # Tokens that have no place yet, and the number of those that have one.
    self._waiting: collections.deque[log_probs.TokenScore] = collections.deque()
    request = stream.request
    is_skipped = prefix is not None and not request.scores_prompt
    self._number = len(request.prompt) if is_skipped else 0
    self.num_tokens = 0
    self.num_shared = 0

  async def deltas(self) -> AsyncIterator[Delta]:
    """Yields the parts of the text as they come; the last one has a reason.

    Raises:
      Failed: the text could not be continued.
    """
    # If the prompt is scored, its tokens come with the first piece.
    scores_prompt = self.stream.request.scores_prompt
    if self._prefix and not scores_prompt:
      yield Delta(index=self.index, text=self._prefix)
    async for piece in self.stream:
      if piece.reason in ('error', 'failed'):
        raise Failed(piece.error, is_own_fault=piece.reason == 'error')
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

  def _prompt(self, scores: engine_lib.Scores) -> list[log_probs.TokenScore]:
    """Returns the tokens of the prompt; the first has no scores."""
    tokens = self.stream.request.prompt
    tops = [None, *(scores.top or [()] * len(scores.log_probs))]
    return [
      log_probs.TokenScore(token=token, log_prob=log_prob, top=top)
      for token, log_prob, top in zip(tokens, [None, *scores.log_probs], tops)
    ]

  def _last(self, reason: str) -> Delta:
    rest = self._text.finish()
    reason = 'length' if reason == 'length' else 'stop'
    return self._delta(rest, 'stop' if self._text.stopped else reason)

  def _delta(self, text: str, reason: str | None = None) -> Delta:
    """Returns a delta of some text and of the tokens that now have a place."""
    tokens = []
    while self._waiting:
      # The end token is placed after the text, whatever its own text is.
      is_end = self._waiting[0].is_end
      place = self._text.num_told if is_end else self._text.place(self._number)
      if place is None:
        break
      told = self._waiting.popleft()
      tokens.append(dataclasses.replace(told, place=place))
      self._number += 1
    return Delta(index=self.index, text=text, tokens=tokens, reason=reason)


def _told(piece: engine_thread.Piece) -> log_probs.TokenScore:
  return log_probs.TokenScore(
    token=piece.token,
    log_prob=piece.log_prob,
    top=piece.top,
    is_end=piece.reason is not None,
  )


def merge_deltas(deltas: Sequence[Delta]) -> Delta:
  """Joins all deltas of one choice to one delta."""
  return Delta(
    index=deltas[0].index,
    text=''.join(delta.text for delta in deltas),
    tokens=[told for delta in deltas for told in delta.tokens],
    reason=deltas[-1].reason,
  )


class Format:
  """The format of an interface's answers.

  Attributes:
    prefix: beginning of the answers' ids.
    kind: field `object` of whole answers.
    chunk_kind: field `object` of the events of a stream.
  """

  prefix: str
  kind: str
  chunk_kind: str

  def __init__(self, token_bytes: Sequence[bytes], num_top: int | None):
    """Makes the format of one request's answers.

    Args:
      token_bytes: bytes that each token of the model adds to a text.
      num_top: number of likeliest tokens that are shown at each position; None
        for no log-probabilities at all.
    """
    self._token_bytes, self._num_top = token_bytes, num_top

  def choice(self, delta: Delta, *, is_chunk: bool) -> dict[str, Any]:
    """Returns a choice as JSON values.

    Args:
      delta: whole choice, or a part of it.
      is_chunk: whether it is a part, for a stream.
    """
    raise NotImplementedError

  def opening(self, index: int) -> dict[str, Any] | None:
    """Returns the first event of a streamed choice; None for no such event."""
    del index
    return None


class Completions(Format):
  """The format of /v1/completions."""

  prefix = 'cmpl'
  kind = chunk_kind = 'text_completion'

  def choice(self, delta: Delta, *, is_chunk: bool) -> dict[str, Any]:
    del is_chunk  # Whole choices and parts have the same format.
    return {
      'index': delta.index,
      'text': delta.text,
      'logprobs': self._log_probs(delta),
      'finish_reason': delta.reason,
    }

  def _log_probs(self, delta: Delta) -> dict[str, Any] | None:
    if self._num_top is None:
      return None
    with_top = self._num_top > 0
    return log_probs.completion(delta.tokens, self._token_bytes, with_top)


class Chats(Format):
  """The format of /v1/chat/completions."""

  prefix = 'chatcmpl'
  kind = 'chat.completion'
  chunk_kind = 'chat.completion.chunk'

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

  def _log_probs(self, delta: Delta) -> dict[str, Any] | None:
    if self._num_top is None:
      return None
    return log_probs.chat(delta.tokens, self._token_bytes)


def usage(num_prompt: int, choices: Sequence[Choice]) -> dict[str, Any]:
  """Returns the field `usage` of an answer: numbers of tokens.

  Args:
    num_prompt: number of tokens of the prompts.
    choices: texts that were generated for the prompts.
  """
  generated = sum(choice.num_tokens for choice in choices)
  shared = sum(choice.num_shared for choice in choices)
  return {
    'prompt_tokens': num_prompt,
    'completion_tokens': generated,
    'total_tokens': num_prompt + generated,
    'prompt_tokens_details': {'cached_tokens': min(shared, num_prompt)},
  }
