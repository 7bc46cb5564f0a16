"""Logit processors: small pure functions that change logits before a draw.

Each takes logits (B, V) and settings with one entry a row, and returns logits;
-inf marks a token that cannot be drawn. `sampling` composes them. None sorts
the vocabulary: thresholds are found by bisection.

Shape suffixes: B batch, V vocabulary, M words, W tokens of the longest word.
"""

import jax
import jax.numpy as jnp

NONE = -1  # No token has this id; it pads words and ends.
MOST_SORTED = 256  # Up to this k, a partial sort is faster than bisection.


def biased(logits_BV: jax.Array, bias_BV: jax.Array) -> jax.Array:
  """Adds a bias; -inf bans a token."""
  return logits_BV + bias_BV


def repetition(
  logits_BV: jax.Array, seen_BV: jax.Array, penalty_B: jax.Array
) -> jax.Array:
  """Penalizes tokens that have occurred before (Keskar et al., 2019, CTRL).

  Positive logits are divided by the penalty, negative ones multiplied.

  Args:
    logits_BV: logits of the next token.
    seen_BV: whether each token occurs in the prompt or the new tokens.
    penalty_B: penalty of each row; above 1 makes repetition less likely, below
      1 more likely, and 1 changes nothing.
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
  """Subtracts presence + frequency * count from tokens that were generated.

  Both penalties are those of OpenAI's API: the prompt does not count.

  Args:
    logits_BV: logits of the next token.
    counts_BV: number of times that each token was generated.
    presence_B: presence penalty of each row.
    frequency_B: frequency penalty of each row.
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
    logits_BV: logits of the next token.
    recent_BW: latest tokens of each row in order, one fewer than the longest
      word has.
    words_BMW: banned words, padded on the left with `NONE`.
  """
  begun_BMW = (words_BMW[..., :-1] == recent_BW[:, None]) | (
    words_BMW[..., :-1] == NONE
  )
  return _without(logits_BV, words_BMW[..., -1], begun_BMW.all(-1))


def without_bits(logits_BV: jax.Array, bits_BW: jax.Array) -> jax.Array:
  """Bans the tokens whose bits are set.

  Args:
    logits_BV: logits of the next token.
    bits_BW: bits of uint32 words, one a token, lowest bit first.
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
    logits_BV: logits of the next token.
    is_short_B: whether each row may not end yet.
    ends_BE: tokens that end each row, padded with `NONE`.
  """
  return _without(logits_BV, ends_BE, is_short_B[:, None])


def force_token(logits_BV: jax.Array, token_B: jax.Array) -> jax.Array:
  """Bans all tokens of a row except one; `NONE` changes nothing."""
  is_it_BV = jnp.arange(logits_BV.shape[-1])[None] == token_B[:, None]
  given_BV = jnp.where(is_it_BV, 0.0, -jnp.inf).astype(logits_BV.dtype)
  return jnp.where(token_B[:, None] == NONE, logits_BV, given_BV)


def temperature(logits_BV: jax.Array, value_B: jax.Array) -> jax.Array:
  """Divides by the temperature, after a shift of the largest logit to 0.

  At temperature 0, only the largest logits remain.
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

  Logits that equal the k-th largest are kept too.

  Args:
    logits_BV: logits of the next token.
    k_B: number of logits to keep in each row.
    most: upper bound of all k; None if there is no known bound.
  """
  V = logits_BV.shape[-1]
  if most is not None and most <= MOST_SORTED:
    largest_BK, _ = jax.lax.top_k(logits_BV, min(most, V))
    place_B = jnp.minimum(k_B, min(most, V)) - 1
    least_B1 = jnp.take_along_axis(largest_BK, place_B[:, None], axis=1)
    return _where(logits_BV, logits_BV >= least_B1)
  ones_BV = jnp.ones_like(logits_BV)
  least_B = _threshold(logits_BV, ones_BV, k_B.astype(jnp.float32))
  return _where(logits_BV, logits_BV >= least_B[:, None])


def top_few(logits_BV: jax.Array, num: int) -> tuple[jax.Array, jax.Array]:
  """Returns the `num` largest logits and their ids, ordered by id, (B, num)."""
  largest = jax.lax.top_k(logits_BV, min(num, logits_BV.shape[-1]))
  token_BC, logits_BC = jax.lax.sort(largest[::-1], dimension=-1, num_keys=1)
  return logits_BC, token_BC


def top_p(logits_BV: jax.Array, p_B: jax.Array) -> jax.Array:
  """Keeps the most likely tokens up to a mass of p (Holtzman et al., 2020).

  A token is kept if the more likely ones sum to less than p, so the one that
  crosses p is kept, and there is always one. Tokens as likely as the last one
  are kept too. p = 1 keeps all.
  """
  weights_BV, total_B = _weights(logits_BV)
  least_B = _threshold(weights_BV, weights_BV, p_B * total_B)
  # At p = 1, rounding must not cut the tail.
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

  Meister et al., 2023 (Locally Typical Sampling). p = 1 keeps all.
  """
  weights_BV, total_B = _weights(logits_BV)
  log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
  probs_BV = weights_BV / total_B[:, None]
  finite_BV = jnp.isfinite(log_probs_BV)
  surprise_BV = jnp.where(finite_BV, -log_probs_BV, 0.0)
  entropy_B1 = (probs_BV * surprise_BV).sum(-1, keepdims=True)
  distance_BV = jnp.where(finite_BV, jnp.abs(surprise_BV - entropy_B1), jnp.inf)
  least_B = _threshold(-distance_BV, weights_BV, p_B * total_B)
  least_B = jnp.where(p_B >= 1, -jnp.inf, least_B)
  return _where(logits_BV, -distance_BV >= least_B[:, None])


def draw(logits_BV: jax.Array, uniform_B: jax.Array) -> jax.Array:
  """Draws one token a row, by inversion of the cumulative distribution.

  It uses one random number a row instead of one a token: for a vocabulary of
  50k that is fifteen times faster than perturbing every logit. The cumulative
  sum runs over pieces of the vocabulary and then within one piece, so that it
  stays precise.

  Args:
    logits_BV: logits of the next token, at least one of a row above -inf.
    uniform_B: random number of each row, uniform in [0, 1).

  Returns:
    Token ids (B,), int32; never a token whose logit is -inf.
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
  piece_BS = jnp.take_along_axis(pieces_BPS, piece_B[:, None, None], axis=1)[
    :, 0
  ]
  mass_BS = jnp.cumsum(piece_BS, axis=-1)
  # Rounding may exceed the sum of the piece; then its last token is taken.
  most_B = mass_BS[:, -1] * (1 - 2.0**-23)
  inside_B = jnp.minimum(wanted_B - at(starts_BP, piece_B), most_B)
  place_B = (mass_BS <= inside_B[:, None]).sum(-1)
  return (piece_B * size + place_B).astype(jnp.int32)


def argmax(logits_BV: jax.Array) -> jax.Array:
  """Returns the most likely token of each row; of equal ones the first."""
  # On CPUs this takes a quarter of the time of argmax.
  V = logits_BV.shape[-1]
  is_largest_BV = logits_BV == logits_BV.max(-1, keepdims=True)
  place_BV = jnp.where(is_largest_BV, jnp.arange(V, dtype=jnp.int32)[None], V)
  return jnp.minimum(place_BV.min(-1), V - 1)


def _without(
  logits_BV: jax.Array, tokens_BM: jax.Array, is_banned_BM: jax.Array
) -> jax.Array:
  """Bans the tokens of each row that are marked; `NONE` is no token."""
  V = logits_BV.shape[-1]
  place_BM = jnp.where(is_banned_BM & (tokens_BM != NONE), tokens_BM, V)
  ban = jax.vmap(lambda row, place: row.at[place].set(-jnp.inf, mode='drop'))
  return ban(logits_BV, place_BM)


def _where(logits_BV: jax.Array, is_kept_BV: jax.Array) -> jax.Array:
  return jnp.where(is_kept_BV, logits_BV, -jnp.inf)


def _weights(logits_BV: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns exp(logits), scaled so that the largest is 1, and sums (B,)."""
  weights_BV = jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True))
  return weights_BV, weights_BV.sum(-1)


def _threshold(
  x_BV: jax.Array, weights_BV: jax.Array, limit_B: jax.Array
) -> jax.Array:
  """Returns the least x of each row above which weights sum below a limit.

  It bisects the interval from the smallest to the largest x of a row, with
  floats mapped to integers of the same order: 32 steps, each one sum over the
  vocabulary.
  """

  def bisect(
    _: jax.Array, bounds: tuple[jax.Array, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
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
  return _float(jax.lax.fori_loop(0, 32, bisect, bounds)[0])


def _integer(x: jax.Array) -> jax.Array:
  """Maps float32 to int32 with the same order."""
  bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
  # The bits of negative numbers have the opposite order; -0.0 equals 0.0.
  return jnp.where(bits < 0, jnp.int32(-(2**31)) - bits, bits)


def _float(order: jax.Array) -> jax.Array:
  """Inverts `_integer`."""
  bits = jnp.where(order < 0, jnp.int32(-(2**31)) - order, order)
  return jax.lax.bitcast_convert_type(bits, jnp.float32)
