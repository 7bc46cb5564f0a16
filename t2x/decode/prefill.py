"""From prompts to the caches that decoding goes on from; checked before that.

Shape suffixes: B batch (padded), S capacity or source, E ends.
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
from t2x.parallel import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What all ways of decoding take.

  Attributes:
    eos_id: the token that ends a row, or several of them; None always goes on
      to `num_tokens`.
    pad_id: fills rows up; no other token sees it.
    start_id: the first token of an answer, by default `pad_id` as in T5; with a
      decoder, what an empty prompt becomes, which is else an error.
    max_length: the most tokens of a sequence, new ones included: as in
      training, for a model whose positions have no limit of their own.
    capacity: positions in the cache; calls of one capacity and `num_rows` share
      their compiled programs. None rounds up what this call needs.
    num_rows: rows that the prompts are padded to. None takes a power of two,
      at least 4.
    chunk: how many tokens of the prompts run at a time.
    cache_dtype: of cached keys and values, by default the model's; `int8` keeps
      a scale for each vector and changes the numbers a little.
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
class Request:
  """Prompts that were checked.

  Attributes:
    model: what goes on with them.
    rows: the prompts, as arrays.
    num_tokens: the most new tokens.
    num_rows: of the padded batch.
    ends: the tokens that end a row.
    limit: the most tokens of a sequence.
    options: of the call.
  """

  model: decode_loop.Model
  rows: list[np.ndarray]
  num_tokens: int
  num_rows: int
  ends: list[int]
  limit: int | None
  options: Options

  @property
  def ends_BE(self) -> np.ndarray:
    """The ends of each row; at least four, so that programs are shared."""
    width = max(4, prompts_lib.power_of_two(max(len(self.ends), 1)))
    shape = self.num_rows, width
    return prompts_lib.pad([self.ends] * self.num_rows, shape, processors.NONE)

  @property
  def histories(self) -> list[Any]:
    """What each row's text begins with: its prompt, or the start of an answer.

    A source is no part of the text.
    """
    if not isinstance(self.model, decoder.Decoder):
      return [[self.start_id]] * self.num_rows
    return [*self.rows, *[[]] * (self.num_rows - len(self.rows))]

  @property
  def start_id(self) -> int:
    """The first token of an answer."""
    own = self.options
    return own.pad_id if own.start_id is None else own.start_id

  def start(self, slack: int = 0) -> dict[str, Any]:
    """Computes the caches of the prompts.

    Args:
      slack: tokens of a step that may turn out not to count.

    Returns:
      Arguments of `decode_loop.decode`: caches, token_B, index_B, capacity, and
      with an encoder source_segments_BS.
    """
    continues = isinstance(self.model, decoder.Decoder)
    return _text(self, slack) if continues else _answer(self)


def check(
  model: decode_loop.Model,
  prompts: Sequence[Sequence[int]],
  num_tokens: int,
  options: Options,
) -> Request:
  """Checks a request; nothing is compiled yet.

  Args:
    model: a `Decoder` or an `EncoderDecoder`.
    prompts: token ids of each row: a text to go on with, or a source.
    num_tokens: the most new tokens of a row.
    options: of the call.

  Raises:
    ValueError: an encoder, no or empty prompts, a prompt that is too long, ids
      outside the vocabulary, or a setting out of range.
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
  return Request(
    model=model,
    rows=rows,
    num_tokens=num_tokens,
    num_rows=num_rows,
    ends=ends,
    limit=limit,
    options=options,
  )


def check_model(model: Any) -> None:
  """Raises ValueError if a model cannot go on token by token."""
  if not isinstance(model, decode_loop.Model):
    raise ValueError(
      f'{type(model).__name__} cannot generate: only a Decoder or an '
      'EncoderDecoder predicts the next token from those before it. Train '
      'with model.kind decoder or encoder_decoder.'
    )
  for kind in model.config.kinds:
    if kind.decoding is None:
      raise ValueError(attention_kinds.no_decoding(kind))


def _text(request: Request, slack: int) -> dict[str, Any]:
  """Returns where decoding goes on from: after the prompts."""
  rows, num_rows, own = request.rows, request.num_rows, request.options
  lengths = [len(row) for row in rows]
  capacity = prompts_lib.capacity(
    own.capacity, max(lengths) + request.num_tokens, request.limit, own.chunk
  )
  tokens_BS = prompts_lib.pad(rows, (num_rows, capacity), own.pad_id)
  last_B = np.zeros(num_rows, np.int32)
  last_B[: len(rows)] = np.array(lengths) - 1
  caches = decode_loop.prefill(
    request.model,
    tokens_BS,
    last_B,
    chunk=own.chunk,
    cache_dtype=own.cache_dtype,
    slack=slack,
  )
  return {
    'caches': caches,
    'token_B': tokens_BS[np.arange(num_rows), last_B],
    'index_B': last_B,
    'capacity': capacity,
  }


def _answer(request: Request) -> dict[str, Any]:
  """Returns where decoding goes on from: a start token, with the sources."""
  rows, num_rows, own = request.rows, request.num_rows, request.options
  lengths = [len(row) for row in rows]
  limit = request.limit
  new = request.num_tokens
  capacity = prompts_lib.capacity(own.capacity, new, limit, own.chunk)
  length = prompts_lib.capacity(None, max(lengths), limit, own.chunk)
  # The encoder refuses more positions than it has, padding or not.
  most = request.model.config.max_length or length
  shape = (num_rows, min(length, most))
  source_BS = prompts_lib.pad(rows, shape, own.pad_id)
  segments_BS = prompts_lib.pad([[1] * n for n in lengths], shape, 0)
  caches = decode_loop.encode(
    request.model,
    source_BS,
    segments_BS,
    capacity=capacity,
    cache_dtype=own.cache_dtype,
  )
  return {
    'caches': caches,
    'token_B': np.full(num_rows, request.start_id, np.int32),
    'index_B': np.zeros(num_rows, np.int32),
    'capacity': capacity,
    'source_segments_BS': segments_BS,
  }


def row_parts() -> int:
  """Returns the fewest rows that the active rules can split."""
  mesh = jax.sharding.get_abstract_mesh()
  for parts in range(1, mesh.size):
    rows = jax.ShapeDtypeStruct((parts,), jnp.int32)
    try:
      jax.eval_shape(lambda x: sharding.constrain(x, 'batch'), rows)
      return parts
    except sharding.ShardingError:
      continue
  return max(mesh.size, 1)
