"""Turns the messages of a conversation into a prompt, by a chat template."""

from collections.abc import Sequence
import datetime
import json
from typing import Any

import jinja2
from jinja2 import ext
from jinja2 import nodes
from jinja2 import parser as parser_lib
from jinja2 import sandbox

from t2x.data import pretrained
from t2x.data import tokenizers

# The template if there is no other: lines of `role: content`.
_PLAIN = (
  "{% for message in messages %}{{ message['role'] }}: "
  "{{ message['content'] }}\n{% endfor %}assistant:"
)


class Chat:
  """Formats messages as one text, by a template in Jinja.

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
      tokenizer: tokenizer of the model. One of a checkpoint of Hugging Face may
        have a template (chat_template.jinja, or in tokenizer_config.json).
      template: template in Jinja to use instead; None for the tokenizer's own,
        or else plain lines.

    Raises:
      ValueError: the template has a syntax error.
    """
    self._tokenizer = tokenizer
    self._names: dict[str, Any] = {}
    text = template
    if isinstance(tokenizer, pretrained.PretrainedTokenizer):
      default, self._names = tokenizer.chat_template, tokenizer.token_names
      text = template or default
    self.stops = () if text else ('\nuser:',)
    self._prefix = () if text else tokenizer.prefix_ids
    # The template is not trusted, since it comes with a checkpoint: in the
    # sandbox it can format text and do nothing else.
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
    """Returns messages as one text, up to the start of the answer.

    Args:
      messages: dictionaries with `role` and `content`, in order.

    Raises:
      ValueError: the template refuses the messages.
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
    """Returns the token ids of `text`.

    Special tokens are part of a template; only the plain lines get a prefix.
    """
    return [*self._prefix, *self._tokenizer.encode(self.text(messages))]


class _Generation(ext.Extension):
  """Ignores {% generation %}, which marks the answers for training."""

  tags = {'generation'}

  def parse(self, parser: parser_lib.Parser) -> list[nodes.Node]:
    next(parser.stream)
    return parser.parse_statements(('name:endgeneration',), drop_needle=True)


def _to_json(value: object, **options: Any) -> str:
  return json.dumps(value, **{'ensure_ascii': False, **options})


def _refuse(message: str) -> None:
  raise jinja2.TemplateError(message)


def _now(form: str) -> str:
  return datetime.datetime.now().strftime(form)
