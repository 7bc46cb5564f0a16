"""What is done to logits before a token is drawn: small pure functions.

Each takes logits (B, V) and its settings, one a row, and gives logits back;
-inf is a token that cannot be drawn. `sampling` composes them. None sorts a
vocabulary: the least value that stays is found by halving.

Shape suffixes: B batch, V vocabulary, M words, W tokens of the longest word.
"""

import jax
import jax.numpy as jnp

NONE = -1  # No token has this id: it fills up words and ends.
MOST_SORTED = 256  # Up to here a partial sort finds the k largest sooner.


def biased(logits_BV: jax.Array, bias_BV: jax.Array) -> jax.Array:
  """Adds a bias; -inf bans a token."""
  return logits_BV + bias_BV


def repetition(
  logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array
) -> jax.Array:
  """Weakens tokens that were there before (Keskar et al., 2019, CTRL).

  Positive logits are divided by the penalty, negative ones multiplied.

  Args:
    logits_BV: of the next token.
    seen_BV: which tokens the prompt or the text so far holds.
    penalty_B: above 1 weakens them, below strengthens; 1 changes nothing.
  """
  penalty_B1 = penalty_B[:, None]
  weaker_BV = jnp.where(
    logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1
  )
  return jnp.where(seen_BV, weaker_BV, logits_BV)


def frequency(
  logits_BV: jax.Array,
  counts_BV: jax.Array,
  presence_B: jax.Array,
  frequency_B: jax.Array,
) -> jax.Array:
  """Subtracts presence + frequency * count from tokens that were written.

  As OpenAI's API defines both penalties: the prompt does not count.
  """
  counts_BV = counts_BV.astype(logits_BV.dtype)
  once_BV = (counts_BV > 0).astype(logits_BV.dtype)
  return logits_BV - (
    presence_B[:, None] * once_BV + frequency_B[:, None] * counts_BV
  )


def without_words(
  logits_BV: jax.Array, recent_BW: jax.Array, words_BMW: jax.Array
) -> jax.Array:
  """Bans the token that would complete a word.

  Args:
    logits_BV: of the next token.
    recent_BW: the latest tokens of each row, the last one last; one fewer than
      the longest word has.
    words_BMW: banned words, each flush right after fillers `NONE`.
  """
  begun_BMW = (words_BMW[..., :-1] == recent_BW[:, None]) | (
    words_BMW[..., :-1] == NONE
  )
  return _without(logits_BV, words_BMW[..., -1], begun_BMW.all(-1))


def without_bits(logits_BV: jax.Array, bits_BW: jax.Array) -> jax.Array:
  """Bans the tokens whose bits are set.

  Args:
    logits_BV: of the next token.
    bits_BW: uint32 words with a bit for each token, the lowest first.
  """
  B, V = logits_BV.shape
  place = jnp.arange(32, dtype=jnp.uint32)[None, None]
  is_set_BV = ((bits_BW[..., None] >> place) & 1).reshape(B, -1)[:, :V]
  return jnp.where(is_set_BV > 0, -jnp.inf, logits_BV)


def min_length(
  logits_BV: jax.Array, is_short_B: jax.Array, ends_BE: jax.Array
) -> jax.Array:
  """Bans the tokens that end a row while it is short.

  Args:
    logits_BV: of the next token.
    is_short_B: rows that may not end yet.
    ends_BE: tokens that end each row, `NONE` for fewer.
  """
  return _without(logits_BV, ends_BE, is_short_B[:, None])


def only(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
  """Leaves one token of a row, with the logit 0; `NONE` leaves all."""
  is_it_BV = jnp.arange(logits_BV.shape[-1])[None] == token_B[:, None]
  given_BV = jnp.where(is_it_BV, 0.0, -jnp.inf).astype(logits_BV.dtype)
  return jnp.where(token_B[:, None] == NONE, logits_BV, given_BV)


def temperature(logits_BV: jax.Array, value_B: jax.Array) -> jax.Array:
  """Divides by a temperature; the largest logit becomes 0.

  At 0 the largest ones alone stay.
  """
  # Shifted first, so that a tiny temperature overflows to -inf, not to NaN.
  shifted_BV = logits_BV - logits_BV.max(-1, keepdims=True)
  value_B1 = value_B[:, None]
  divided_BV = shifted_BV / jnp.where(value_B1 > 0, value_B1, 1.0)
  coldest_BV = jnp.where(shifted_BV == 0, 0.0, -jnp.inf)
  return jnp.where(value_B1 > 0, divided_BV, coldest_BV)


def top_k(
  logits_BV: jax.Array, k_B: jax.Array, most: int | None = None
) -> jax.Array:
  """Keeps the k largest logits (Fan et al., 2018).

  Tokens that equal the k-th stay too: nothing tells them apart.

  Args:
    logits_BV: of the next token.
    k_B: how many, for each row.
    most: no k is above it; None if that is not known.
  """
  V = logits_BV.shape[-1]
  if most is not None and most <= MOST_SORTED:
    largest_BK, _ = jax.lax.top_k(logits_BV, min(most, V))
    place_B = jnp.minimum(k_B, min(most, V)) - 1
    least_B1 = jnp.take_along_axis(largest_BK, place_B[:, None], axis=1)
    return _where(logits_BV, logits_BV >= least_B1)
  ones_BV = jnp.ones_like(logits_BV)
  least_B = _least(logits_BV, ones_BV, k_B.astype(jnp.float32))
  return _where(logits_BV, logits_BV >= least_B[:, None])


def largest_few(logits_BV: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
  """Returns the `num` largest logits and their tokens, by token, (B, num)."""
  found = jax.lax.top_k(logits_BV, min(num, logits_BV.shape[-1]))
  token_BC, few_BC = jax.lax.sort(found[::-1], dimension=-1, num_keys=1)
  return few_BC, token_BC


def top_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
  """Keeps the most likely tokens up to a mass of p (Holtzman et al., 2020).

  A token stays if those before it, most likely first, sum to less than p: the
  one that crosses p stays, and there is always one. Tokens that equal the last
  one stay too. 1 keeps all.
  """
  weights_BV, total_B = _weights(logits_BV)
  least_B = _least(weights_BV, weights_BV, p_B * total_B)
  # Rounding must not cut the tail where p = 1 asks for everything.
  least_B = jnp.where(p_B >= 1, -1.0, least_B)
  is_kept_BV = weights_BV >= least_B[:, None]
  return _where(logits_BV, is_kept_BV)


def min_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
  """Keeps tokens of at least p times the largest probability.

  Nguyen et al., 2024 (Turning Up the Heat).
  """
  least_B1 = logits_BV.max(-1, keepdims=True) + jnp.log(p_B)[:, None]
  return _where(logits_BV, logits_BV >= least_B1)


def typical(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
  """Keeps tokens whose surprise is nearest to the entropy, up to a mass of p.

  Meister et al., 2023 (Locally Typical Sampling). 1 keeps all.
  """
  weights_BV, total_B = _weights(logits_BV)
  log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
  probs_BV = weights_BV / total_B[:, None]
  finite_BV = jnp.isfinite(log_probs_BV)
  surprise_BV = jnp.where(finite_BV, -log_probs_BV, 0.0)
  entropy_B1 = (probs_BV * surprise_BV).sum(-1, keepdims=True)
  distance_BV = jnp.where(finite_BV, jnp.abs(surprise_BV - entropy_B1), jnp.inf)
  least_B = _least(-distance_BV, weights_BV, p_B * total_B)
  least_B = jnp.where(p_B >= 1, -jnp.inf, least_B)
  return _where(logits_BV, -distance_BV >= least_B[:, None])


def draw(logits_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """Draws one token a row by a number in [0, 1): where its mass is reached.

  One number a row instead of one a token: for a vocabulary of 50k that is
  fifteen times faster than perturbing every logit. Sums run over pieces of the
  vocabulary and then over one of them, so that they stay precise.

  Returns:
    int32 (B,); never a token of -inf.
  """
  weights_BV, _ = _weights(logits_BV)
  B, V = weights_BV.shape
  size = 256
  num = -(-V // size)
  padded_BV = jnp.pad(weights_BV, ((0, 0), (0, num * size - V)))
  pieces_BPS = padded_BV.reshape(B, num, size)
  ends_BP = jnp.cumsum(pieces_BPS.sum(-1), axis=-1)
  wanted_B = uniform_B * ends_BP[:, -1]
  piece_B = (ends_BP <= wanted_B[:, None]).sum(-1)
  starts_BP = jnp.pad(ends_BP, ((0, 0), (1, 0)))
  at = lambda a, i: jnp.take_along_axis(a, i[:, None], axis=1)[:, 0]
  own_BS = jnp.take_along_axis(pieces_BPS, piece_B[:, None, None], axis=1)[:, 0]
  mass_BS = jnp.cumsum(own_BS, axis=-1)
  # Rounding may ask for more than the piece has: then its last token.
  most_B = mass_BS[:, -1] * (1 - 2.0**-23)
  inside_B = jnp.minimum(wanted_B - at(starts_BP, piece_B), most_B)
  place_B = (mass_BS <= inside_B[:, None]).sum(-1)
  return (piece_B * size + place_B).astype(jnp.int32)


def largest(logits_BV: jax.Array) -> jax.Array:
  """Returns the most likely token of each row, the first of equal ones."""
  # CPUs find a maximum and then its place in a quarter of argmax's time.
  V = logits_BV.shape[-1]
  is_largest_BV = logits_BV == logits_BV.max(-1, keepdims=True)
  place_BV = jnp.where(is_largest_BV, jnp.arange(V, dtype=jnp.int32)[None], V)
  return jnp.minimum(place_BV.min(-1), V - 1)


def _without(logits_BV, tokens_BM, is_banned_BM):
  """Bans some of the tokens of each row; `NONE` is no token."""
  V = logits_BV.shape[-1]
  place_BM = jnp.where(is_banned_BM & (tokens_BM != NONE), tokens_BM, V)
  ban = jax.vmap(lambda row, place: row.at[place].set(-jnp.inf, mode='drop'))
  return ban(logits_BV, place_BM)


def _where(logits_BV, is_kept_BV):
  return jnp.where(is_kept_BV, logits_BV, -jnp.inf)


def _weights(logits_BV):
  """Returns exp(logits), 1 for the largest, and their sums (B,)."""
  weights_BV = jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True))
  return weights_BV, weights_BV.sum(-1)


def _least(x_BV, weights_BV, limit_B) -> jax.Array:
  """Returns the least float of each row above which weights sum below a limit.

  The interval between the smallest and the largest x of a row is halved, by the
  order of floats as integers: 32 times, each one sum over the vocabulary.
  """

  def halve(_, bounds):
    low_B, high_B = bounds
    # The mean without overflow.
    middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)
    above_BV = jnp.where(x_BV > _float(middle_B)[:, None], weights_BV, 0.0)
    is_enough_B = above_BV.sum(-1) < limit_B
    return (
      jnp.where(is_enough_B, low_B, middle_B + 1),
      jnp.where(is_enough_B, middle_B, high_B),
    )

  bounds = _integer(x_BV.min(-1)), _integer(x_BV.max(-1))
  return _float(jax.lax.fori_loop(0, 32, halve, bounds)[0])


def _integer(x: jax.Array) -> jax.Array:
  """Returns int32s in the order of float32s."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  # Those of negative numbers grow as the numbers fall; -0.0 equals 0.0.
  return jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)


def _float(order: jax.Array) -> jax.Array:
  """The inverse of `_integer`."""
  bits = jnp.where(order < 0, jnp.int32(-(2**31)) - order, order)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
