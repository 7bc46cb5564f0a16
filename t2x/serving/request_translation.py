"""Translates the body of an HTTP request to requests of the engine."""

from collections.abc import Sequence
import dataclasses
import secrets
from typing import Any

from t2x.decode import engine as engine_lib
from t2x.inference import constraints
from t2x.inference import keyword_constraints
from t2x.inference import text_stream
from t2x.inference import trained_model
from t2x.serving import chat as chat_lib
from t2x.serving import completions
from t2x.serving import engine_thread
from t2x.serving import protocol


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Limits of one HTTP request.

  Attributes:
    max_tokens: greatest number of new tokens of a text.
    max_texts: greatest number of texts, for all prompts together.
  """

  max_tokens: int = 4096
  max_texts: int = 64

  def __post_init__(self) -> None:
    if self.max_tokens < 1:
      raise ValueError(f'max_tokens={self.max_tokens}; it must be 1 or more.')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """The requests of one body.

  Attributes:
    requests: requests to the engine, one for each text.
    texts: detokenizer of each text.
    prefixes: text of the prompt for each text that begins with it (`echo`);
      None for the others.
    num_prompt: number of tokens of all prompts.
    num_top: number of likeliest tokens that are shown at each position; None
      for no log-probabilities at all.
  """

  requests: Sequence[engine_lib.Request]
  texts: Sequence[text_stream.TextStream]
  prefixes: Sequence[str | None]
  num_prompt: int
  num_top: int | None


class RequestTranslator:
  """Turns bodies into requests to the engine, and its tokens into text.

  Attributes:
    name: name of the model for clients.
    token_bytes: bytes that each token of the model adds to a text.
  """

  def __init__(
    self,
    trained: trained_model.Trained,
    name: str,
    *,
    chat: chat_lib.Chat,
    limits: Limits = Limits(),
    max_length: int,
  ):
    """Prepares the translation for one model.

    Args:
      trained: model that is served.
      name: name of the model for clients.
      chat: formatter of conversations.
      limits: limits of one HTTP request.
      max_length: greatest number of tokens of a sequence in the engine, prompt
        and new ones.
    """
    self.name = name
    self._trained, self._chat, self._limits = trained, chat, limits
    self._max_length = max_length
    self.token_bytes = trained.token_bytes
    self._ends = trained.end_ids
    self._controls = constraints.ConstraintFactory(trained)

  def job(self, body: protocol.CompletionBody | protocol.ChatBody) -> Job:
    """Returns the requests of a body.

    Tokenizing and compiling grammars may take a while.

    Args:
      body: checked body of an HTTP request.

    Raises:
      ValueError: the body asks for something impossible.
    """
    if isinstance(body, protocol.ChatBody):
      messages = [message.as_dict for message in body.messages]
      prompts = [self._chat.prompt_ids(messages)]
      wanted = body.max_completion_tokens or body.max_tokens
      num_top = body.top_logprobs if body.logprobs else None
      stops, given = [*body.stops, *self._chat.stops], [None]
      echoes = False
    else:
      prompts, given = self._prompts(body)
      echoes = body.echo
      wanted, num_top = body.max_tokens, body.logprobs
      stops = body.stops
    if len(prompts) * body.n > self._limits.max_texts:
      raise ValueError(
        f'{len(prompts)} prompts times n={body.n} are '
        f'{len(prompts) * body.n} texts; one request may ask for '
        f'{self._limits.max_texts}.'
      )
    seed = secrets.randbits(32) if body.seed is None else body.seed
    sampling = self._sampling(body)
    requests = []
    for number, prompt in enumerate(prompts):
      num_tokens = self._num_tokens(wanted, len(prompt))
      if body.min_tokens > num_tokens:
        raise ValueError(
          f'min_tokens={body.min_tokens} is above the {num_tokens} new tokens '
          'that the text may have.'
        )
      control = self._control(body, num_tokens)
      for choice in range(body.n):
        requests.append(
          engine_lib.Request(
            prompt=prompt,
            num_tokens=num_tokens,
            sampling=sampling,
            seed=seed,
            row=number * body.n + choice,
            ends=() if body.ignore_eos and control is None else self._ends,
            num_top=num_top or 0,
            control=control and control.begin(prompt),
            scores_prompt=echoes and num_top is not None,
          )
        )
    begin = self._echoed if echoes else self._after
    streams = [
      begin(request.prompt, given[number // body.n], stops)
      for number, request in enumerate(requests)
    ]
    return Job(
      requests=requests,
      texts=[text for text, _ in streams],
      prefixes=[prefix for _, prefix in streams],
      num_prompt=sum(map(len, prompts)),
      num_top=num_top,
    )

  def start(
    self, job: Job, runner: engine_thread.Runner
  ) -> list[completions.Choice]:
    """Submits the requests of a job; must be called on the event loop.

    Args:
      job: requests, from `job`.
      runner: thread of the engine.

    Returns:
      One choice for each request.

    Raises:
      ValueError: the engine cannot run a request.
      engine.Overloaded: too many requests are waiting.
      engine_thread.Stopped: the engine has stopped.
    """
    streams = runner.submit(list(job.requests))
    rows = zip(streams, job.texts, job.prefixes, strict=True)
    return [completions.Choice(index, *row) for index, row in enumerate(rows)]

  def _after(
    self, prompt: Sequence[int], given: str | None, stops: Sequence[str]
  ) -> tuple[text_stream.TextStream, str | None]:
    """Returns the detokenizer of a text that follows a prompt, and None."""
    del given
    return text_stream.TextStream(self._trained.tokenizer, prompt, stops), None

  def _echoed(
    self, prompt: Sequence[int], given: str | None, stops: Sequence[str]
  ) -> tuple[text_stream.TextStream, str | None]:
    """Returns the detokenizer of a text with its prompt, and the prompt's text.

    Args:
      prompt: token ids of the prompt.
      given: text of the prompt; None if it was given as token ids.
      stops: strings before the first of which the text ends.
    """
    text = text_stream.TextStream(self._trained.tokenizer, stop=stops)
    return text, text.echo(prompt, given)

  def _prompts(
    self, body: protocol.CompletionBody
  ) -> tuple[list[list[int]], Sequence[str | None]]:
    """Returns the token ids of the prompts, and their texts.

    The texts are None for prompts that were given as token ids.
    """
    given: Any = body.prompt
    if isinstance(given, str) or (given and isinstance(given[0], int)):
      given = [given]
    if not given:
      raise ValueError('prompt is an empty list; give a text.')
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    if texts:
      rows = self._trained.prompt_ids(texts)
      if not all(rows):
        raise ValueError(
          'prompt is empty, and texts of this model begin with no token of '
          'their own: give it a few letters to go on from.'
        )
    else:
      rows = [list(prompt) for prompt in given]
      size = self._trained.config.model.vocab_size
      wrong = [i for ids in rows for i in ids if not 0 <= i < size]
      if wrong:
        raise ValueError(
          f'prompt has the token id {wrong[0]}, and the vocabulary has {size} '
          f'tokens, 0 to {size - 1}.'
        )
    return rows, texts or [None] * len(rows)

  def _num_tokens(self, wanted: int | None, length: int) -> int:
    """Returns the greatest number of new tokens of a text.

    Args:
      wanted: number that the body asks for; None for as many as possible.
      length: number of tokens of the prompt.
    """
    most, room = self._limits.max_tokens, self._max_length - length
    least = 1 if wanted is None else wanted
    if least > room:
      raise ValueError(
        f'The prompt has {length} tokens and max_tokens is {least}; a '
        f'text may hold {self._max_length} in all. Shorten the prompt'
        + (f', or ask for at most {room}.' if room > 0 else '.')
      )
    if wanted is None:
      return min(most, room)
    if wanted > most:
      raise ValueError(
        f'max_tokens={wanted}; this server writes at most {most} new tokens.'
      )
    return wanted

  def _sampling(self, body: protocol.Common) -> engine_lib.Sampling:
    bias = {}
    for token, value in body.logit_bias.items():
      if not token.isdecimal():
        raise ValueError(
          f'logit_bias names {token!r}; its keys are token ids, as in "50256".'
        )
      # -100 bans a token, as in OpenAI's API.
      bias[int(token)] = float('-inf') if value <= -100 else value
    off = lambda value, neutral: None if value == neutral else value
    given = {
      'temperature': body.temperature,
      'top_k': None if body.top_k in (None, -1, 0) else body.top_k,
      'top_p': off(body.top_p, 1.0),
      'min_p': off(body.min_p, 0.0),
      'typical_p': off(body.typical_p, 1.0),
      'repetition_penalty': body.repetition_penalty,
      'presence_penalty': body.presence_penalty,
      'frequency_penalty': body.frequency_penalty,
      'min_tokens': body.min_tokens,
    }
    # Fields that the body leaves out have the checkpoint's defaults.
    defaults = self._trained.generation.sampling
    fields = body.model_fields_set
    given |= {k: v for k, v in defaults.items() if k not in fields}
    return self._trained.calibrated(
      engine_lib.Sampling(
        **given, bias=bias, banned_words=self._trained.banned(body.banned_words)
      )
    )

  def _control(
    self, body: protocol.Common, num_tokens: int
  ) -> constraints.Rule | keyword_constraints.Keywords | None:
    """Returns the constraint of the texts; None for no constraint."""
    form = body.response_format
    schema = None
    if form is not None and form.type != 'text':
      given = form.json_schema
      schema = {'type': 'object'} if given is None else given.definition
    return self._controls.make(
      num_tokens=num_tokens,
      regex=body.regex,
      grammar=body.grammar,
      json_schema=schema,
      keywords=body.keywords,
    )
