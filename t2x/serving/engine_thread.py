"""A thread that runs the engine, for callers on an event loop."""

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
  """What a text has more than before.

  Attributes:
    token: the new one; -1 where the text ended without one, and otherwise at
      an end the one that ended it, which is no part of the text.
    log_prob: of the token.
    top: the likeliest tokens in its place.
    prompt_scores: in the first piece, where they are asked for.
    reason: why the text is over, or None.
    num_shared: tokens of the prompt that another text had read.
    error: what went wrong, where the reason is `error` (the request's fault)
      or `failed` (the server's).
  """

  token: int = -1
  log_prob: float = 0.0
  top: Sequence[tuple[int, float]] = ()
  prompt_scores: engine_lib.Scores | None = None
  reason: str | None = None
  num_shared: int = 0
  error: str = ''


class Stopped(Exception):
  """The engine has stopped, and writes nothing any more."""


class Stream:
  """The pieces of one text as they come: an async iterator."""

  def __init__(self, runner: 'Runner', request: engine_lib.Request):
    self.request = request
    self.asked = time.monotonic()
    self._runner = runner
    self._loop = asyncio.get_running_loop()
    self._pieces: asyncio.Queue[Piece] = asyncio.Queue()
    self._text: engine_lib.Text | None = None
    self._told = 0
    self._is_begun = False
    self.is_over = False

  async def __aiter__(self) -> AsyncIterator[Piece]:
    while True:
      piece = await self._pieces.get()
      yield piece
      if piece.reason is not None:
        return

  def cancel(self) -> None:
    """Ends the text, if it is not over; its slot is free at once."""
    if not self.is_over:
      self._runner.cancel(self)


class Runner:
  """Owns an engine; all that touches it happens on one thread."""

  def __init__(
    self,
    engine: engine_lib.Engine,
    context: Callable[[], contextlib.AbstractContextManager[Any]],
    *,
    observe: Callable[[str, float], None] = lambda name, value: None,
  ):
    """Prepares; `start` starts.

    Args:
      engine: no other caller may use it.
      context: returns what steps run in, such as a mesh.
      observe: is told seconds to the first token (`first`) and between tokens
        (`between`).
    """
    self.engine = engine
    self._context = context
    self._observe = observe
    self._orders: queue.SimpleQueue[Any] = queue.SimpleQueue()
    self._live: dict[engine_lib.Text, Stream] = {}
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._lock = threading.Lock()
    self._pending = 0  # Streams that are not over.
    self._stopped = False
    self._is_over = False  # Nobody takes orders any more.

  def start(self) -> None:
    self._thread.start()

  def stop(self) -> None:
    """Ends all texts and the thread."""
    self._stopped = True
    self._orders.put(None)
    self._thread.join(timeout=30)

  @property
  def is_alive(self) -> bool:
    return self._thread.is_alive() and not (self._stopped or self._is_over)

  @property
  def num_pending(self) -> int:
    return self._pending

  def submit(self, requests: list[engine_lib.Request]) -> list[Stream]:
    """Takes requests, all or none; called on an event loop.

    Raises:
      ValueError: one cannot be met.
      engine.Overloaded: too many wait.
      Stopped: the engine has.
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
      streams = [Stream(self, request) for request in requests]
      for stream in streams:
        self._orders.put((self._add, stream))
    return streams

  def cancel(self, stream: Stream) -> None:
    self._orders.put((self._cancel, stream))

  def _run(self) -> None:
    try:
      with self._context():
        while not self._stopped:
          try:
            self._obey()
            if self.engine.is_busy and not self._stopped:
              self._tell(self.engine.step())
          except Exception:  # The server goes on; nobody waits forever.
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
          self._live[engine_lib.Text(order[1].request)] = order[1]
      self._fail('The engine has stopped.')

  def _obey(self) -> None:
    """Takes what was ordered; waits for it where there is nothing to do."""
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

  def _add(self, stream: Stream) -> None:
    try:
      stream._text = self.engine.add(stream.request)
    except ValueError as error:
      self._send(stream, [Piece(reason='error', error=str(error))])
      return
    self._live[stream._text] = stream

  def _cancel(self, stream: Stream) -> None:
    text = stream._text
    if text is not None and text in self._live:
      self.engine.cancel(text)
      self._tell([text])

  def _tell(self, texts: list[engine_lib.Text]) -> None:
    for text in texts:
      stream = self._live.get(text)
      if stream is None:
        continue
      pieces = [
        self._piece(text, i) for i in range(stream._told, len(text.tokens))
      ]
      now = time.monotonic()
      for _ in pieces:
        name = 'first' if not stream._told else 'between'
        self._observe(name, now - stream.asked)
        stream.asked = now
        stream._told += 1
      if text.reason is not None:
        pieces.append(self._end(text))
        del self._live[text]
      if text.request.scores_prompt and pieces and not stream._is_begun:
        scores = text.prompt_scores
        pieces[0] = dataclasses.replace(pieces[0], prompt_scores=scores)
      stream._is_begun |= bool(pieces)
      self._send(stream, pieces)

  def _piece(self, text: engine_lib.Text, number: int) -> Piece:
    top = tuple(text.top[number]) if text.top else ()
    return Piece(
      token=text.tokens[number],
      log_prob=text.log_probs[number],
      top=top,
      num_shared=text.num_shared,
    )

  def _end(self, text: engine_lib.Text) -> Piece:
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

  def _send(self, stream: Stream, pieces: list[Piece]) -> None:
    if any(piece.reason for piece in pieces):
      stream.is_over = True
      with self._lock:
        self._pending -= 1

    def put():
      for piece in pieces:
        stream._pieces.put_nowait(piece)

    try:
      stream._loop.call_soon_threadsafe(put)
    except RuntimeError:  # Its loop is closed: nobody listens.
      pass

  def _fail(self, message: str) -> None:
    """Ends all texts with an error."""
    for stream in self._live.values():
      self._send(stream, [Piece(reason='failed', error=message)])
    self._live.clear()
