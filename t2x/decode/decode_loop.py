"""The compiled programs of generation: prefill, and the loop of decode steps.

Two programs serve a model, whatever the lengths of the prompts and the number
of new tokens: `prefill` computes the caches of the prompts in chunks of a fixed
length (with an encoder-decoder, `encode` runs the encoder instead), and
`decode` is the whole loop over new tokens.

Shape suffixes: B batch, S cache capacity or source, C chunk, N new token, V
vocabulary, D embed, E ends.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from t2x.attention import mask as mask_lib
from t2x.decode import sampling as sampling_lib
from t2x.layers import block
from t2x.models import decoder
from t2x.models import encoder_decoder
from t2x.parallel import sharding

Model = decoder.Decoder | encoder_decoder.EncoderDecoder
# Caches of the layers that repeat, stacked, and those of the remaining layers.
Caches = tuple[tuple[block.BlockCache, ...], tuple[block.BlockCache, ...]]


@functools.partial(jax.jit, static_argnames=('chunk', 'cache_dtype', 'slack'))
def prefill(
  model: decoder.Decoder,
  tokens_BS: jax.Array,
  last_B: jax.Array,
  *,
  chunk: int,
  cache_dtype: str | None = None,
  slack: int = 0,
) -> Caches:
  """Computes the caches of all prompt tokens but the last of each row.

  The last token is the first that `decode` feeds to the model.

  Args:
    model: the decoder.
    tokens_BS: prompts, padded on the right; S, a multiple of `chunk`, is also
      the capacity of the caches.
    last_B: index of each prompt's last token.
    chunk: number of tokens that run at a time.
    cache_dtype: dtype of cached keys and values; None is the model's.
    slack: number of a step's tokens that may be taken back; see
      `Decoder.empty_caches`.
  """
  num_rows, capacity = tokens_BS.shape

  def run_chunk(number: jax.Array, caches: Caches) -> Caches:
    tokens_BC, index_BC = chunk_of(tokens_BS, last_B, number, chunk)
    return model.step(tokens_BC, index_BC, caches)[1]

  num_chunks = (last_B.max() + chunk - 1) // chunk
  caches = model.empty_caches(num_rows, capacity, cache_dtype, slack)
  return jax.lax.fori_loop(0, num_chunks, run_chunk, caches)


def chunk_of(
  tokens_BS: jax.Array, last_B: jax.Array, number: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
  """Returns a chunk of the prompts and its positions, (B, C) both.

  Args:
    tokens_BS: prompts, padded on the right.
    last_B: index of each prompt's last token.
    number: index of the chunk.
    chunk: number of tokens in a chunk.
  """
  start, capacity = number * chunk, tokens_BS.shape[1]
  tokens_BC = jax.lax.dynamic_slice_in_dim(tokens_BS, start, chunk, axis=1)
  index_1C = (start + jnp.arange(chunk))[None]
  # A cache drops writes at its capacity, so padding changes nothing.
  return tokens_BC, jnp.where(index_1C < last_B[:, None], index_1C, capacity)


@functools.partial(jax.jit, static_argnames=('capacity', 'cache_dtype'))
def encode(
  model: encoder_decoder.EncoderDecoder,
  source_BS: jax.Array,
  segments_BS: jax.Array,
  *,
  capacity: int,
  cache_dtype: str | None = None,
) -> Caches:
  """Encodes sources; returns empty caches of the targets that attend to them.

  Args:
    model: the encoder-decoder.
    source_BS: source tokens, padded on the right.
    segments_BS: 1 for source tokens, 0 for padding.
    capacity: number of positions for the target.
    cache_dtype: dtype of cached keys and values, those of the source included;
      None is the model's.
  """
  encoded_BSD = model.encode(source_BS, segments=segments_BS)
  rows = source_BS.shape[0]
  return model.empty_caches(rows, capacity, encoded_BSD, cache_dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
  """State of the loop over new tokens.

  Attributes:
    number: number of decode steps so far.
    token_B: latest token of each row, which is not in the caches yet.
    index_B: position of the latest token in its row.
    ended_B: whether each row is done.
    count_B: number of new tokens of each row, without the end token.
    tokens_BN: new tokens.
    log_probs_BN: log-probabilities of the new tokens under the model itself.
    caches: keys and values of the tokens before the latest.
    history: summary of each row's tokens that the logit processors need.
  """

  number: jax.Array
  token_B: jax.Array
  index_B: jax.Array
  ended_B: jax.Array
  count_B: jax.Array
  tokens_BN: jax.Array
  log_probs_BN: jax.Array
  caches: Caches
  history: sampling_lib.History


# `num_tokens` and the ids are traced: other values use the same program. The
# caches are donated, and returned, so that the loop updates them in place.
@functools.partial(
  jax.jit, static_argnames='capacity', donate_argnames='caches'
)
def decode(
  model: Model,
  caches: Caches,
  *,
  token_B: jax.Array,
  index_B: jax.Array,
  ended_B: jax.Array,
  keys_B: jax.Array,
  num_tokens: jax.Array,
  ends_BE: jax.Array,
  pad_id: jax.Array,
  capacity: int,
  settings: sampling_lib.Rows,
  history: sampling_lib.History,
  source_segments_BS: jax.Array | None = None,
) -> DecodeState:
  """Draws up to `num_tokens` tokens for each row, until every row has ended.

  A row also ends if every token is banned from its next place.

  Args:
    model: a `Decoder` or an `EncoderDecoder`.
    caches: keys and values of the tokens before `token_B`.
    token_B: token of each row that decoding continues from.
    index_B: position of `token_B` in its row.
    ended_B: whether each row is padding of the batch.
    keys_B: random key of each row.
    num_tokens: the most new tokens, at most `capacity`.
    ends_BE: tokens that end each row; -1 is padding.
    pad_id: token that fills a row after its end.
    capacity: number of positions in the caches.
    settings: sampling settings of each row.
    history: sampling history of each row's prompt.
    source_segments_BS: the source positions that an encoder-decoder attends to,
      1 for a token and 0 for padding; None with a decoder.

  Returns:
    The last state; its tokens, log-probabilities and counts are replicated on
    every device.
  """
  empty = functools.partial(jnp.zeros, (token_B.shape[0], capacity))
  state = DecodeState(
    number=jnp.int32(0),
    token_B=token_B,
    index_B=index_B,
    ended_B=ended_B,
    count_B=jnp.zeros_like(index_B),
    tokens_BN=empty(jnp.int32),
    log_probs_BN=empty(jnp.float32),
    caches=caches,
    history=history,
  )

  def goes_on(state: DecodeState) -> jax.Array:
    return (state.number < num_tokens) & ~state.ended_B.all()

  def extend(state: DecodeState) -> DecodeState:
    logits_BV, caches = next_logits(
      model, state.token_B, state.index_B, state.caches, source_segments_BS
    )
    logits_BV = sampling_lib.calibrated(logits_BV, settings)
    fold_in = jax.vmap(jax.random.fold_in, in_axes=(0, None))
    keys = fold_in(keys_B, state.number)
    number_B = jnp.broadcast_to(state.number, keys.shape)
    left_BV = sampling_lib.process_logits(
      logits_BV, settings, state.history, number_B, ends_BE
    )
    token_B = sampling_lib.draw_tokens(left_BV, keys, settings)
    is_stuck_B = sampling_lib.is_stuck(left_BV, settings)
    if is_stuck_B is not None:
      ended_B = state.ended_B | is_stuck_B
      state = dataclasses.replace(state, ended_B=ended_B)
    token_B = jnp.where(state.ended_B, pad_id, token_B)
    history = state.history.add(token_B, settings)
    state = dataclasses.replace(state, history=history)
    return _append(state, token_B, logits_BV, caches, ends_BE)

  state = jax.lax.while_loop(goes_on, extend, state)
  return dataclasses.replace(
    state,
    tokens_BN=replicated(state.tokens_BN),
    log_probs_BN=replicated(state.log_probs_BN),
    count_B=replicated(state.count_B),
    ended_B=replicated(state.ended_B),
  )


def replicated(array: jax.Array) -> jax.Array:
  """Replicates an array on every device, so that each host can read it."""
  return sharding.constrain(array, *[None] * array.ndim)


def next_logits(
  model: Model,
  token_B: jax.Array,
  index_B: jax.Array,
  caches: Caches,
  source_segments_BS: jax.Array | None,
) -> tuple[jax.Array, Caches]:
  """Runs one decode step of the model.

  Args:
    model: a `Decoder` or an `EncoderDecoder`.
    token_B: latest token of each row.
    index_B: position of `token_B` in its row.
    caches: keys and values of the tokens before `token_B`.
    source_segments_BS: source positions that are attended to; see `decode`.

  Returns:
    Logits (B, V) of the next token, and the new caches.
  """
  inputs_B1, index_B1 = token_B[:, None], index_B[:, None]
  if isinstance(model, decoder.Decoder):
    x_B1D, caches = model.step(inputs_B1, index_B1, caches)
  else:
    assert source_segments_BS is not None
    mask = mask_lib.Mask(
      q_segments_BT=jnp.ones_like(inputs_B1), k_segments_BS=source_segments_BS
    )
    x_B1D, caches = model.step(inputs_B1, index_B1, caches, mask)
  return model.head(x_B1D)[:, 0], caches


def _append(
  state: DecodeState,
  token_B: jax.Array,
  logits_BV: jax.Array,
  caches: Caches,
  ends_BE: jax.Array,
) -> DecodeState:
  logit_B1 = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)
  log_prob_B1 = logit_B1 - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
  ended_B = state.ended_B | (token_B[:, None] == ends_BE).any(-1)
  put = lambda array_BN, new_B1: jax.lax.dynamic_update_slice_in_dim(
    array_BN, new_B1, state.number, axis=1
  )
  return DecodeState(
    number=state.number + 1,
    token_B=token_B,
    index_B=state.index_B + 1,
    ended_B=ended_B,
    count_B=state.count_B + ~ended_B,
    tokens_BN=put(state.tokens_BN, token_B[:, None]),
    log_probs_BN=put(state.log_probs_BN, log_prob_B1),
    caches=caches,
    history=state.history,
  )
