"""From logits to tokens: temperature, top-k, top-p, in this order.

Every function is pure and works on rows: a row's result depends on its own
logits and its own key, never on the rest of the batch.

Shape suffixes: B batch, V vocabulary.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
  """How the next token is drawn; the default is the model's distribution.

  >>> SamplingConfig(temperature=0.8, top_p=0.9)
  SamplingConfig(temperature=0.8, top_k=None, top_p=0.9)

  Attributes:
    temperature: logits are divided by it; 0 takes the most likely token.
    top_k: only the k most likely tokens stay; None keeps all.
    top_p: of these, only the smallest set of the most likely tokens whose
      probabilities sum to at least p stays; None keeps all.
  """

  temperature: float = 1.0
  top_k: int | None = None
  top_p: float | None = None

  def __post_init__(self):
    if not (math.isfinite(self.temperature) and self.temperature >= 0):
      raise ValueError(
        f'sampling.temperature={self.temperature}; it must be 0 (the most '
        'likely token) or a positive number (1 is the model itself).'
      )
    if self.top_k is not None and self.top_k < 1:
      raise ValueError(
        f'sampling.top_k={self.top_k}; it must be 1 or more, or none to keep '
        'every token.'
      )
    if self.top_p is not None and not 0 < self.top_p <= 1:
      raise ValueError(
        f'sampling.top_p={self.top_p}; it must be in (0, 1], or none to keep '
        'every token.'
      )


def sample(
  logits_BV: jax.Array, keys_B: jax.Array, config: SamplingConfig
) -> jax.Array:
  """Draws one token for each row.

  Args:
    logits_BV: float32, without the padding of the vocabulary.
    keys_B: a key for each row; unused where the temperature is 0.
    config: what to draw from.

  Returns:
    Token ids (B,), int32. At temperature 0 the lowest id of equal ones.
  """
  if config.temperature == 0:
    return logits_BV.argmax(-1).astype(jnp.int32)
  logits_BV = truncate(logits_BV, config)
  draw = jax.vmap(jax.random.categorical)
  return draw(keys_B, logits_BV).astype(jnp.int32)


def truncate(logits_BV: jax.Array, config: SamplingConfig) -> jax.Array:
  """Returns the logits that `sample` draws from, for a positive temperature.

  Tokens that are left out have -inf; the others are not normalised.
  """
  logits_BV = temperature(logits_BV, config.temperature)
  if config.top_k is not None:
    logits_BV = top_k(logits_BV, config.top_k)
  # Rounding must not cut the tail where p = 1 asks for everything.
  if config.top_p is not None and config.top_p < 1:
    logits_BV = top_p(logits_BV, config.top_p)
  return logits_BV


def temperature(logits_BV: jax.Array, value: float) -> jax.Array:
  """Divides by a positive temperature; the largest logit becomes 0."""
  # Shifted first, so that a tiny temperature overflows to -inf, not to NaN.
  return (logits_BV - logits_BV.max(-1, keepdims=True)) / value


def top_k(logits_BV: jax.Array, k: int) -> jax.Array:
  """Sets all but the k largest logits to -inf (Fan et al., 2018).

  Tokens that equal the k-th stay too: nothing tells them apart.
  """
  largest_BK, _ = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))
  return _at_least(logits_BV, largest_BK[:, -1:])


def top_p(logits_BV: jax.Array, p: float) -> jax.Array:
  """Keeps the most likely tokens up to a mass of p (Holtzman et al., 2020).

  A token stays if those before it, most likely first, sum to less than p: the
  one that crosses p stays, and there is always one. Tokens that equal the last
  one stay too.
  """
  sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
  probs_BV = jax.nn.softmax(sorted_BV, axis=-1)
  before_BV = jnp.cumsum(probs_BV, axis=-1) - probs_BV
  kept_BV = jnp.where(before_BV < p, sorted_BV, jnp.inf)
  return _at_least(logits_BV, kept_BV.min(-1, keepdims=True))


def _at_least(logits_BV: jax.Array, least_B1: jax.Array) -> jax.Array:
  return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
