"""Answers on their way: streams, clients that go, errors, counts."""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence
import contextlib
import json
import logging
from typing import Any

from starlette import requests
from starlette import responses

from t2x.serving import completions
from t2x.serving import metrics as metrics_lib

_LOG = logging.getLogger(__name__)
_TYPES = {401: 'authentication_error', 429: 'rate_limit_error'}


class Refused(Exception):
  """A request that is answered with an error.

  Attributes:
    status: of HTTP.
    param: the field at fault.
  """

  def __init__(self, status: int, message: str, param: str | None = None):
    super().__init__(message)
    self.status, self.param = status, param


async def merged(
  choices: Sequence[completions.Choice],
) -> AsyncIterator[completions.Delta]:
  """Yields the deltas of all choices as they come."""
  queue: asyncio.Queue[Any] = asyncio.Queue()

  async def follow(choice):
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
  """Returns what some work gives, unless the client goes before."""
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


async def _gone(receive) -> None:
  while (await receive())['type'] != 'http.disconnect':
    pass


@contextlib.contextmanager
def cancelling(choices: Sequence[completions.Choice]):
  """Ends the texts that are not over, whatever happens."""
  try:
    yield
  finally:
    for choice in choices:
      choice.stream.cancel()


class Counting:
  """Counts requests to /v1 by the status of their answers."""

  def __init__(self, app, metrics: metrics_lib.Metrics):
    self._app, self._metrics = app, metrics

  async def __call__(self, scope, receive, send) -> None:
    paths = ('/v1/completions', '/v1/chat/completions', '/v1/models')
    if scope['type'] != 'http' or scope['path'] not in paths:
      await self._app(scope, receive, send)
      return

    async def counted(message):
      if message['type'] == 'http.response.start':
        self._metrics.requests.labels(scope['path'], message['status']).inc()
      await send(message)

    try:
      await self._app(scope, receive, counted)
    except Exception:  # Answered with 500 further out.
      self._metrics.requests.labels(scope['path'], 500).inc()
      raise


class EventStream(responses.Response):
  """Server-sent events; where the client goes, its texts end."""

  def __init__(self, events: AsyncIterator[Any], choices):
    super().__init__(media_type='text/event-stream')
    self._events, self._choices = events, choices

  async def __call__(self, scope, receive, send) -> None:
    del scope
    headers = [
      (b'content-type', b'text/event-stream; charset=utf-8'),
      (b'cache-control', b'no-store'),
      (b'x-accel-buffering', b'no'),  # Proxies would hold events back.
    ]
    start = {'type': 'http.response.start', 'status': 200, 'headers': headers}

    async def pump():
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
        for found in await asyncio.gather(*tasks, return_exceptions=True):
          if isinstance(found, Exception):
            _LOG.warning('A stream broke off: %r', found)


def error_body(status: int, message: str, param: str | None = None):
  kind = 'invalid_request_error' if status < 500 else 'server_error'
  return {
    'error': {
      'message': message,
      'type': _TYPES.get(status, kind),
      'param': param,
      'code': None,
    }
  }


async def refusal(request, error: Any) -> responses.Response:
  del request
  headers = {'Retry-After': '1'} if error.status == 429 else None
  body = error_body(error.status, str(error), error.param)
  return responses.JSONResponse(body, error.status, headers)


async def http_error(request, error: Any) -> responses.Response:
  body = error_body(
    error.status_code, f'{request.method} {request.url.path}: {error.detail}.'
  )
  return responses.JSONResponse(body, error.status_code, error.headers)


async def unexpected(request, error: Any) -> responses.Response:
  del request, error  # It is in the log.
  return responses.JSONResponse(error_body(500, 'The server failed.'), 500)
