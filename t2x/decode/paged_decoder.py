"""A decoder with paged caches: the device side of the engine.

It compiles a bounded set of programs: one for each size of a chunk of prefill,
one for each number of rows, and one for each form of sampling.

Shape suffixes: B rows of a step, C chunk of a prompt, N blocks of a row, V
vocabulary, E ends, K alternatives.
"""

from collections.abc import Sequence
import dataclasses
import functools

import jax
import numpy as np

from t2x.decode import engine_programs
from t2x.decode import prefill
from t2x.decode import prompts as prompts_lib
from t2x.decode import requests as requests_lib
from t2x.decode import rows as rows_lib
from t2x.decode import settings as settings_lib
from t2x.layers import attention_kinds
from t2x.models import decoder

Sampling = settings_lib.SamplingConfig
_Decoded = tuple[np.ndarray, np.ndarray, Sequence[np.ndarray] | None]


class PagedDecoder:
  """Prefills chunks of prompts, and decodes a token of many sequences.

  Attributes:
    max_length: the most tokens of a sequence, prompt and new ones.
    num_pages: number of pages in the pool.
    vocab_size: size of the model's vocabulary.
  """

  def __init__(self, model: decoder.Decoder, config: requests_lib.EngineConfig):
    """Creates the pool of pages.

    Args:
      model: the decoder, best in the form of `decoding_weights.prepare`.
      config: sizes of the engine.

    Raises:
      ValueError: the model is no decoder, or has layers that keep no keys;
        neither model nor config limits the length; there are too few pages for
        one sequence.
    """
    if not isinstance(model, decoder.Decoder):
      raise ValueError(
        f'{type(model).__name__} cannot be served: rows that come and go need '
        'a decoder. An encoder-decoder answers in batches: '
        'experiments/generate.py.'
      )
    for kind in model.config.kinds:
      attention_kinds.check_pages(kind)
    self._model, self._config = model, config
    self.vocab_size = model.config.vocab_size
    length = prompts_lib.limit(model.config.max_length, config.max_length)
    if length is None:
      raise ValueError(
        'The positions of the model have no limit: give max_length, the most '
        'tokens of a text, prompt and new ones.'
      )
    self.max_length: int = length
    size = config.page_size
    self._blocks = -(-length // size)
    num_pages = config.num_pages or config.num_slots * self._blocks
    if num_pages < self._blocks:
      raise ValueError(
        f'num_pages={num_pages} of {size} positions; one text of max_length='
        f'{length} tokens needs {self._blocks}.'
      )
    self.num_pages: int = num_pages
    self._parts = prefill.row_parts()  # Rows come in multiples of this.
    self._row_sizes = _row_sizes(config.num_slots, self._parts)
    self.restart()

  def restart(self) -> None:
    """Creates empty pages, and drops the settings of the last step."""
    size, dtype = self._config.page_size, self._config.cache_dtype
    self._settings = rows_lib.Settings(self.vocab_size)
    self._caches = None  # Frees the old pages before the new are allocated.
    self._caches = engine_programs.empty_pages(
      self._model, self.num_pages, size, dtype
    )

  def warm(self, calibration: float) -> None:
    """Compiles the programs that most requests need.

    Args:
      calibration: value of `SamplingConfig.calibration` in these requests.
    """
    for size in self._config.chunks:
      self.prefill([0] * size, 0, size, [])
    for rows in self._row_sizes:
      for form in (Sampling(temperature=0), Sampling(), Sampling(top_p=0.9)):
        sampling = dataclasses.replace(form, calibration=calibration)
        request = requests_lib.Request(
          prompt=[0], num_tokens=1, sampling=sampling, num_top=1
        )
        self._decode([requests_lib.GeneratedSequence(request)], rows, [None])

  def prefill(
    self, tokens: Sequence[int], start: int, size: int, pages: Sequence[int]
  ) -> None:
    """Writes the keys and values of part of a prompt into its pages.

    Args:
      tokens: token ids, at most `size` of them.
      start: position of the first token.
      size: size of the compiled chunk, to which the tokens are padded.
      pages: pages of the sequence; if empty, nothing is kept.
    """
    chunk = self._chunk(tokens, start, size, pages)
    self._caches = engine_programs.prefill_step(
      self._model, self._caches, *chunk
    )

  def score(
    self, sequence: requests_lib.GeneratedSequence, num: int, size: int
  ) -> None:
    """Prefills part of a prompt, and adds the scores of the tokens after it.

    Args:
      sequence: the sequence, in whose prompt `num_cached` tokens are done.
      num: number of tokens to prefill, at most `size`.
      size: size of the compiled chunk, to which the tokens are padded.
    """
    request, start = sequence.request, sequence.num_cached
    assert sequence.lease is not None
    part = request.prompt[start : start + num]
    chunk = self._chunk(part, start, size, sequence.lease.pages)
    rows = self._parts
    after = request.prompt[start + 1 : start + 1 + num]
    calibration = request.sampling.calibration
    log_prob_BC, top, self._caches = engine_programs.score(
      self._model,
      self._caches,
      *chunk,
      prompts_lib.pad([after], (rows, size), 0),
      rows_lib.column([calibration] * rows, rows, dtype=np.float32),
      self._config.num_top,
    )
    log_prob_C, top = jax.device_get((log_prob_BC[0], [a[0] for a in top]))
    sequence.prompt_scores.add(
      log_prob_C[:num], [a[:num] for a in top], request.num_top
    )

  def _chunk(
    self, tokens: Sequence[int], start: int, size: int, pages: Sequence[int]
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns tokens (B, C), their positions (B, C) and pages (B, N)."""
    rows = self._parts  # One, except on meshes that shard rows.
    tokens_BC = prompts_lib.pad([tokens], (rows, size), 0)
    index_BC = np.full((rows, size), self._nowhere, np.int32)
    if pages:
      index_BC[0, : len(tokens)] = start + np.arange(len(tokens))
    pages_BN = prompts_lib.pad([pages], (rows, self._blocks), 0)
    return tokens_BC, index_BC, pages_BN

  def decode(
    self,
    sequences: Sequence[requests_lib.GeneratedSequence],
    masks: Sequence[requests_lib.Mask | None],
  ) -> _Decoded:
    """Decodes the next token of each sequence.

    Args:
      sequences: sequences whose prompts are done, up to the last token.
      masks: mask of the next token of each; None if it has no constraint.

    Returns:
      Arrays of at least as many rows as sequences: tokens (B,), their
      log-probabilities (B,), and log-probabilities and ids (B, K) of the
      likeliest tokens; None if no request needs them.
    """
    rows = min(n for n in self._row_sizes if n >= len(sequences))
    return self._decode(sequences, rows, masks)

  @property
  def _nowhere(self) -> int:
    """The position past the last block, where writes are dropped."""
    return self._blocks * self._config.page_size

  def _decode(
    self,
    sequences: Sequence[requests_lib.GeneratedSequence],
    rows: int,
    masks: Sequence[requests_lib.Mask | None],
  ) -> _Decoded:
    requests = [sequence.request for sequence in sequences]
    lengths = [len(sequence.all_tokens) for sequence in sequences]
    leases = [sequence.lease for sequence in sequences]
    pages = [lease.pages if lease else [] for lease in leases]
    places = [
      length - 1 if row_pages else self._nowhere
      for length, row_pages in zip(lengths, pages)
    ]
    column = functools.partial(rows_lib.column, rows=rows)
    logits_BV, self._caches = engine_programs.decode_step(
      self._model,
      self._caches,
      column(sequence.all_tokens[-1] for sequence in sequences),
      column(places, fill=self._nowhere),
      prompts_lib.pad(pages, (rows, self._blocks), 0),
    )
    settings, ends_BE = self._settings.of(requests, rows)
    seeds = (request.seed % 2**32 for request in requests)
    token_B, log_prob_B = engine_programs.choose(
      logits_BV,
      settings,
      rows_lib.history(sequences, settings, rows, self.vocab_size),
      column(seeds, dtype=np.uint32),
      column(request.row for request in requests),
      column(len(sequence.tokens) for sequence in sequences),
      ends_BE,
      rows_lib.controls(masks, rows),
    )
    top = None
    if any(request.num_top for request in requests):
      calibration_B = settings.calibration_B
      top = engine_programs.alternatives(
        logits_BV, calibration_B, self._config.num_top
      )
    return jax.device_get((token_B, log_prob_B, top))


def _row_sizes(num_slots: int, parts: int) -> list[int]:
  """Returns the numbers of rows that are compiled.

  They are multiples of `parts` up to the slots, each about a quarter of the
  next.

  >>> _row_sizes(16, 1)
  [1, 4, 16]
  """
  sizes = [-(-num_slots // parts) * parts]
  while sizes[0] > parts:
    sizes.insert(0, -(-(sizes[0] // 4 or 1) // parts) * parts)
  return sizes
