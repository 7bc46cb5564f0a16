"""Runs the engine on a thread of its own, for callers on an event loop."""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Callable
from collections.abc import Sequence
import contextlib
import dataclasses
import logging
import queue
import threading
import time
from typing import Any

from t2x.decode import engine as engine_lib

_LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
  """The next part of a sequence: one token, its end, or both.

  Attributes:
    token: id of the new token. In the last piece it is the end token, which is
      not part of the text, or -1 if the sequence ended without one.
    log_prob: log-probability of the token.
    top: ids and log-probabilities of the likeliest tokens at this position.
    prompt_scores: scores of the prompt's tokens, in the first piece alone and
      if the request asks for them; else None.
    reason: reason of the end, in the last piece alone; else None.
    num_shared: number of the prompt's tokens that were in the prefix cache.
    error: message for the reasons `error` (the request's fault) and `failed`
      (the server's); else ''.
  """

  token: int = -1
  log_prob: float = 0.0
  top: Sequence[tuple[int, float]] = ()
  prompt_scores: engine_lib.Scores | None = None
  reason: str | None = None
  num_shared: int = 0
  error: str = ''


class Stopped(Exception):
  """The error for a request to an engine that has stopped."""


class SequenceStream:
  """The pieces of one sequence as they come: an async iterator.

  Attributes:
    request: request that the sequence is for.
    asked: time, in seconds of `time.monotonic`, of the request or of the token
      that came last.
    is_over: whether the last piece was sent.
  """

  def __init__(self, runner: 'Runner', request: engine_lib.Request):
    """Makes the stream of a request; `Runner.submit` does so."""
    self.request = request
    self.asked = time.monotonic()
    self._runner = runner
    self._loop = asyncio.get_running_loop()
    self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
    self._text: engine_lib.GeneratedSequence | None = None
    self._num_sent = 0  # Tokens.
    self._is_begun = False
    self.is_over = False

  async def __aiter__(self) -> AsyncIterator[Piece]:
    while True:
      piece = await self._pieces.get()
      yield piece
      if piece.reason is not None:
        return

  def cancel(self) -> None:
    """Cancels the sequence, if it is not over."""
    if not self.is_over:
      self._runner.cancel(self)


class Runner:
  """Owns an engine, and calls it on one thread alone.

  Attributes:
    engine: engine that is run.
  """

  def __init__(
    self,
    engine: engine_lib.Engine,
    context: Callable[[], contextlib.AbstractContextManager[Any]],
    *,
    observe: Callable[[str, float], None] = lambda name, value: None,
  ):
    """Prepares a thread, which `start` starts.

    Args:
      engine: engine that no other caller uses.
      context: function that returns the context of the steps, such as a mesh.
      observe: function that gets the seconds to the first token (`first`) and
        between tokens (`between`).
    """
    self.engine = engine
    self._context = context
    self._observe = observe
    self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._streams: dict[
      engine_lib.GeneratedSequence, SequenceStream
    ] = {}  # Unfinished ones.
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._lock = threading.Lock()
    self._pending = 0  # Streams that are not over.
    self._stopped = False
    self._is_over = False  # No orders are taken any more.

  def start(self) -> None:
    """Starts the thread."""
    self._thread.start()

  def stop(self) -> None:
    """Ends all sequences and the thread."""
    self._stopped = True
    self._orders.put(None)
    self._thread.join(timeout=30)

  @property
  def is_alive(self) -> bool:
    """Whether the thread runs and takes requests."""
    return self._thread.is_alive() and not (self._stopped or self._is_over)

  @property
  def num_pending(self) -> int:
    """Number of streams that are not over."""
    return self._pending

  def submit(self, requests: list[engine_lib.Request]) -> list[SequenceStream]:
    """Submits requests, all or none; must be called on an event loop.

    Args:
      requests: requests to the engine.

    Returns:
      The stream of each request.

    Raises:
      ValueError: the engine cannot run a request.
      engine.Overloaded: too many requests are waiting.
      Stopped: the engine has stopped.
    """
    for request in requests:
      self.engine.check(request)
    most = self.engine.most
    with self._lock:
      if self._is_over or not self._thread.is_alive():
        raise Stopped('The engine has stopped; the server must start again.')
      if self._pending + len(requests) > most:
        raise engine_lib.Overloaded(
          f'{self._pending} texts are being written or wait, and this server '
          f'takes {most}. Ask again later.'
        )
      self._pending += len(requests)
      streams = [SequenceStream(self, request) for request in requests]
      for stream in streams:
        self._orders.put((self._add, stream))
    return streams

  def cancel(self, stream: SequenceStream) -> None:
    """Orders the engine to end a sequence and to free its slot."""
    self._orders.put((self._cancel, stream))

  def _run(self) -> None:
    try:
      with self._context():
        while not self._stopped:
          try:
            self._take_orders()
            if self.engine.is_busy and not self._stopped:
              self._deliver(self.engine.step())
          except Exception:  # All streams end, and the server goes on.
            _LOG.exception('A step of the engine failed.')
            self._fail('The engine failed; the log of the server says how.')
            self.engine.restart()
    except Exception:
      _LOG.exception('The engine has stopped.')
    finally:
      with self._lock:
        self._is_over = True
      while not self._orders.empty():
        order = self._orders.get()
        if order is not None and order[0] == self._add:
          stream = order[1]
          sequence = engine_lib.GeneratedSequence(stream.request)
          self._streams[sequence] = stream
      self._fail('The engine has stopped.')

  def _take_orders(self) -> None:
    """Carries out all orders; waits for one if the engine is idle."""
    wait = not self.engine.is_busy
    while True:
      try:
        order = self._orders.get(block=wait)
      except queue.Empty:
        return
      wait = False
      if order is not None:
        act, stream = order
        act(stream)

  def _add(self, stream: SequenceStream) -> None:
    try:
      stream._text = self.engine.add(stream.request)
    except ValueError as error:
      self._send(stream, [Piece(reason='error', error=str(error))])
      return
    self._streams[stream._text] = stream

  def _cancel(self, stream: SequenceStream) -> None:
    text = stream._text
    if text is not None and text in self._streams:
      self.engine.cancel(text)
      self._deliver([text])

  def _deliver(self, texts: list[engine_lib.GeneratedSequence]) -> None:
    """Sends the new tokens of sequences to their streams."""
    for text in texts:
      stream = self._streams.get(text)
      if stream is None:
        continue
      pieces = [
        self._piece(text, i) for i in range(stream._num_sent, len(text.tokens))
      ]
      now = time.monotonic()
      for _ in pieces:
        name = 'first' if not stream._num_sent else 'between'
        self._observe(name, now - stream.asked)
        stream.asked = now
        stream._num_sent += 1
      if text.reason is not None:
        pieces.append(self._end(text))
        del self._streams[text]
      if text.request.scores_prompt and pieces and not stream._is_begun:
        scores = text.prompt_scores
        pieces[0] = dataclasses.replace(pieces[0], prompt_scores=scores)
      stream._is_begun |= bool(pieces)
      self._send(stream, pieces)

  def _piece(self, text: engine_lib.GeneratedSequence, number: int) -> Piece:
    top = tuple(text.top[number]) if text.top else ()
    return Piece(
      token=text.tokens[number],
      log_prob=text.log_probs[number],
      top=top,
      num_shared=text.num_shared,
    )

  def _end(self, text: engine_lib.GeneratedSequence) -> Piece:
    piece = Piece(
      reason=text.reason, num_shared=text.num_shared, error=text.error
    )
    if text.end is None:
      return piece
    token, scores = text.end
    return dataclasses.replace(
      piece,
      token=token,
      log_prob=scores.log_probs[0],
      top=scores.top[0] if scores.top else (),
    )

  def _send(self, stream: SequenceStream, pieces: list[Piece]) -> None:
    if any(piece.reason for piece in pieces):
      stream.is_over = True
      with self._lock:
        self._pending -= 1

    def put() -> None:
      for piece in pieces:
        stream._pieces.put_nowait(piece)

    try:
      stream._loop.call_soon_threadsafe(put)
    except RuntimeError:  # The loop is closed, so that nobody reads.
      pass

  def _fail(self, message: str) -> None:
    """Ends all streams with an error of the server."""
    for stream in self._streams.values():
      self._send(stream, [Piece(reason='failed', error=message)])
    self._streams.clear()
