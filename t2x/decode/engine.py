"""Continuous batching: an engine that serves requests as they come and go.

Each step prefills some tokens of the waiting prompts, and decodes one token of
every sequence whose prompt is complete (Yu et al., 2022, Orca; chunked prefill
as in Agrawal et al., 2023). Keys and values are kept in pages, which sequences
with a common prefix share. A request yields the tokens that `generate` gives
for it alone, whatever else is in the batch.

Shape suffixes: B rows of a step.
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
GeneratedSequence = requests.GeneratedSequence
Overloaded = requests.Overloaded


class Engine:
  """Serves requests with continuous batching; not thread-safe.

  >>> from flax import nnx
  >>> config = decoder.DecoderConfig(vocab_size=9, num_layers=2)
  >>> engine = Engine(decoder.Decoder(config, rngs=nnx.Rngs(0)))
  >>> requests = [Request(prompt=[1, n], num_tokens=n) for n in (2, 3)]
  >>> sequences = [engine.add(request) for request in requests]
  >>> while engine.is_busy:
  ...   _ = engine.step()
  >>> [len(sequence.tokens) for sequence in sequences]
  [2, 3]
  """

  def __init__(
    self, model: decoder.Decoder, config: EngineConfig = EngineConfig()
  ):
    """Creates the pool of pages.

    Args:
      model: the decoder, best in the form of `decoding_weights.prepare`.
      config: sizes of the engine.

    Raises:
      ValueError: as `PagedDecoder`.
    """
    self.config = config
    self._decoder = paged_decoder.PagedDecoder(model, config)
    self.max_length = self._decoder.max_length
    self.counts = collections.Counter()
    self._begin()

  def restart(self) -> None:
    """Drops all requests, and creates empty pages."""
    self._begin()
    self._decoder.restart()

  def _begin(self) -> None:
    self.pages = page_table.Pages(
      self._decoder.num_pages, self.config.page_size
    )
    self._waiting: collections.deque[GeneratedSequence] = collections.deque()
    self._prefilling: GeneratedSequence | None = None
    self._decoding: list[GeneratedSequence] = []

  @property
  def is_busy(self) -> bool:
    """Whether any request waits or runs."""
    return bool(self._waiting or self._prefilling or self._decoding)

  @property
  def most(self) -> int:
    """The most requests that may run or wait at a time."""
    return self.config.num_slots + self.config.max_waiting

  @property
  def num_waiting(self) -> int:
    """Number of requests that wait for a slot."""
    return len(self._waiting)

  @property
  def num_running(self) -> int:
    """Number of requests in prefill or decoding."""
    return len(self._decoding) + (self._prefilling is not None)

  def check(self, request: Request) -> None:
    """Raises ValueError if this engine cannot serve a request."""
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

  def add(self, request: Request) -> GeneratedSequence:
    """Queues a request.

    Returns:
      The sequence of the request, to which the following steps add tokens.

    Raises:
      ValueError: this engine cannot serve the request.
      Overloaded: too many requests wait.
    """
    self.check(request)
    if self.num_waiting + self.num_running >= self.most:
      raise Overloaded(
        f'{self.num_waiting + self.num_running} texts are being written or '
        f'wait, and no more than {self.most} are taken (num_slots='
        f'{self.config.num_slots}, max_waiting={self.config.max_waiting}). Ask '
        'again later.'
      )
    sequence = GeneratedSequence(request)
    self._waiting.append(sequence)
    return sequence

  def cancel(self, sequence: GeneratedSequence) -> None:
    """Ends a sequence, and frees its slot and pages at once."""
    if sequence.reason is None:
      self._end(sequence, 'cancelled')

  def step(self) -> list[GeneratedSequence]:
    """Prefills some prompt tokens, and decodes a token of each sequence.

    Returns:
      The sequences that have a new token or have finished.
    """
    budget, finished = self.config.read, []
    while budget > 0 and (sequence := self._next_to_prefill()):
      budget -= self._prefill_chunk(sequence)
      if sequence.reason is not None:
        finished.append(sequence)
    return finished + self._decode()

  def forget(self) -> None:
    """Makes the pages of finished sequences unavailable for sharing."""
    self.pages.forget()

  def warm(self, calibration: float = 1.0) -> None:
    """Compiles the programs that most requests need.

    Args:
      calibration: value of `SamplingConfig.calibration` in these requests.
    """
    self._decoder.warm(calibration)

  def _next_to_prefill(self) -> GeneratedSequence | None:
    """Returns the sequence in prefill, which is one at a time.

    So the first of many with a common prefix is computed, and the others share
    its pages.
    """
    if self._prefilling is None and self._waiting:
      if len(self._decoding) < self.config.num_slots:
        sequence = self._waiting[0]
        prompt = sequence.request.prompt
        # The last new token is never fed to the model.
        length = len(prompt) + sequence.request.num_tokens - 1
        # Scores of a prompt are computed in its prefill.
        share = not sequence.request.scores_prompt
        sequence.lease = self.pages.lend(prompt, length, share)
        if sequence.lease is not None:
          self._waiting.popleft()
          self._prefilling = sequence
          sequence.num_shared = sequence.num_cached = sequence.lease.num_shared
          self.counts['prompt_tokens'] += len(prompt)
          self.counts['shared_tokens'] += sequence.num_shared
    return self._prefilling

  def _prefill_chunk(self, sequence: GeneratedSequence) -> int:
    """Runs a chunk of a prompt, up to the token before its last.

    Returns:
      The number of tokens in the chunk, padding included.
    """
    prompt, lease = sequence.request.prompt, sequence.lease
    assert lease is not None
    if not (sequence.request.num_tokens or sequence.request.scores_prompt):
      self._end(sequence, 'length')
      return 0
    num_left = len(prompt) - 1 - sequence.num_cached
    size = 0
    if num_left:
      fitting = [size for size in self.config.chunks if size >= num_left]
      size = min(fitting, default=max(self.config.chunks))
      start = sequence.num_cached
      part = prompt[start : start + min(size, num_left)]
      if sequence.request.scores_prompt:
        self._decoder.score(sequence, len(part), size)
      else:
        self._decoder.prefill(part, start, size, lease.pages)
      sequence.num_cached += len(part)
    if sequence.num_cached == len(prompt) - 1:
      self.pages.fill(lease, prompt[:-1])
      self._prefilling = None
      if sequence.request.num_tokens:
        self._decoding.append(sequence)
      else:
        self._end(sequence, 'length')
    return size

  def _decode(self) -> list[GeneratedSequence]:
    """Decodes a token of each sequence; returns those that change."""
    masks, failed = [], []
    for sequence in list(self._decoding):
      try:
        masks.append(sequence.mask())
      except ValueError as error:
        self._fail(sequence, error)
        failed.append(sequence)
    sequences = list(self._decoding)
    if not sequences:
      return failed
    token_B, log_prob_B, top = self._decoder.decode(sequences, masks)
    for number, sequence in enumerate(sequences):
      scores, row = requests.Scores(), slice(number, number + 1)
      likeliest = None if top is None else [a[row] for a in top]
      scores.add(log_prob_B[row], likeliest, sequence.request.num_top)
      self._take(sequence, int(token_B[number]), scores)
    self.counts['steps'] += 1
    self.counts['tokens'] += len(sequences)
    return failed + sequences

  def _take(
    self, sequence: GeneratedSequence, token: int, scores: requests.Scores
  ) -> None:
    """Adds a token to a sequence, which may end with it."""
    request = sequence.request
    if token == processors.NONE:
      sequence.error = (
        'No token may come next: what is banned, biased and asked for leaves '
        'none.'
      )
      self._end(sequence, 'error')
      return
    if token in request.ends:
      sequence.end = token, scores
      self._end(sequence, 'stop')
      return
    try:
      sequence.add(token, scores)
    except ValueError as error:
      self._fail(sequence, error)
      return
    control = request.control
    if control is not None and control.is_done:
      self._end(sequence, 'stop')
    elif len(sequence.tokens) == request.num_tokens:
      self._end(sequence, 'length')

  def _fail(self, sequence: GeneratedSequence, error: ValueError) -> None:
    sequence.error = str(error)
    self._end(sequence, 'error')

  def _end(self, sequence: GeneratedSequence, reason: str) -> None:
    sequence.reason = reason
    if sequence in self._waiting:
      self._waiting.remove(sequence)
    if sequence is self._prefilling:
      self._prefilling = None
    lease = sequence.lease
    if sequence in self._decoding and lease is not None:
      self._decoding.remove(sequence)
      # The keys and values of the latest token were never computed.
      self.pages.fill(lease, sequence.all_tokens[:-1])
    if lease is not None:
      self.pages.release(lease)
