"""What the completion interface takes, checked field by field.

The names are those of OpenAI's API; what it lacks (top_k, min_p, regex, ...)
has the names that other servers gave it. A field that is unknown, or that this
server cannot honour, is an error and never ignored.
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
  """Any body: exact types, no unknown fields."""

  model_config = pydantic.ConfigDict(
    extra='forbid', strict=True, allow_inf_nan=False
  )

  @pydantic.model_validator(mode='before')
  @classmethod
  def _null_is_default(cls, data):
    if not isinstance(data, dict):
      return data
    return {name: value for name, value in data.items() if value is not None}


class StreamOptions(Body):
  include_usage: bool = False
  include_obfuscation: bool = False  # Nothing is padded.


class JsonSchema(Body):
  name: str = ''
  description: str | None = None
  # `schema` would hide a method of pydantic's.
  own: dict[str, Any] = pydantic.Field(alias='schema')
  strict: bool | None = None


class ResponseFormat(Body):
  type: Literal['text', 'json_object', 'json_schema']
  json_schema: JsonSchema | None = None

  @pydantic.model_validator(mode='after')
  def _has_schema(self):
    if (self.type == 'json_schema') != (self.json_schema is not None):
      raise ValueError(
        'type json_schema needs the field json_schema, and no other type has it'
      )
    return self


class Common(Body):
  """What both kinds of completion take."""

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
  # They change nothing about a text.
  user: str | None = None
  metadata: dict[str, str] | None = None
  safety_identifier: str | None = None
  prompt_cache_key: str | None = None
  service_tier: str | None = None
  store: bool | None = None
  # Where they ask for nothing.
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
  type: Literal['text']
  text: str


class Message(Body):
  role: Literal['system', 'developer', 'user', 'assistant']
  content: str | list[TextPart]
  name: str | None = None

  @property
  def as_dict(self) -> dict[str, str]:
    """What a template sees."""
    content = self.content
    if not isinstance(content, str):
      content = ''.join(part.text for part in content)
    named = {} if self.name is None else {'name': self.name}
    return {'role': self.role, 'content': content, **named}


class ChatBody(Common):
  """POST /v1/chat/completions."""

  messages: list[Message] = pydantic.Field(min_length=1)
  max_tokens: int | None = pydantic.Field(default=None, ge=1)
  max_completion_tokens: int | None = pydantic.Field(default=None, ge=1)
  logprobs: bool = False
  top_logprobs: int = pydantic.Field(default=0, ge=0, le=20)

  @pydantic.model_validator(mode='after')
  def _asks_for_log_probs(self):
    if self.top_logprobs and not self.logprobs:
      raise ValueError('top_logprobs needs logprobs to be true')
    return self


def explain(
  error: pydantic.ValidationError, form: type[Body]
) -> tuple[str, str | None]:
  """Returns what is wrong with a body in one line, and the field."""
  first = error.errors(include_url=False, include_context=False)[0]
  place = [str(part) for part in first['loc']]
  # Of the members of a union, their names are noise.
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
