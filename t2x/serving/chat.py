"""From a conversation to the prompt that a model goes on with."""

from collections.abc import Sequence
import datetime
import json
from typing import Any

import jinja2
from jinja2 import ext
from jinja2 import sandbox

from t2x.data import pretrained
from t2x.data import tokenizers

# Lines of `role: content`, where no template says more.
_PLAIN = (
  "{% for message in messages %}{{ message['role'] }}: "
  "{{ message['content'] }}\n{% endfor %}assistant:"
)


class Chat:
  """Writes messages as one text, by a template in Jinja.

  >>> chat = Chat(tokenizers.BytesTokenizer(tokenizers.Bytes()))
  >>> chat.text([{'role': 'user', 'content': 'Hi'}])
  'user: Hi\\nassistant:'

  Attributes:
    stops: strings before which an answer ends.
  """

  def __init__(
    self, tokenizer: tokenizers.Tokenizer, template: str | None = None
  ):
    """Reads the template.

    Args:
      tokenizer: of the model; that of a checkpoint of others may bring its own
        template (chat_template.jinja, or in tokenizer_config.json).
      template: instead of it.

    Raises:
      ValueError: the template cannot be read.
    """
    self._tokenizer = tokenizer
    self._names: dict[str, Any] = {}
    own = None
    if isinstance(tokenizer, pretrained.PretrainedTokenizer):
      own, self._names = tokenizer.chat_template, tokenizer.token_names
    text = template or own
    self.stops = () if text else ('\nuser:',)
    self._prefix = () if text else tokenizer.prefix_ids
    # It comes with a checkpoint: it may make text and do nothing else.
    environment = sandbox.ImmutableSandboxedEnvironment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=['jinja2.ext.loopcontrols', _Generation],
    )
    # As in transformers, whose filter leaves < and > as they are.
    environment.filters['tojson'] = _to_json
    environment.globals['raise_exception'] = _refuse
    environment.globals['strftime_now'] = _now
    try:
      self._template = environment.from_string(text or _PLAIN)
    except jinja2.TemplateError as error:
      raise ValueError(f'The chat template cannot be read: {error}') from None

  def text(self, messages: Sequence[dict[str, str]]) -> str:
    """Returns messages as one text, up to where the answer begins.

    Raises:
      ValueError: the template refuses them.
    """
    try:
      return self._template.render(
        messages=list(messages),
        tools=None,
        documents=None,
        add_generation_prompt=True,
        **self._names,
      )
    except Exception as error:  # A template may fail in any way.
      raise ValueError(
        f'The chat template refuses these messages: {error}'
      ) from None

  def prompt_ids(self, messages: Sequence[dict[str, str]]) -> list[int]:
    """Returns the tokens of `text`; special ones stand in the template."""
    return [*self._prefix, *self._tokenizer.encode(self.text(messages))]


class _Generation(ext.Extension):
  """{% generation %}: what training looks at; here it is as if not there."""

  tags = {'generation'}

  def parse(self, parser):
    next(parser.stream)
    return parser.parse_statements(('name:endgeneration',), drop_needle=True)


def _to_json(value: Any, **options: Any) -> str:
  return json.dumps(value, **{'ensure_ascii': False, **options})


def _refuse(message: str) -> None:
  raise jinja2.TemplateError(message)


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)
