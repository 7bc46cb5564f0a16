"""Answers in the form of the completion interface.

One `Choice` follows one text of the engine: from its tokens to pieces of text,
log-probabilities and the reason of its end.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

from t2x import streaming
from t2x.serving import runner as runner_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delta:
  """What a choice has more than before.

  Attributes:
    index: of the choice.
    text: that is certain by now.
    pieces: tokens that came.
    reason: why it is over: `stop`, `length`; None while it goes on.
  """

  index: int
  text: str = ''
  pieces: Sequence[runner_lib.Piece] = ()
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
    stream: runner_lib.Stream,
    text: streaming.TextStream,
    prefix: str = '',
  ):
    """Follows a stream.

    Args:
      index: of the choice.
      stream: of its tokens.
      text: turns them into text.
      prefix: what the text begins with before any token (`echo`).
    """
    self.index, self.stream, self._text = index, stream, text
    self._prefix = prefix
    self.num_tokens = 0
    self.num_shared = 0

  async def deltas(self):
    """Yields what comes; the last one has a reason.

    Raises:
      Failed: the text could not be written on.
    """
    if self._prefix:
      yield Delta(index=self.index, text=self._prefix)
    async for piece in self.stream:
      if piece.reason in ('error', 'failed'):
        own = piece.reason == 'error'
        raise Failed(piece.error, is_own_fault=own)
      self.num_shared = piece.num_shared
      if piece.reason is not None:
        rest = self._text.finish()
        reason = 'length' if piece.reason == 'length' else 'stop'
        reason = 'stop' if self._text.stopped else reason
        yield Delta(index=self.index, text=rest, reason=reason)
        return
      self.num_tokens += 1
      new = self._text.add([piece.token])
      if self._text.stopped:
        self.stream.cancel()
        yield Delta(index=self.index, text=new, pieces=[piece], reason='stop')
        return
      yield Delta(index=self.index, text=new, pieces=[piece])


def joined(deltas: Sequence[Delta]) -> Delta:
  """Returns the deltas of one choice as one."""
  return Delta(
    index=deltas[0].index,
    text=''.join(delta.text for delta in deltas),
    pieces=[piece for delta in deltas for piece in delta.pieces],
    reason=deltas[-1].reason,
  )


class Completions:
  """The form of /v1/completions."""

  prefix = 'cmpl'
  kind = chunk_kind = 'text_completion'

  def __init__(self, token_bytes: Sequence[bytes], num_top: int | None):
    """As below; `num_top` None tells no log-probabilities."""
    self._token_bytes, self._num_top = token_bytes, num_top
    self._offsets: dict[int, int] = {}

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
    name = lambda token: token_name(self._token_bytes[token])
    offset = self._offsets.get(delta.index, 0)
    offsets = []
    for piece in delta.pieces:
      offsets.append(offset)
      # Bytes that begin a character.
      data = self._token_bytes[piece.token]
      offset += sum(byte & 0xC0 != 0x80 for byte in data)
    self._offsets[delta.index] = offset
    tops = [{name(t): p for t, p in piece.top} for piece in delta.pieces]
    return {
      'tokens': [name(piece.token) for piece in delta.pieces],
      'token_logprobs': [piece.log_prob for piece in delta.pieces],
      'top_logprobs': tops if self._num_top else None,
      'text_offset': offsets,
    }


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

    def one(token: int, log_prob: float) -> dict[str, Any]:
      data = self._token_bytes[token]
      return {
        'token': token_name(data),
        'logprob': log_prob,
        'bytes': list(data),
      }

    return {
      'content': [
        {
          **one(piece.token, piece.log_prob),
          'top_logprobs': [one(t, p) for t, p in piece.top],
        }
        for piece in delta.pieces
      ]
    }


def token_name(data: bytes) -> str:
  r"""Returns a token's text, or for part of a character bytes:\xNN."""
  try:
    return data.decode()
  except UnicodeDecodeError:
    return 'bytes:' + ''.join(f'\\x{byte:02x}' for byte in data)


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
