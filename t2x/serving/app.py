"""The HTTP interface of a running engine.

/                       a page to try the model
/v1/completions         as OpenAI's interface
/v1/chat/completions
/v1/models
/health, /metrics       for those who watch over it
"""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence
import contextlib
import dataclasses
import hmac
import json
import logging
import secrets
import time
from typing import Any

import pydantic
from starlette import applications
from starlette import exceptions
from starlette import requests
from starlette import responses
from starlette import routing
from starlette.middleware import trustedhost

from t2x.decode import engine as engine_lib
from t2x.serving import answers
from t2x.serving import metrics as metrics_lib
from t2x.serving import page
from t2x.serving import protocol
from t2x.serving import runner as runner_lib
from t2x.serving import writer as writer_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppConfig:
  """What the server allows.

  Attributes:
    api_key: that requests to /v1 must bear; None lets anyone in.
    max_body: bytes of a body.
    body_seconds: that a body may take to arrive.
    hosts: names by which the server may be called; others are refused, so that
      no page elsewhere can have its name point here.
  """

  api_key: str | None = None
  max_body: int = 1 << 20
  body_seconds: float = 30.0
  hosts: tuple[str, ...] = ('*',)


class Refused(Exception):
  """A request that is answered with an error.

  Attributes:
    status: of HTTP.
    param: the field at fault.
  """

  def __init__(self, status: int, message: str, param: str | None = None):
    super().__init__(message)
    self.status, self.param = status, param


_LOG = logging.getLogger(__name__)
_TYPES = {401: 'authentication_error', 429: 'rate_limit_error'}


def make(
  writer: writer_lib.Writer,
  runner: runner_lib.Runner,
  metrics: metrics_lib.Metrics,
  config: AppConfig = AppConfig(),
) -> applications.Starlette:
  """Returns the application; it starts and stops the runner."""
  server = _Server(writer, runner, metrics, config)

  @contextlib.asynccontextmanager
  async def lifespan(app):
    del app
    runner.start()
    yield
    await asyncio.to_thread(runner.stop)

  route = routing.Route
  app = applications.Starlette(
    lifespan=lifespan,
    routes=[
      *(route(path, server.page) for path in page.PATHS),
      route('/health', server.health),
      route('/metrics', server.metrics),
      route('/v1/models', server.models),
      route('/v1/completions', server.completions, methods=['POST']),
      route('/v1/chat/completions', server.chats, methods=['POST']),
    ],
    exception_handlers={
      Refused: _refusal,
      exceptions.HTTPException: _http_error,
      Exception: _unexpected,
    },
  )
  app.state.runner = runner
  app.add_middleware(_Counting, metrics=metrics)
  app.add_middleware(
    trustedhost.TrustedHostMiddleware, allowed_hosts=list(config.hosts)
  )
  return app


class _Server:
  """The handlers of the routes."""

  def __init__(self, writer, runner, metrics, config: AppConfig):
    self._writer: writer_lib.Writer = writer
    self._runner: runner_lib.Runner = runner
    self._metrics: metrics_lib.Metrics = metrics
    self._config = config
    self._started = int(time.time())

  async def page(self, request: requests.Request) -> responses.Response:
    text, kind = page.read(request.scope['path'])
    headers = {
      'Content-Security-Policy': page.POLICY,
      'X-Content-Type-Options': 'nosniff',
    }
    return responses.Response(text, headers=headers, media_type=kind)

  async def health(self, request: requests.Request) -> responses.Response:
    del request
    alive = self._runner.is_alive
    status = {'status': 'ok' if alive else 'the engine has stopped'}
    return responses.JSONResponse(status, 200 if alive else 503)

  async def metrics(self, request: requests.Request) -> responses.Response:
    del request
    text, kind = self._metrics.text()
    return responses.Response(text, media_type=kind)

  async def models(self, request: requests.Request) -> responses.Response:
    self._check_key(request)
    model = {
      'id': self._writer.name,
      'object': 'model',
      'created': self._started,
      'owned_by': 't2x',
      'max_model_len': self._runner.engine.max_length,
    }
    return responses.JSONResponse({'object': 'list', 'data': [model]})

  async def completions(self, request: requests.Request):
    return await self._answer(request, protocol.CompletionBody, False)

  async def chats(self, request: requests.Request):
    return await self._answer(request, protocol.ChatBody, True)

  async def _answer(self, request: requests.Request, form: Any, is_chat: bool):
    self._check_key(request)
    body = _parsed(form, await self._read(request))
    if body.model not in (None, '', self._writer.name):
      raise Refused(
        404,
        f'There is no model {body.model!r} here; it is {self._writer.name!r}.',
        'model',
      )
    try:
      # Prompts are cut into tokens and grammars compiled beside the loop.
      job = await asyncio.to_thread(self._writer.job, body)
      choices = self._writer.start(job, self._runner)
    except engine_lib.Overloaded as error:
      raise Refused(429, str(error)) from None
    except runner_lib.Stopped as error:
      raise Refused(503, str(error)) from None
    except ValueError as error:
      raise Refused(400, str(error)) from None
    make_form = answers.Chats if is_chat else answers.Completions
    form = make_form(self._writer.token_bytes, job.num_top)
    shell = {
      'id': f'{form.prefix}-{secrets.token_hex(12)}',
      'created': int(time.time()),
      'model': self._writer.name,
    }
    if body.stream:
      options = body.stream_options or protocol.StreamOptions()
      events = self._events(form, shell, job, choices, options.include_usage)
      return _EventStream(events, choices)
    with _cancelling(choices):
      whole = asyncio.gather(*(_whole(choice) for choice in choices))
      done = await _unless_gone(request, whole)
    found = [form.choice(delta, is_chunk=False) for delta in done]
    return responses.JSONResponse(
      {
        **shell,
        'object': form.kind,
        'choices': found,
        'usage': answers.usage(job.num_prompt, choices),
      }
    )

  async def _events(
    self, form, shell, job, choices, with_usage: bool
  ) -> AsyncIterator[Any]:
    """Yields what a stream sends, as objects."""
    shell = {**shell, 'object': form.chunk_kind}
    chunk = lambda choice: {**shell, 'choices': [choice]}
    for choice in choices:
      if (opening := form.opening(choice.index)) is not None:
        yield chunk(opening)
    try:
      async for delta in _merged(choices):
        if delta.text or delta.reason or job.num_top is not None:
          yield chunk(form.choice(delta, is_chunk=True))
    except answers.Failed as error:
      yield _error(400 if error.is_own_fault else 500, str(error))
      return
    except Exception:
      _LOG.exception('A stream failed.')
      yield _error(500, 'The server failed.')
      return
    if with_usage:
      used = answers.usage(job.num_prompt, choices)
      yield {**shell, 'choices': [], 'usage': used}

  def _check_key(self, request: requests.Request) -> None:
    key = self._config.api_key
    if key is None:
      return
    given = request.headers.get('authorization', '')
    # Headers come as latin-1, whatever their bytes mean.
    if not hmac.compare_digest(
      given.encode('latin-1'), f'Bearer {key}'.encode()
    ):
      raise Refused(
        401, 'The API key is missing or wrong: Authorization: Bearer KEY.'
      )

  async def _read(self, request: requests.Request) -> bytes:
    """Returns a body that is JSON by its type, not too long nor too slow."""
    kind = request.headers.get('content-type', '').split(';')[0].strip()
    if kind != 'application/json':
      raise Refused(
        415, f'The content type is {kind!r}; send application/json.'
      )
    most = self._config.max_body
    too_long = Refused(413, f'The body has more than {most} bytes.')
    length = request.headers.get('content-length', '0')
    if length.isdigit() and int(length) > most:
      raise too_long
    parts, size = [], 0
    try:
      async with asyncio.timeout(self._config.body_seconds):
        async for part in request.stream():
          size += len(part)
          if size > most:
            raise too_long
          parts.append(part)
    except TimeoutError:
      raise Refused(
        408, f'The body did not arrive in {self._config.body_seconds:g} s.'
      ) from None
    except requests.ClientDisconnect:
      raise Refused(499, 'The client has gone.') from None
    return b''.join(parts)


def _parsed(form: Any, data: bytes) -> Any:
  try:
    return form.model_validate_json(data)
  except pydantic.ValidationError as error:
    message, field = protocol.explain(error)
    raise Refused(400, message, field) from None


async def _whole(choice: answers.Choice) -> answers.Delta:
  try:
    return answers.joined([delta async for delta in choice.deltas()])
  except answers.Failed as error:
    status = 400 if error.is_own_fault else 500
    raise Refused(status, str(error)) from None


async def _merged(
  choices: Sequence[answers.Choice],
) -> AsyncIterator[answers.Delta]:
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


async def _unless_gone(request: requests.Request, work: asyncio.Future) -> Any:
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
def _cancelling(choices: Sequence[answers.Choice]):
  """Ends the texts that are not over, whatever happens."""
  try:
    yield
  finally:
    for choice in choices:
      choice.stream.cancel()


class _Counting:
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


class _EventStream(responses.Response):
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

    with _cancelling(self._choices):
      tasks = {asyncio.create_task(pump()), asyncio.create_task(_gone(receive))}
      try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
      finally:
        for task in tasks:
          task.cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
          if isinstance(found, Exception):
            _LOG.warning('A stream broke off: %r', found)


def _error(status: int, message: str, param: str | None = None):
  kind = 'invalid_request_error' if status < 500 else 'server_error'
  return {
    'error': {
      'message': message,
      'type': _TYPES.get(status, kind),
      'param': param,
      'code': None,
    }
  }


async def _refusal(request, error: Any) -> responses.Response:
  del request
  headers = {'Retry-After': '1'} if error.status == 429 else None
  body = _error(error.status, str(error), error.param)
  return responses.JSONResponse(body, error.status, headers)


async def _http_error(request, error: Any) -> responses.Response:
  body = _error(
    error.status_code, f'{request.method} {request.url.path}: {error.detail}.'
  )
  return responses.JSONResponse(body, error.status_code, error.headers)


async def _unexpected(request, error: Any) -> responses.Response:
  del request, error  # It is in the log.
  return responses.JSONResponse(_error(500, 'The server failed.'), 500)
