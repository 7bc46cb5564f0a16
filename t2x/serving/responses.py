"""Sends answers: streams, disconnected clients, errors, request counts."""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import json
import logging
from typing import Any

from starlette import exceptions
from starlette import requests
from starlette import responses
from starlette import types

from t2x.serving import completions
from t2x.serving import metrics as metrics_lib

_LOG = logging.getLogger(__name__)
_TYPES = {401: 'authentication_error', 429: 'rate_limit_error'}


class Refused(Exception):
  """The error for a request that is refused.

  Attributes:
    status: HTTP status.
    param: name of the field at fault; None if there is no such field.
  """

  def __init__(self, status: int, message: str, param: str | None = None):
    super().__init__(message)
    self.status, self.param = status, param


async def merged(
  choices: Sequence[completions.Choice],
) -> AsyncIterator[completions.Delta]:
  """Yields the deltas of all choices as they come.

  Raises:
    completions.Failed: a choice could not be continued.
  """
  queue: asyncio.Queue[Any] = asyncio.Queue()

  async def follow(choice: completions.Choice) -> None:
    try:
      async for delta in choice.deltas():
        queue.put_nowait(delta)
    except Exception as error:
      queue.put_nowait(error)

  tasks = [asyncio.create_task(follow(choice)) for choice in choices]
  try:
    left = len(tasks)
    while left:
      delta = await queue.get()
      if isinstance(delta, Exception):
        raise delta
      left -= delta.reason is not None
      yield delta
  finally:
    for task in tasks:
      task.cancel()


async def unless_gone(request: requests.Request, work: asyncio.Future) -> Any:
  """Returns the result of some work, unless the client disconnects first.

  Args:
    request: request of the client.
    work: work to wait for, which is cancelled if the client disconnects.

  Raises:
    Refused: the client has disconnected.
  """
  gone = asyncio.create_task(_gone(request.receive))
  try:
    await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
      raise Refused(499, 'The client has gone.')
    return work.result()
  finally:
    gone.cancel()
    work.cancel()
    await asyncio.gather(gone, work, return_exceptions=True)


async def _gone(receive: types.Receive) -> None:
  """Waits until the client disconnects."""
  while (await receive())['type'] != 'http.disconnect':
    pass


@contextlib.contextmanager
def cancelling(choices: Sequence[completions.Choice]) -> Iterator[None]:
  """Cancels the unfinished texts when its block ends, in whatever way."""
  try:
    yield
  finally:
    for choice in choices:
      choice.stream.cancel()


class Counting:
  """ASGI middleware that counts requests to /v1 by their status."""

  def __init__(self, app: types.ASGIApp, metrics: metrics_lib.Metrics):
    """Wraps an application.

    Args:
      app: application that answers the requests.
      metrics: metrics whose counter is raised.
    """
    self._app, self._metrics = app, metrics

  async def __call__(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    paths = ('/v1/completions', '/v1/chat/completions', '/v1/models')
    if scope['type'] != 'http' or scope['path'] not in paths:
      await self._app(scope, receive, send)
      return

    async def counted(message: types.Message) -> None:
      if message['type'] == 'http.response.start':
        self._metrics.requests.labels(scope['path'], message['status']).inc()
      await send(message)

    try:
      await self._app(scope, receive, counted)
    except Exception:  # An outer middleware answers it with 500.
      self._metrics.requests.labels(scope['path'], 500).inc()
      raise


class EventStream(responses.Response):
  """Server-sent events; if the client disconnects, its texts are cancelled."""

  def __init__(
    self, events: AsyncIterator[Any], choices: Sequence[completions.Choice]
  ):
    """Takes the events to send.

    Args:
      events: events as JSON values.
      choices: texts that the events are about.
    """
    super().__init__(media_type='text/event-stream')
    self._events, self._choices = events, choices

  async def __call__(
    self, scope: types.Scope, receive: types.Receive, send: types.Send
  ) -> None:
    del scope
    headers = [
      (b'content-type', b'text/event-stream; charset=utf-8'),
      (b'cache-control', b'no-store'),
      (b'x-accel-buffering', b'no'),  # So that proxies do not buffer events.
    ]
    start = {'type': 'http.response.start', 'status': 200, 'headers': headers}

    async def pump() -> None:
      await send(start)
      part = lambda text, more: send(
        {
          'type': 'http.response.body',
          'body': f'data: {text}\n\n'.encode(),
          'more_body': more,
        }
      )
      async for event in self._events:
        await part(json.dumps(event), True)
      await part('[DONE]', False)

    with cancelling(self._choices):
      tasks = {asyncio.create_task(pump()), asyncio.create_task(_gone(receive))}
      try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
      finally:
        for task in tasks:
          task.cancel()
        for result in await asyncio.gather(*tasks, return_exceptions=True):
          if isinstance(result, Exception):
            _LOG.warning('A stream broke off: %r', result)


def error_body(
  status: int, message: str, param: str | None = None
) -> dict[str, Any]:
  """Returns the body of an error in the format of OpenAI's API.

  Args:
    status: HTTP status.
    message: words for the client.
    param: name of the field at fault; None if there is no such field.
  """
  default = 'invalid_request_error' if status < 500 else 'server_error'
  return {
    'error': {
      'message': message,
      'type': _TYPES.get(status, default),
      'param': param,
      'code': None,
    }
  }


async def refusal(
  request: requests.Request, error: Exception
) -> responses.Response:
  """Answers a `Refused` request."""
  del request
  assert isinstance(error, Refused)
  headers = {'Retry-After': '1'} if error.status == 429 else None
  body = error_body(error.status, str(error), error.param)
  return responses.JSONResponse(body, error.status, headers)


async def http_error(
  request: requests.Request, error: Exception
) -> responses.Response:
  """Answers an HTTP error of the framework, such as an unknown path."""
  assert isinstance(error, exceptions.HTTPException)
  body = error_body(
    error.status_code, f'{request.method} {request.url.path}: {error.detail}.'
  )
  return responses.JSONResponse(body, error.status_code, error.headers)


async def unexpected(
  request: requests.Request, error: Exception
) -> responses.Response:
  """Answers any other exception, with a body that reveals nothing of it."""
  del request, error  # The error is in the log.
  return responses.JSONResponse(error_body(500, 'The server failed.'), 500)
