r"""A server for a trained run, with the usual completion interface.

python experiments/serve.py --workdir=RUN --port=8000

RUN is a run, or the directory of a decoder of Hugging Face whose family comes
in (docs/inference.md). The page at http://127.0.0.1:8000 tries the model;
programs call /v1/completions and /v1/chat/completions as they call OpenAI's:

curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \
    -d '{"prompt": "The function", "max_tokens": 20}'

It serves this machine alone unless --host says otherwise; then give a key, in
the environment variable T2X_API_KEY.
"""

import importlib.util
import os
import pathlib
import sys

from absl import flags

from t2x import main
from t2x import reading

_HOST = flags.DEFINE_string('host', '127.0.0.1', '0.0.0.0 serves everyone.')
_PORT = flags.DEFINE_integer('port', 8000, '0 takes a free one.')
_NAME = flags.DEFINE_string(
  'name', None, 'Of the model; default its directory.'
)
_SLOTS = flags.DEFINE_integer('slots', 16, 'Texts that are written at a time.')
_WAITING = flags.DEFINE_integer(
  'max_waiting', 256, 'Texts that wait; more are answered with 429.'
)
_MAX_LENGTH = flags.DEFINE_integer(
  'max_length', None, 'Tokens of a text and its prompt; default as in training.'
)
_MAX_TOKENS = flags.DEFINE_integer('max_tokens', 4096, 'New tokens of a text.')
_ALLOWED_HOST = flags.DEFINE_multi_string(
  'allowed_host', [], 'A further name that clients may call; may repeat.'
)
_MAX_BODY = flags.DEFINE_integer('max_body', 1 << 20, 'Bytes of a request.')
_PAGES = flags.DEFINE_integer(
  'pages', None, 'Of the cache; default for all slots at full length.'
)
_PAGE_SIZE = flags.DEFINE_integer('page_size', 32, 'Positions of a page.')
_CACHE_DTYPE = flags.DEFINE_string(
  'cache_dtype', None, 'float32, bfloat16 or int8; default as the model.'
)
_TEMPLATE = flags.DEFINE_string(
  'chat_template', None, "A file in Jinja; default the tokenizer's own."
)
main.define_trained_flags()


_PACKAGES = 'starlette', 'uvicorn', 'pydantic', 'prometheus_client', 'jinja2'


def serve() -> None:
  missing = [n for n in _PACKAGES if importlib.util.find_spec(n) is None]
  if missing:
    sys.exit(
      f'error: a server needs {", ".join(missing)}, not installed here: bash '
      'scripts/setup.sh serve'
    )
  try:
    _serve()
  except KeyboardInterrupt:  # While it starts.
    sys.exit('error: stopped before it served anything.')


def _serve() -> None:
  from t2x.decode import engine
  from t2x.inference import loading
  from t2x.serving import server

  directory = main.workdir()
  template = None
  if _TEMPLATE.value:
    try:
      template = reading.text(_TEMPLATE.value)
    except (OSError, ValueError) as error:
      sys.exit(f'error: --chat_template: {error}')
  config = engine.EngineConfig(
    num_slots=_SLOTS.value,
    max_waiting=_WAITING.value,
    max_length=_MAX_LENGTH.value,
    num_pages=_PAGES.value,
    page_size=_PAGE_SIZE.value,
    cache_dtype=_CACHE_DTYPE.value,
  )
  socket = server.bind(_HOST.value, _PORT.value)
  main.use_compilation_cache()
  trained = loading.load(**main.load_arguments())
  server.serve(
    trained,
    socket,
    name=_NAME.value or pathlib.PurePath(directory).name,
    engine=config,
    template=template,
    max_tokens=_MAX_TOKENS.value,
    max_body=_MAX_BODY.value,
    api_key=os.environ.get('T2X_API_KEY') or None,
    allowed_hosts=tuple(_ALLOWED_HOST.value),
  )


if __name__ == '__main__':
  main.app_run(serve)
