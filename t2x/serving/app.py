"""The HTTP interface of the server: its routes and their handlers.

/                       a page to try the model
/v1/completions         as in OpenAI's API
/v1/chat/completions
/v1/models
/health, /metrics       for monitoring
"""

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence
import contextlib
import dataclasses
import hmac
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
from t2x.serving import completions as completions_lib
from t2x.serving import engine_thread
from t2x.serving import metrics as metrics_lib
from t2x.serving import page
from t2x.serving import protocol
from t2x.serving import request_translation
from t2x.serving import responses as responses_lib

_LOG = logging.getLogger(__name__)
_BodyClass = type[protocol.CompletionBody] | type[protocol.ChatBody]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AppConfig:
  """Limits and access rules of the server.

  Attributes:
    api_key: key that requests to /v1 must send; None for no key.
    max_body: greatest size of a request's body, in bytes.
    body_seconds: longest time that a body may take to arrive, in seconds.
    hosts: names by which the server may be called. Others are refused, so that
      a page of another site cannot call it by DNS rebinding.
  """

  api_key: str | None = None
  max_body: int = 1 << 20
  body_seconds: float = 30.0
  hosts: tuple[str, ...] = ('*',)


def make(
  writer: request_translation.RequestTranslator,
  runner: engine_thread.Runner,
  metrics: metrics_lib.Metrics,
  config: AppConfig = AppConfig(),
) -> applications.Starlette:
  """Returns the ASGI application, which starts and stops the runner.

  Args:
    writer: translator between bodies, requests and texts.
    runner: thread of the engine.
    metrics: metrics of the server.
    config: limits and access rules.
  """
  server = _Server(writer, runner, metrics, config)

  @contextlib.asynccontextmanager
  async def lifespan(app: applications.Starlette) -> AsyncIterator[None]:
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
      route('/v1/models/{name:path}', server.model),
      route('/v1/completions', server.completions, methods=['POST']),
      route('/v1/chat/completions', server.chats, methods=['POST']),
    ],
    exception_handlers={
      responses_lib.Refused: responses_lib.refusal,
      exceptions.HTTPException: responses_lib.http_error,
      Exception: responses_lib.unexpected,
    },
  )
  app.state.runner = runner
  app.add_middleware(responses_lib.Counting, metrics=metrics)
  app.add_middleware(
    trustedhost.TrustedHostMiddleware, allowed_hosts=list(config.hosts)
  )
  return app


class _Server:
  """The handlers of the routes."""

  def __init__(
    self,
    writer: request_translation.RequestTranslator,
    runner: engine_thread.Runner,
    metrics: metrics_lib.Metrics,
    config: AppConfig,
  ):
    self._writer, self._runner = writer, runner
    self._metrics, self._config = metrics, config
    self._started = int(time.time())

  async def page(self, request: requests.Request) -> responses.Response:
    text, media_type = page.read(request.scope['path'])
    headers = {
      'Content-Security-Policy': page.POLICY,
      'X-Content-Type-Options': 'nosniff',
    }
    return responses.Response(text, headers=headers, media_type=media_type)

  async def health(self, request: requests.Request) -> responses.Response:
    del request
    alive = self._runner.is_alive
    status = {'status': 'ok' if alive else 'the engine has stopped'}
    return responses.JSONResponse(status, 200 if alive else 503)

  async def metrics(self, request: requests.Request) -> responses.Response:
    del request
    text, media_type = self._metrics.text()
    return responses.Response(text, media_type=media_type)

  async def models(self, request: requests.Request) -> responses.Response:
    self._check_key(request)
    data = {'object': 'list', 'data': [self._model()]}
    return responses.JSONResponse(data)

  async def model(self, request: requests.Request) -> responses.Response:
    self._check_key(request)
    self._check_name(request.path_params['name'])
    return responses.JSONResponse(self._model())

  def _model(self) -> dict[str, Any]:
    return {
      'id': self._writer.name,
      'object': 'model',
      'created': self._started,
      'owned_by': 't2x',
      'max_model_len': self._runner.engine.max_length,
    }

  async def completions(self, request: requests.Request) -> responses.Response:
    form = completions_lib.Completions
    return await self._answer(request, protocol.CompletionBody, form)

  async def chats(self, request: requests.Request) -> responses.Response:
    form = completions_lib.Chats
    return await self._answer(request, protocol.ChatBody, form)

  async def _answer(
    self,
    request: requests.Request,
    body_class: _BodyClass,
    make_format: type[completions_lib.Format],
  ) -> responses.Response:
    """Answers a request for completions, at once or as a stream."""
    self._check_key(request)
    body = _parsed(body_class, await self._read(request))
    self._check_name(body.model)
    try:
      # Tokenizing prompts and compiling grammars must not block the loop.
      job = await asyncio.to_thread(self._writer.job, body)
      choices = self._writer.start(job, self._runner)
    except engine_lib.Overloaded as error:
      raise responses_lib.Refused(429, str(error)) from None
    except engine_thread.Stopped as error:
      raise responses_lib.Refused(503, str(error)) from None
    except ValueError as error:
      raise responses_lib.Refused(400, str(error)) from None
    form = make_format(self._writer.token_bytes, job.num_top)
    shell = {
      'id': f'{form.prefix}-{secrets.token_hex(12)}',
      'created': int(time.time()),
      'model': self._writer.name,
    }
    if body.stream:
      options = body.stream_options or protocol.StreamOptions()
      events = self._events(form, shell, job, choices, options.include_usage)
      return responses_lib.EventStream(events, choices)
    with responses_lib.cancelling(choices):
      whole = asyncio.gather(*(_whole(choice) for choice in choices))
      done = await responses_lib.unless_gone(request, whole)
    return responses.JSONResponse(
      {
        **shell,
        'object': form.kind,
        'choices': [form.choice(delta, is_chunk=False) for delta in done],
        'usage': completions_lib.usage(job.num_prompt, choices),
      }
    )

  async def _events(
    self,
    form: completions_lib.Format,
    shell: dict[str, Any],
    job: request_translation.Job,
    choices: Sequence[completions_lib.Choice],
    with_usage: bool,
  ) -> AsyncIterator[Any]:
    """Yields the events of a stream as JSON values.

    Args:
      form: format of the interface.
      shell: fields that all events have.
      job: requests of the body.
      choices: texts that are generated.
      with_usage: whether the last event has the numbers of tokens.
    """
    shell = {**shell, 'object': form.chunk_kind}
    chunk = lambda choice: {**shell, 'choices': [choice]}
    for choice in choices:
      if (opening := form.opening(choice.index)) is not None:
        yield chunk(opening)
    try:
      async for delta in responses_lib.merged(choices):
        has_scores = bool(delta.tokens) and job.num_top is not None
        if delta.text or delta.reason or has_scores:
          yield chunk(form.choice(delta, is_chunk=True))
    except completions_lib.Failed as error:
      yield responses_lib.error_body(
        400 if error.is_own_fault else 500, str(error)
      )
      return
    except Exception:
      _LOG.exception('A stream failed.')
      yield responses_lib.error_body(500, 'The server failed.')
      return
    if with_usage:
      used = completions_lib.usage(job.num_prompt, choices)
      yield {**shell, 'choices': [], 'usage': used}

  def _check_name(self, name: str | None) -> None:
    if name not in (None, '', self._writer.name):
      raise responses_lib.Refused(
        404,
        f'There is no model {name!r} here; it is {self._writer.name!r}.',
        'model',
      )

  def _check_key(self, request: requests.Request) -> None:
    key = self._config.api_key
    if key is None:
      return
    given = request.headers.get('authorization', '')
    # Starlette decodes headers as latin-1, whatever their encoding.
    if not hmac.compare_digest(
      given.encode('latin-1'), f'Bearer {key}'.encode()
    ):
      raise responses_lib.Refused(
        401, 'The API key is missing or wrong: Authorization: Bearer KEY.'
      )

  async def _read(self, request: requests.Request) -> bytes:
    """Returns the body of a request.

    Raises:
      Refused: its content type is not JSON, or it is too long or too slow.
    """
    media_type = request.headers.get('content-type', '').split(';')[0].strip()
    if media_type != 'application/json':
      raise responses_lib.Refused(
        415, f'The content type is {media_type!r}; send application/json.'
      )
    most = self._config.max_body
    too_long = responses_lib.Refused(
      413, f'The body has more than {most} bytes.'
    )
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
      raise responses_lib.Refused(
        408, f'The body did not arrive in {self._config.body_seconds:g} s.'
      ) from None
    except requests.ClientDisconnect:
      raise responses_lib.Refused(499, 'The client has gone.') from None
    return b''.join(parts)


def _parsed(
  body_class: _BodyClass, data: bytes
) -> protocol.CompletionBody | protocol.ChatBody:
  try:
    return body_class.model_validate_json(data)
  except pydantic.ValidationError as error:
    message, field = protocol.explain(error, body_class)
    raise responses_lib.Refused(400, message, field) from None


async def _whole(choice: completions_lib.Choice) -> completions_lib.Delta:
  try:
    return completions_lib.merge_deltas(
      [delta async for delta in choice.deltas()]
    )
  except completions_lib.Failed as error:
    status = 400 if error.is_own_fault else 500
    raise responses_lib.Refused(status, str(error)) from None
