"""A decoder and its pool of pages: what an engine runs on the devices.

A bounded set of programs: one for each size of a prompt's chunk, one for each
number of rows, and one for each form of sampling.

Shape suffixes: B rows of a step, C chunk of a prompt, N blocks of a row, V
vocabulary, E ends, K alternatives.
"""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

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


class PagedDecoder:
  """Reads chunks of prompts and writes a token of many rows.

  Attributes:
    max_length: the most tokens of a text, prompt and new ones.
    num_pages: of the pool.
    vocab_size: of the model.
  """

  def __init__(self, model: decoder.Decoder, config: requests_lib.EngineConfig):
    """Makes the pool.

    Args:
      model: a decoder, best as `decoding_weights.prepare` returns it.
      config: sizes.

    Raises:
      ValueError: another model, or one with layers that keep no keys; no
        length is known; too few pages for one row.
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
    self._parts = prefill.row_parts()  # Into which the mesh splits rows.
    self._row_sizes = _row_sizes(config.num_slots, self._parts)
    self.restart()

  def restart(self) -> None:
    """Makes the pages anew, and forgets how the last rows were drawn."""
    size, dtype = self._config.page_size, self._config.cache_dtype
    self._settings = rows_lib.Settings(self.vocab_size)
    self._caches = None  # Freed before others are made.
    self._caches = engine_programs.empty_pages(
      self._model, self.num_pages, size, dtype
    )

  def warm(self, calibration: float) -> None:
    """Compiles what most requests need, before any comes.

    Args:
      calibration: of their sampling.
    """
    for size in self._config.chunks:
      self.read([0] * size, 0, size, [])
    for rows in self._row_sizes:
      for own in (Sampling(temperature=0), Sampling(), Sampling(top_p=0.9)):
        drawn = dataclasses.replace(own, calibration=calibration)
        request = requests_lib.Request(
          prompt=[0], num_tokens=1, sampling=drawn, num_top=1
        )
        self._write([requests_lib.Text(request)], rows, [None])

  def read(
    self, tokens: Sequence[int], start: int, size: int, pages: Sequence[int]
  ) -> None:
    """Reads part of a prompt.

    Args:
      tokens: at most `size` of them.
      start: position of the first.
      size: of the chunk that is compiled.
      pages: of the text; none keeps nothing.
    """
    chunk = self._chunk(tokens, start, size, pages)
    self._caches = engine_programs.read(self._model, self._caches, *chunk)

  def score(self, text: requests_lib.Text, num: int, size: int) -> None:
    """Reads on in a text's prompt, and adds the scores of the tokens after.

    Args:
      text: whose prompt is read up to its `num_read`.
      num: tokens that are read, at most `size`.
      size: of the chunk that is compiled.
    """
    request, start = text.request, text.num_read
    assert text.lease is not None
    part = request.prompt[start : start + num]
    chunk = self._chunk(part, start, size, text.lease.pages)
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
    text.prompt_scores.add(
      log_prob_C[:num], [a[:num] for a in top], request.num_top
    )

  def _chunk(self, tokens, start: int, size: int, pages) -> tuple[Any, ...]:
    """Returns part of a prompt, where it stands, and its pages."""
    rows = self._parts  # One, but on meshes that split rows.
    tokens_BC = prompts_lib.pad([tokens], (rows, size), 0)
    index_BC = np.full((rows, size), self._nowhere, np.int32)
    if pages:
      index_BC[0, : len(tokens)] = start + np.arange(len(tokens))
    pages_BN = prompts_lib.pad([pages], (rows, self._blocks), 0)
    return tokens_BC, index_BC, pages_BN

  def write(
    self, texts: Sequence[requests_lib.Text], masks: Sequence[Any]
  ) -> Any:
    """Returns the next token of each text, and what is told beside it.

    Args:
      texts: whose prompts are read, up to the last token.
      masks: what the control of each says of its next token, or None.

    Returns:
      Arrays of at least as many rows: tokens (B,), their log-probabilities
      (B,), and log-probabilities and tokens (B, K) of the most probable if any
      text asks for them.
    """
    rows = min(n for n in self._row_sizes if n >= len(texts))
    return self._write(texts, rows, masks)

  @property
  def _nowhere(self) -> int:
    """The position past the last block: what is written there is lost."""
    return self._blocks * self._config.page_size

  def _write(self, texts: Sequence[requests_lib.Text], rows: int, masks) -> Any:
    requests = [text.request for text in texts]
    lengths = [len(text.all_tokens) for text in texts]
    pages = [text.lease.pages if text.lease else [] for text in texts]
    places = [n - 1 if own else self._nowhere for n, own in zip(lengths, pages)]
    column = functools.partial(rows_lib.column, rows=rows)
    logits_BV, self._caches = engine_programs.write(
      self._model,
      self._caches,
      column(text.all_tokens[-1] for text in texts),
      column(places, fill=self._nowhere),
      prompts_lib.pad(pages, (rows, self._blocks), 0),
    )
    settings, ends_BE = self._settings.of(requests, rows)
    seeds = (request.seed % 2**32 for request in requests)
    token_B, log_prob_B = engine_programs.choose(
      logits_BV,
      settings,
      rows_lib.history(texts, settings, rows, self.vocab_size),
      column(seeds, dtype=np.uint32),
      column(request.row for request in requests),
      column(len(text.tokens) for text in texts),
      ends_BE,
      rows_lib.controls(masks, rows),
    )
    top: Any = None
    if any(request.num_top for request in requests):
      calibration_B = settings.calibration_B
      top = engine_programs.alternatives(
        logits_BV, calibration_B, self._config.num_top
      )
    return jax.device_get((token_B, log_prob_B, top))


def _row_sizes(num_slots: int, parts: int) -> list[int]:
  """Returns multiples of the parts up to the slots, each a quarter of the next.

  >>> _row_sizes(16, 1)
  [1, 4, 16]
  """
  sizes = [-(-num_slots // parts) * parts]
  while sizes[0] > parts:
    sizes.insert(0, -(-(sizes[0] // 4 or 1) // parts) * parts)
  return sizes
