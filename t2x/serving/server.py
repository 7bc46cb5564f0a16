"""Serves a trained model: builds the application of `app` and runs it."""

from collections.abc import Iterator
import contextlib
import dataclasses
import logging
import signal
import socket as socket_lib

from starlette import applications

from t2x.decode import engine as engine_lib
from t2x.inference import trained_model
from t2x.serving import app as app_lib
from t2x.serving import chat as chat_lib
from t2x.serving import engine_thread
from t2x.serving import metrics as metrics_lib
from t2x.serving import request_translation

_LOG = logging.getLogger(__name__)
_LOOPBACK = ('127.0.0.1', 'localhost', '::1', '[::1]')


def bind(host: str, port: int) -> socket_lib.socket:
  """Returns a listening socket, so that a bad address is an error at once.

  Args:
    host: address or name of this machine.
    port: number of the port; 0 for a free one.

  Raises:
    ValueError: the address is in use, or is not one of this machine.
  """
  family = socket_lib.AF_INET6 if ':' in host else socket_lib.AF_INET
  try:
    return socket_lib.create_server((host, port), family=family, backlog=2048)
  except (OSError, OverflowError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise ValueError(
      f'Cannot listen on {host} port {port} ({reason}). Give another --port, '
      'or 0 for a free one.'
    ) from None


def make(
  trained: trained_model.Trained,
  *,
  name: str = 'model',
  engine: engine_lib.EngineConfig = engine_lib.EngineConfig(),
  template: str | None = None,
  max_tokens: int = 4096,
  app: app_lib.AppConfig = app_lib.AppConfig(),
) -> applications.Starlette:
  """Returns the ASGI application of a model, with compiled programs.

  Args:
    trained: model to serve, a decoder.
    name: name of the model for clients.
    engine: sizes of the engine; a `max_length` of None is the length that the
      model was trained on.
    template: chat template in Jinja; None for the tokenizer's own.
    max_tokens: greatest number of new tokens of a text.
    app: limits and access rules of the application.

  Raises:
    ValueError: the model cannot be served, or the template has a syntax error.
  """
  chat = chat_lib.Chat(trained.tokenizer, template)
  length = engine.max_length or trained.config.data.length
  most = trained.config.model.max_length
  if engine.max_length and most is not None and length > most:
    raise ValueError(
      f'max_length={length}, and the model has {most} positions. Give {most} '
      'or fewer.'
    )
  engine = dataclasses.replace(engine, max_length=length)
  metrics = metrics_lib.Metrics()
  with trained.decoding():
    made = engine_lib.Engine(trained.decoding_model, engine)
    made.warm(trained.temperature)
  runner = engine_thread.Runner(made, trained.decoding, observe=metrics.observe)
  metrics.watch(runner)
  writer = request_translation.RequestTranslator(
    trained,
    name,
    chat=chat,
    limits=request_translation.Limits(max_tokens=max_tokens),
    max_length=made.max_length,
  )
  return app_lib.make(writer, runner, metrics, app)


def serve(
  trained: trained_model.Trained,
  socket: socket_lib.socket,
  *,
  name: str,
  engine: engine_lib.EngineConfig,
  template: str | None,
  max_tokens: int,
  max_body: int,
  api_key: str | None,
  allowed_hosts: tuple[str, ...] = (),
) -> None:
  """Serves a model until a signal stops it.

  Args:
    trained: model to serve, a decoder.
    socket: listening socket, from `bind`.
    name: name of the model for clients.
    engine: sizes of the engine; see `make`.
    template: chat template in Jinja; None for the tokenizer's own.
    max_tokens: greatest number of new tokens of a text.
    max_body: greatest size of a request's body, in bytes.
    api_key: key that requests to /v1 must send; None for no key.
    allowed_hosts: names by which the server may be called, besides those of
      the loopback on a local address; if empty, any on other addresses.

  Raises:
    ValueError: `make` raises it.
  """
  import uvicorn

  host, port = socket.getsockname()[:2]
  is_local = host in _LOOPBACK
  if not is_local and api_key is None:
    _LOG.warning(
      'Anyone who reaches %s may use this server: set T2X_API_KEY.', host
    )
  allowed = app_lib.AppConfig(
    api_key=api_key,
    max_body=max_body,
    hosts=(*_LOOPBACK, *allowed_hosts) if is_local else allowed_hosts or ('*',),
  )
  made = make(
    trained,
    name=name,
    engine=engine,
    template=template,
    max_tokens=max_tokens,
    app=allowed,
  )
  shown = f'[{host}]' if ':' in host else host
  line = f'{name} is served at http://{shown}:{port}'
  config = uvicorn.Config(
    made, log_level='warning', access_log=False, timeout_graceful_shutdown=5
  )

  class Server(uvicorn.Server):
    """Prints when it serves; a signal ends it and is not raised again."""

    async def startup(
      self, sockets: list[socket_lib.socket] | None = None
    ) -> None:
      """Starts to listen, and prints the address."""
      await super().startup(sockets)
      print(line, flush=True)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
      """Ends the server at a signal, without raising it again afterwards."""
      signals = signal.SIGINT, signal.SIGTERM
      before = {s: signal.signal(s, self.handle_exit) for s in signals}
      try:
        yield
      finally:
        for number, handler in before.items():
          signal.signal(number, handler)

  Server(config).run(sockets=[socket])
  print('The server has stopped.', flush=True)
