"""Bodies of requests, and the checks of their fields.

The fields are those of OpenAI's API, and some of other servers (top_k, min_p,
regex, ...). A field that is unknown, or that this server does not support, is
an error and never ignored.
"""

import difflib
from typing import Annotated
from typing import Any
from typing import Literal

import pydantic

_MOST = 2**31 - 1
_MOST_CHOICES = 16
_MOST_STOPS = 16
_MOST_WORDS = 64

Stop = Annotated[str, pydantic.Field(min_length=1, max_length=256)]
Stops = Annotated[list[Stop], pydantic.Field(max_length=_MOST_STOPS)]
Bias = Annotated[float, pydantic.Field(ge=-100, le=100)]
Ids = Annotated[list[int], pydantic.Field(min_length=1)]


class Body(pydantic.BaseModel):
  """The base of all JSON objects: exact types, no unknown fields."""

  model_config = pydantic.ConfigDict(
    extra='forbid', strict=True, allow_inf_nan=False
  )

  @pydantic.model_validator(mode='before')
  @classmethod
  def _null_is_default(cls, data: object) -> object:
    if not isinstance(data, dict):
      return data
    return {name: value for name, value in data.items() if value is not None}


class StreamOptions(Body):
  """Options of a streamed answer.

  Attributes:
    include_usage: whether the last event has the numbers of tokens.
    include_obfuscation: accepted without effect: events are never padded.
  """

  include_usage: bool = False
  include_obfuscation: bool = False


class JsonSchema(Body):
  """The JSON schema of a `response_format`.

  Attributes:
    name: name of the schema, without effect.
    description: purpose of the schema, without effect.
    definition: the field `schema`, whose name would hide a method of pydantic.
    strict: accepted without effect: answers always follow the schema.
  """

  name: str = ''
  description: str | None = None
  definition: dict[str, Any] = pydantic.Field(alias='schema')
  strict: bool | None = None


class ResponseFormat(Body):
  """The format of an answer: text, any JSON object, or JSON of a schema.

  Attributes:
    type: format of the answer.
    json_schema: schema of the type `json_schema`; None for the other types.
  """

  type: Literal['text', 'json_object', 'json_schema']
  json_schema: JsonSchema | None = None

  @pydantic.model_validator(mode='after')
  def _has_schema(self) -> 'ResponseFormat':
    if (self.type == 'json_schema') != (self.json_schema is not None):
      raise ValueError(
        'type json_schema needs the field json_schema, and no other type has it'
      )
    return self


class Common(Body):
  """Fields of both interfaces; docs/serving.md explains them."""

  model: str | None = None
  n: int = pydantic.Field(default=1, ge=1, le=_MOST_CHOICES)
  stream: bool = False
  stream_options: StreamOptions | None = None
  stop: Stop | Stops | None = None
  seed: int | None = None
  temperature: float = pydantic.Field(default=1.0, ge=0, le=100)
  top_p: float = pydantic.Field(default=1.0, gt=0, le=1)
  top_k: int | None = pydantic.Field(default=None, ge=-1, le=_MOST)
  min_p: float = pydantic.Field(default=0.0, ge=0, le=1)
  typical_p: float = pydantic.Field(default=1.0, gt=0, le=1)
  repetition_penalty: float = pydantic.Field(default=1.0, gt=0, le=100)
  presence_penalty: float = pydantic.Field(default=0.0, ge=-100, le=100)
  frequency_penalty: float = pydantic.Field(default=0.0, ge=-100, le=100)
  min_tokens: int = pydantic.Field(default=0, ge=0, le=_MOST)
  logit_bias: dict[str, Bias] = {}
  banned_words: list[Stop] = pydantic.Field(default=[], max_length=_MOST_WORDS)
  ignore_eos: bool = False
  response_format: ResponseFormat | None = None
  regex: str | None = None
  grammar: str | None = None
  keywords: list[Stop] = pydantic.Field(default=[], max_length=_MOST_WORDS)
  # Fields that are accepted without effect.
  user: str | None = None
  metadata: dict[str, str] | None = None
  safety_identifier: str | None = None
  prompt_cache_key: str | None = None
  service_tier: str | None = None
  store: bool | None = None
  # Accepted only if empty.
  tools: Annotated[list[Any], pydantic.Field(max_length=0)] | None = None

  @property
  def stops(self) -> list[str]:
    """The stop strings, as a list."""
    if self.stop is None:
      return []
    return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionBody(Common):
  """POST /v1/completions."""

  prompt: str | Ids | list[str] | list[Ids]
  max_tokens: int = pydantic.Field(default=16, ge=0)
  logprobs: int | None = pydantic.Field(default=None, ge=0, le=20)
  echo: bool = False
  best_of: Literal[1] | None = None


class TextPart(Body):
  """A part of a message's content.

  Attributes:
    type: always `text`; other contents are not supported.
    text: text of the part.
  """

  type: Literal['text']
  text: str


class ChatMessage(Body):
  """A message of a conversation.

  Attributes:
    role: author of the message.
    content: text of the message, or its parts.
    name: name of the author; None for no name.
  """

  role: Literal['system', 'developer', 'user', 'assistant']
  content: str | list[TextPart]
  name: str | None = None

  @property
  def as_dict(self) -> dict[str, str]:
    """The message as a chat template reads it, its parts joined."""
    content = self.content
    if not isinstance(content, str):
      content = ''.join(part.text for part in content)
    named = {} if self.name is None else {'name': self.name}
    return {'role': self.role, 'content': content, **named}


class ChatBody(Common):
  """POST /v1/chat/completions."""

  messages: list[ChatMessage] = pydantic.Field(min_length=1)
  max_tokens: int | None = pydantic.Field(default=None, ge=1)
  max_completion_tokens: int | None = pydantic.Field(default=None, ge=1)
  logprobs: bool = False
  top_logprobs: int = pydantic.Field(default=0, ge=0, le=20)

  @pydantic.model_validator(mode='after')
  def _asks_for_log_probs(self) -> 'ChatBody':
    if self.top_logprobs and not self.logprobs:
      raise ValueError('top_logprobs needs logprobs to be true')
    return self


def explain(
  error: pydantic.ValidationError, form: type[Body]
) -> tuple[str, str | None]:
  """Returns a message of one line for an invalid body, and the field.

  Args:
    error: errors of pydantic, of which the first is explained.
    form: class of the body.

  Returns:
    The message, and the field at fault; None if the error is of no field.
  """
  first = error.errors(include_url=False, include_context=False)[0]
  place = [str(part) for part in first['loc']]
  # For a union, `loc` ends with names of its members, which say nothing.
  field = next(iter(place), None)
  if first['type'] == 'extra_forbidden':
    name = '.'.join(place)
    near = difflib.get_close_matches(name, form.model_fields, n=1)
    hint = f' Did you mean {near[0]!r}?' if near else ''
    return (
      f'Unknown field {name!r}: this server has no such setting.{hint}',
      field,
    )
  if field == 'tools':
    return 'tools: this server has none; send no tools.', field
  if place[0:1] == ['messages'] and 'content' in place:
    return 'messages: the content must be text, alone or in parts.', field
  given = repr(first.get('input'))
  given = given if len(given) <= 60 else given[:57] + '...'
  if field is None:
    return f'{first["msg"]}.', None
  if first['type'] == 'missing':
    return f'{".".join(place)} is missing.', field
  return f'{field}: {first["msg"]}; it is {given}.', field
