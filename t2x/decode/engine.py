"""Texts that come and go: rows of one batch that begin and end by themselves.

Each step reads some tokens of the prompts that wait and writes one token of
every row that is read (Yu et al., 2022, Orca; Agrawal et al., 2023, on prompts
in chunks). Keys and values lie in pages, which rows that begin alike share. A
row's text is what `generate` writes for it alone, whatever else is in the
batch.

Shape suffixes: B rows of a step, V vocabulary.
"""

import collections

from t2x.decode import page_table
from t2x.decode import paged_decoder
from t2x.decode import processors
from t2x.decode import prompts as prompts_lib
from t2x.decode import requests
from t2x.decode import settings as settings_lib
from t2x.models import decoder

Sampling = settings_lib.SamplingConfig
EngineConfig = requests.EngineConfig
Request = requests.Request
Scores = requests.Scores
Text = requests.Text
Overloaded = requests.Overloaded


class Engine:
  """Runs a model for requests that come and go; not for several threads.

  >>> from flax import nnx
  >>> config = decoder.DecoderConfig(vocab_size=9, num_layers=2)
  >>> engine = Engine(decoder.Decoder(config, rngs=nnx.Rngs(0)))
  >>> texts = [engine.add(Request(prompt=[1, n], num_tokens=n)) for n in (2, 3)]
  >>> while engine.is_busy:
  ...   _ = engine.step()
  >>> [len(text.tokens) for text in texts]
  [2, 3]
  """

  def __init__(
    self, model: decoder.Decoder, config: EngineConfig = EngineConfig()
  ):
    """Makes the pool; arguments and errors as for `PagedDecoder`."""
    self.config = config
    self._decoder = paged_decoder.PagedDecoder(model, config)
    self.max_length = self._decoder.max_length
    self.counts = collections.Counter()
    self._begin()

  def restart(self) -> None:
    """Forgets all texts, and makes the pages anew."""
    self._begin()
    self._decoder.restart()

  def _begin(self) -> None:
    self.pages = page_table.Pages(
      self._decoder.num_pages, self.config.page_size
    )
    self._waiting: collections.deque[Text] = collections.deque()
    self._reading: Text | None = None
    self._writing: list[Text] = []

  @property
  def is_busy(self) -> bool:
    return bool(self._waiting or self._reading or self._writing)

  @property
  def most(self) -> int:
    """Texts that may be written or wait at a time."""
    return self.config.num_slots + self.config.max_waiting

  @property
  def num_waiting(self) -> int:
    return len(self._waiting)

  @property
  def num_running(self) -> int:
    return len(self._writing) + (self._reading is not None)

  def check(self, request: Request) -> None:
    """Raises ValueError if a request cannot be met by this engine."""
    vocab_size = self._decoder.vocab_size
    if request.num_tokens < 0:
      raise ValueError(f'num_tokens={request.num_tokens}; it is 0 or more.')
    ids = {f'ends[{i}]': end for i, end in enumerate(request.ends)}
    prompts_lib.check_settings({}, vocab_size=vocab_size, ids=ids)
    rows = prompts_lib.to_rows([request.prompt], vocab_size, None)
    prompts_lib.check_text(
      [len(row) for row in rows],
      request.num_tokens,
      self.max_length,
      'serve with more max_length, where the model has the positions',
    )
    if not 0 <= request.num_top <= self.config.num_top:
      raise ValueError(
        f'num_top={request.num_top}; it must be 0 to {self.config.num_top}.'
      )
    settings_lib.check_ids(request.sampling, vocab_size)

  def add(self, request: Request) -> Text:
    """Takes a request; its text comes about in the steps that follow.

    Raises:
      ValueError: it cannot be met.
      Overloaded: too many wait.
    """
    self.check(request)
    if self.num_waiting + self.num_running >= self.most:
      raise Overloaded(
        f'{self.num_waiting + self.num_running} texts are being written or '
        f'wait, and no more than {self.most} are taken (num_slots='
        f'{self.config.num_slots}, max_waiting={self.config.max_waiting}). Ask '
        'again later.'
      )
    text = Text(request)
    self._waiting.append(text)
    return text

  def cancel(self, text: Text) -> None:
    """Ends a text; its slot and its pages are free at once."""
    if text.reason is None:
      self._end(text, 'cancelled')

  def step(self) -> list[Text]:
    """Reads some of the prompts, and writes a token of each text.

    Returns:
      The texts that have a new token or are over.
    """
    budget, over = self.config.read, []
    while budget > 0 and (text := self._next_to_read()):
      budget -= self._read_chunk(text)
      if text.reason is not None:
        over.append(text)
    return over + self._write()

  def forget(self) -> None:
    """Leaves nothing of texts that are over for others to share."""
    self.pages.forget()

  def warm(self, calibration: float = 1.0) -> None:
    """Compiles what most requests need, before any comes.

    Args:
      calibration: of their sampling.
    """
    self._decoder.warm(calibration)

  def _next_to_read(self) -> Text | None:
    """Returns the text whose prompt is being read; one at a time.

    So that of many that begin alike, one is read, and the others share it.
    """
    if self._reading is None and self._waiting:
      if len(self._writing) < self.config.num_slots:
        text = self._waiting[0]
        prompt = text.request.prompt
        # The last token is written and never read.
        length = len(prompt) + text.request.num_tokens - 1
        # Scores come of reading.
        share = not text.request.scores_prompt
        text.lease = self.pages.lend(prompt, length, share)
        if text.lease is not None:
          self._waiting.popleft()
          self._reading = text
          text.num_shared = text.num_read = text.lease.num_shared
          self.counts['prompt_tokens'] += len(prompt)
          self.counts['shared_tokens'] += text.num_shared
    return self._reading

  def _read_chunk(self, text: Text) -> int:
    """Reads on in a prompt, up to its last token; returns what it cost."""
    prompt, lease = text.request.prompt, text.lease
    assert lease is not None
    if not (text.request.num_tokens or text.request.scores_prompt):
      self._end(text, 'length')
      return 0
    left = len(prompt) - 1 - text.num_read
    size = 0
    if left:
      fitting = [size for size in self.config.chunks if size >= left]
      size = min(fitting, default=max(self.config.chunks))
      part = prompt[text.num_read : text.num_read + min(size, left)]
      if text.request.scores_prompt:
        self._decoder.score(text, len(part), size)
      else:
        self._decoder.read(part, text.num_read, size, lease.pages)
      text.num_read += len(part)
    if text.num_read == len(prompt) - 1:
      self.pages.fill(lease, prompt[:-1])
      self._reading = None
      if text.request.num_tokens:
        self._writing.append(text)
      else:
        self._end(text, 'length')
    return size

  def _write(self) -> list[Text]:
    masks, broken = [], []
    for text in list(self._writing):
      try:
        masks.append(text.mask())
      except ValueError as error:
        self._break(text, error)
        broken.append(text)
    texts = list(self._writing)
    if not texts:
      return broken
    token_B, log_prob_B, top = self._decoder.write(texts, masks)
    for number, text in enumerate(texts):
      scores, own = requests.Scores(), slice(number, number + 1)
      likeliest = None if top is None else [a[own] for a in top]
      scores.add(log_prob_B[own], likeliest, text.request.num_top)
      self._take(text, int(token_B[number]), scores)
    self.counts['steps'] += 1
    self.counts['tokens'] += len(texts)
    return broken + texts

  def _take(self, text: Text, token: int, scores: requests.Scores) -> None:
    """Adds a token to a text, which may end with it."""
    request = text.request
    if token == processors.NONE:
      text.error = (
        'No token may come next: what is banned, biased and asked for leaves '
        'none.'
      )
      self._end(text, 'error')
      return
    if token in request.ends:
      text.end = token, scores
      self._end(text, 'stop')
      return
    try:
      text.add(token, scores)
    except ValueError as error:
      self._break(text, error)
      return
    control = request.control
    if control is not None and control.is_done:
      self._end(text, 'stop')
    elif len(text.tokens) == request.num_tokens:
      self._end(text, 'length')

  def _break(self, text: Text, error: ValueError) -> None:
    text.error = str(error)
    self._end(text, 'error')

  def _end(self, text: Text, reason: str) -> None:
    text.reason = reason
    if text in self._waiting:
      self._waiting.remove(text)
    if text is self._reading:
      self._reading = None
    lease = text.lease
    if text in self._writing and lease is not None:
      self._writing.remove(text)
      # Of the latest token there is no entry.
      self.pages.fill(lease, text.all_tokens[:-1])
    if lease is not None:
      self.pages.release(lease)
