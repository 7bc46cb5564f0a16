"""Text from a model, one prompt a row.

Rows are padded on the right and each writes at its own index, so a row stands
at the same positions alone and in any batch. The arrays' shapes depend only on
the number of rows and on the capacity of the cache, both rounded up, so that
the programs of loop.py compile once for many calls.

Shape suffixes: B batch (padded), S capacity or source.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from t2x import sharding
from t2x.decode import loop
from t2x.decode import processors
from t2x.decode import prompts as prompts_lib
from t2x.decode import sampling as sampling_lib
from t2x.layers import dropout
from t2x.layers import kinds
from t2x.models import decoder

Sampling = sampling_lib.SamplingConfig
_NONE = processors.NONE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """What `generate` returns, one entry for each prompt.

  Attributes:
    tokens: the new tokens, without the prompt, the end token and padding.
    log_probs: the log-probability of each of them under the model itself, that
      is before temperature, top-k and top-p.
    ended: whether the row met its end token before `num_tokens`.
  """

  tokens: list[list[int]]
  log_probs: list[list[float]]
  ended: list[bool]


def generate(
  model: loop.Model,
  prompts: Sequence[Sequence[int]],
  *,
  num_tokens: int,
  sampling: Sampling | Sequence[Sampling] | None = None,
  seed: int = 0,
  keys_B: jax.Array | None = None,
  eos_id: int | Sequence[int] | None = None,
  pad_id: int = 0,
  start_id: int | None = None,
  max_length: int | None = None,
  capacity: int | None = None,
  num_rows: int | None = None,
  chunk: int = 64,
  cache_dtype: str | None = None,
) -> Generation:
  """Goes on with the prompts or, with an encoder-decoder, answers them.

  Inside `sharding.use(mesh, rules)` rows and cache are split as the rules say;
  outside, this runs where the model is.

  >>> from flax import nnx
  >>> config = decoder.DecoderConfig(vocab_size=9, num_layers=2)
  >>> model = decoder.Decoder(config, rngs=nnx.Rngs(0))
  >>> [len(row) for row in generate(model, [[1, 2], [3]], num_tokens=5).tokens]
  [5, 5]

  Args:
    model: a `Decoder` or an `EncoderDecoder`.
    prompts: token ids of each row: a text to go on with, or a source.
    num_tokens: the most new tokens of a row.
    sampling: how tokens are drawn, for all rows or for each; None means from
      the model's distribution. Other values share a compiled program as long
      as they ask for the same processors.
    seed: what row i draws depends on `seed`, on i and on its prompt alone.
    keys_B: a key for each prompt, instead of `seed`.
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

  Returns:
    The new tokens and their log-probabilities.

  Raises:
    ValueError: an encoder, no or empty prompts, a prompt that is too long, ids
      outside the vocabulary, a setting out of range; before any compilation.
  """
  _check_model(model)
  vocab_size = model.config.vocab_size
  ends = prompts_lib.ends(eos_id)
  ids = {'pad_id': pad_id, 'start_id': start_id}
  ids |= {f'eos_id[{i}]' if i else 'eos_id': end for i, end in enumerate(ends)}
  prompts_lib.check_settings(
    {'num_tokens': num_tokens, 'chunk': chunk, 'max_length': max_length},
    vocab_size=vocab_size,
    ids=ids,
  )
  rows = prompts_lib.to_rows(prompts, vocab_size, start_id)
  positions = model.config.max_length
  limits = [n for n in (positions, max_length) if n is not None]
  limit = min(limits, default=None)
  more = (
    'use a model with more positions'
    if limit == positions
    else 'raise max_length, where the model has learnt nothing yet'
  )
  continues = isinstance(model, decoder.Decoder)
  check = prompts_lib.check_text if continues else prompts_lib.check_answer
  check([len(row) for row in rows], num_tokens, limit, more)
  num_rows = prompts_lib.num_rows(num_rows, len(rows), _row_parts())
  keys_B = _row_keys(keys_B, seed, len(rows), num_rows)
  settings = _settings(sampling, len(rows), num_rows, vocab_size)
  start = pad_id if start_id is None else start_id
  width = max(4, prompts_lib.power_of_two(max(len(ends), 1)))
  plan = _Plan(
    num_tokens=num_tokens,
    num_rows=num_rows,
    capacity=capacity,
    limit=limit,
    chunk=chunk,
    cache_dtype=prompts_lib.cache_dtype(cache_dtype),
    pad_id=pad_id,
    start_id=start,
  )
  begin = _begin_text if continues else _begin_answer
  state = loop.decode(
    model,
    **begin(model, rows, plan),
    keys_B=keys_B,
    ended_B=np.arange(num_rows) >= len(rows),
    num_tokens=np.int32(num_tokens),
    pad_id=np.int32(pad_id),
    ends_BE=prompts_lib.pad([ends] * num_rows, (num_rows, width), _NONE),
    settings=settings,
    history=sampling_lib.begin(
      settings, [*rows, *[[]] * (num_rows - len(rows))], vocab_size
    ),
  )
  return _to_lists(state, len(rows))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
  """Arguments of `generate`, and what was found from them."""

  num_tokens: int
  num_rows: int
  capacity: int | None
  limit: int | None
  chunk: int
  cache_dtype: str | None
  pad_id: int
  start_id: int


def _begin_text(model, rows, plan: _Plan) -> dict[str, Any]:
  """Returns where `decode` goes on from: after the prompts."""
  lengths = [len(row) for row in rows]
  capacity = prompts_lib.capacity(
    plan.capacity, max(lengths) + plan.num_tokens, plan.limit, plan.chunk
  )
  tokens_BS = prompts_lib.pad(rows, (plan.num_rows, capacity), plan.pad_id)
  last_B = np.zeros(plan.num_rows, np.int32)
  last_B[: len(rows)] = np.array(lengths) - 1
  return {
    'caches': loop.prefill(
      model,
      tokens_BS,
      last_B,
      chunk=plan.chunk,
      cache_dtype=plan.cache_dtype,
    ),
    'token_B': tokens_BS[np.arange(plan.num_rows), last_B],
    'index_B': last_B,
    'capacity': capacity,
  }


def _begin_answer(model, rows, plan: _Plan) -> dict[str, Any]:
  """Returns where `decode` goes on from: a start token, with the sources."""
  lengths = [len(row) for row in rows]
  capacity = prompts_lib.capacity(
    plan.capacity, plan.num_tokens, plan.limit, plan.chunk
  )
  length = prompts_lib.capacity(None, max(lengths), plan.limit, plan.chunk)
  # The encoder refuses more positions than it has, padding or not.
  shape = (plan.num_rows, min(length, model.config.max_length or length))
  source_BS = prompts_lib.pad(rows, shape, plan.pad_id)
  segments_BS = prompts_lib.pad([[1] * n for n in lengths], shape, 0)
  return {
    'caches': loop.encode(
      model,
      source_BS,
      segments_BS,
      capacity=capacity,
      cache_dtype=plan.cache_dtype,
    ),
    'token_B': np.full(plan.num_rows, plan.start_id, np.int32),
    'index_B': np.zeros(plan.num_rows, np.int32),
    'capacity': capacity,
    'source_segments_BS': segments_BS,
  }


def _to_lists(state: loop.State, num_prompts: int) -> Generation:
  counts = np.asarray(state.count_B)[:num_prompts]
  tokens_BN = np.asarray(state.tokens_BN)
  log_probs_BN = np.asarray(state.log_probs_BN)
  cut = lambda rows: [row[:n].tolist() for row, n in zip(rows, counts)]
  return Generation(
    tokens=cut(tokens_BN),
    log_probs=cut(log_probs_BN),
    ended=np.asarray(state.ended_B)[:num_prompts].tolist(),
  )


def _settings(sampling, num_prompts, num_rows, vocab_size):
  """Returns the settings of each row as arrays."""
  if sampling is None or isinstance(sampling, Sampling):
    sampling = [sampling or Sampling()] * num_prompts
  if len(sampling) != num_prompts:
    raise ValueError(
      f'sampling has {len(sampling)} settings and there are {num_prompts} '
      'prompts; give one for all, or one for each.'
    )
  return sampling_lib.rows(sampling, num_rows, vocab_size)


def _check_model(model: Any) -> None:
  if not isinstance(model, loop.Model):
    raise ValueError(
      f'{type(model).__name__} cannot generate: only a Decoder or an '
      'EncoderDecoder predicts the next token from those before it. Train '
      'with model.kind decoder or encoder_decoder.'
    )
  for kind in model.config.kinds:
    if kind.decoding is None:
      raise ValueError(kinds.no_decoding(kind))


def _row_keys(keys_B, seed: int, num_prompts: int, num_rows: int) -> jax.Array:
  if keys_B is None:
    return dropout.row_keys(jax.random.key(seed), jnp.arange(num_rows))
  if keys_B.shape != (num_prompts,):
    raise ValueError(
      f'keys_B has the shape {keys_B.shape} and there are {num_prompts} '
      'prompts; give one key for each, jax.random.split(key, num_prompts).'
    )
  return keys_B[np.minimum(np.arange(num_rows), num_prompts - 1)]


def _row_parts() -> int:
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
