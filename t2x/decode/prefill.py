"""Prefill: checks the prompts of a call, and computes their caches.

Shape suffixes: B batch (padded), S cache capacity or source, E ends.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2x.decode import decode_loop
from t2x.decode import processors
from t2x.decode import prompts as prompts_lib
from t2x.layers import attention_kinds
from t2x.models import decoder
from t2x.models import encoder_decoder
from t2x.parallel import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationOptions:
  """Options that sampling, beam search and speculative decoding share.

  Attributes:
    eos_id: token that ends a sequence, or several such tokens; None always
      generates `num_tokens` tokens.
    pad_id: token that pads rows; no other token attends to it.
    start_id: first token of an encoder-decoder's answer, `pad_id` if None, as
      in T5. With a decoder, the token that replaces an empty prompt, which is
      an error if None.
    max_length: the most tokens of a sequence, new ones included; for a model
      whose positions have no limit, usually the length of training. None sets
      no limit beside the model's options.
    capacity: number of positions in the caches; calls of one capacity and
      `num_rows` share their compiled programs. None rounds up the need of this
      call.
    num_rows: number of rows to which the prompts are padded. None takes a power
      of two, at least 4.
    chunk: number of prompt tokens that run at a time.
    cache_dtype: dtype of cached keys and values; None is the model's. `int8`
      keeps a scale for each vector and changes the results slightly.
  """

  eos_id: int | Sequence[int] | None = None
  pad_id: int = 0
  start_id: int | None = None
  max_length: int | None = None
  capacity: int | None = None
  num_rows: int | None = None
  chunk: int = 64
  cache_dtype: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationCall:
  """The checked arguments of a call that generates.

  Attributes:
    model: a `Decoder` or an `EncoderDecoder`.
    rows: prompts, as arrays of token ids.
    num_tokens: the most new tokens of each prompt.
    num_rows: number of rows of the padded batch.
    ends: tokens that end a sequence.
    limit: the most tokens of a sequence; None if there is no limit.
    options: the other options of the call.
  """

  model: decode_loop.Model
  rows: list[np.ndarray]
  num_tokens: int
  num_rows: int
  ends: list[int]
  limit: int | None
  options: GenerationOptions

  @property
  def ends_BE(self) -> np.ndarray:
    """The end tokens of each row, padded to 4 or more to share programs."""
    width = max(4, prompts_lib.power_of_two(max(len(self.ends), 1)))
    shape = self.num_rows, width
    return prompts_lib.pad([self.ends] * self.num_rows, shape, processors.NONE)

  @property
  def histories(self) -> list[Any]:
    """The tokens that come before the new ones in each row's sequence.

    That is the prompt, or the first token of an answer, which does not contain
    its source.
    """
    if not isinstance(self.model, decoder.Decoder):
      return [[self.start_id]] * self.num_rows
    return [*self.rows, *[[]] * (self.num_rows - len(self.rows))]

  @property
  def start_id(self) -> int:
    """The first token of an answer."""
    options = self.options
    return options.pad_id if options.start_id is None else options.start_id

  def start(self, slack: int = 0) -> dict[str, Any]:
    """Computes the caches of the prompts.

    Args:
      slack: number of a step's tokens that may be taken back; see
        `Decoder.empty_caches`.

    Returns:
      Arguments of `decode_loop.decode`: caches, token_B, index_B, capacity, and
      with an encoder source_segments_BS.
    """
    if isinstance(self.model, decoder.Decoder):
      return _prefill(self, self.model, slack)
    return _encode(self, self.model)


def check(
  model: decode_loop.Model,
  prompts: Sequence[Sequence[int]],
  num_tokens: int,
  options: GenerationOptions,
) -> GenerationCall:
  """Checks the arguments of a call that generates, before any compilation.

  Args:
    model: a `Decoder` or an `EncoderDecoder`.
    prompts: token ids of each prompt: a sequence to continue, or a source.
    num_tokens: the most new tokens of each prompt.
    options: the other options of the call.

  Raises:
    ValueError: the model is an encoder, prompts are missing, empty or too long,
      ids are outside the vocabulary, or an option is out of range.
  """
  check_model(model)
  vocab_size = model.config.vocab_size
  ends = prompts_lib.ends(options.eos_id)
  ids: dict[str, Any] = {'pad_id': options.pad_id, 'start_id': options.start_id}
  ids |= {f'eos_id[{i}]' if i else 'eos_id': end for i, end in enumerate(ends)}
  counts = {
    'num_tokens': num_tokens,
    'chunk': options.chunk,
    'max_length': options.max_length,
  }
  prompts_lib.check_settings(counts, vocab_size=vocab_size, ids=ids)
  prompts_lib.check_cache_dtype(options.cache_dtype)
  least = getattr(model, 'least_chunk', 1)
  if options.chunk < least:
    raise ValueError(
      f'chunk={options.chunk}; {type(model).__name__} reads prompts {least} '
      'tokens or more at a time.'
    )
  rows = prompts_lib.to_rows(prompts, vocab_size, options.start_id)
  positions = model.config.max_length
  limit = prompts_lib.limit(positions, options.max_length)
  more = (
    'use a model with more positions'
    if limit == positions
    else 'raise max_length, where the model has learnt nothing yet'
  )
  continues = isinstance(model, decoder.Decoder)
  check = prompts_lib.check_text if continues else prompts_lib.check_answer
  check([len(row) for row in rows], num_tokens, limit, more)
  num_rows = prompts_lib.num_rows(options.num_rows, len(rows), row_parts())
  return GenerationCall(
    model=model,
    rows=rows,
    num_tokens=num_tokens,
    num_rows=num_rows,
    ends=ends,
    limit=limit,
    options=options,
  )


def check_model(model: object) -> None:
  """Raises ValueError if a model cannot generate token by token."""
  if not isinstance(model, decode_loop.Model):
    raise ValueError(
      f'{type(model).__name__} cannot generate: only a Decoder or an '
      'EncoderDecoder predicts the next token from those before it. Train '
      'with model.kind decoder or encoder_decoder.'
    )
  for kind in model.config.kinds:
    if kind.decoding is None:
      raise ValueError(attention_kinds.no_decoding(kind))


def _prefill(
  request: GenerationCall, model: decoder.Decoder, slack: int
) -> dict[str, Any]:
  """Returns the arguments of decoding after the prompts."""
  rows, num_rows, options = request.rows, request.num_rows, request.options
  lengths = [len(row) for row in rows]
  capacity = prompts_lib.capacity(
    options.capacity,
    max(lengths) + request.num_tokens,
    request.limit,
    options.chunk,
  )
  tokens_BS = prompts_lib.pad(rows, (num_rows, capacity), options.pad_id)
  last_B = np.zeros(num_rows, np.int32)
  last_B[: len(rows)] = np.array(lengths) - 1
  caches = decode_loop.prefill(
    model,
    tokens_BS,
    last_B,
    chunk=options.chunk,
    cache_dtype=options.cache_dtype,
    slack=slack,
  )
  return {
    'caches': caches,
    'token_B': tokens_BS[np.arange(num_rows), last_B],
    'index_B': last_B,
    'capacity': capacity,
  }


def _encode(
  request: GenerationCall, model: encoder_decoder.EncoderDecoder
) -> dict[str, Any]:
  """Returns the arguments of decoding from a start token, given the sources."""
  rows, num_rows, options = request.rows, request.num_rows, request.options
  lengths = [len(row) for row in rows]
  limit = request.limit
  new = request.num_tokens
  capacity = prompts_lib.capacity(options.capacity, new, limit, options.chunk)
  length = prompts_lib.capacity(None, max(lengths), limit, options.chunk)
  # The encoder has a limit of positions, which padding must not exceed either.
  most = model.config.max_length or length
  shape = (num_rows, min(length, most))
  source_BS = prompts_lib.pad(rows, shape, options.pad_id)
  segments_BS = prompts_lib.pad([[1] * n for n in lengths], shape, 0)
  caches = decode_loop.encode(
    model,
    source_BS,
    segments_BS,
    capacity=capacity,
    cache_dtype=options.cache_dtype,
  )
  return {
    'caches': caches,
    'token_B': np.full(num_rows, request.start_id, np.int32),
    'index_B': np.zeros(num_rows, np.int32),
    'capacity': capacity,
    'source_segments_BS': segments_BS,
  }


def row_parts() -> int:
  """Returns the least number of rows that the active rules can shard."""
  mesh = jax.sharding.get_abstract_mesh()
  for parts in range(1, mesh.size):
    rows = jax.ShapeDtypeStruct((parts,), jnp.int32)
    try:
      jax.eval_shape(lambda x: sharding.constrain(x, 'batch'), rows)
      return parts
    except sharding.ShardingError:
      continue
  return max(mesh.size, 1)
