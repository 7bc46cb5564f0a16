"""The oracle of attention, for tests: computes all scores, in float32."""

import jax
import jax.numpy as jnp

from t2x.attention import dense
from t2x.attention import mask as mask_lib


def attend(
  q_BTNH: jax.Array,
  k_BSKH: jax.Array,
  v_BSKH: jax.Array,
  mask: mask_lib.Mask,
  options: dense.AttentionOptions = dense.AttentionOptions(),
) -> jax.Array:
  """Attends as `dense.attend`, with the whole matrix of scores.

  Args:
    q_BTNH: queries.
    k_BSKH: keys.
    v_BSKH: values.
    mask: description of the keys that each query sees.
    options: scale, cap and bias, without dropout.
  """
  assert options.dropout is None
  T, S = q_BTNH.shape[1], k_BSKH.shape[1]
  N, K = q_BTNH.shape[2], k_BSKH.shape[2]
  q, k, v = (a.astype(jnp.float32) for a in (q_BTNH, k_BSKH, v_BSKH))
  scale = q.shape[-1] ** -0.5 if options.scale is None else options.scale
  k, v = (jnp.repeat(a, N // K, axis=2) for a in (k, v))
  scores = jnp.einsum('btnh,bsnh->bnts', q, k) * scale
  if options.soft_cap is not None:
    scores = options.soft_cap * jnp.tanh(scores / options.soft_cap)
  mask = mask_lib.placed(mask, T, S)
  whole = slice(0, T), slice(0, S)
  if options.bias is not None:
    values = options.bias(mask_lib.relative(mask, *whole))
    scores = scores + (values if values.ndim == 4 else values[None])
  seen = mask_lib.visible(mask, *whole)
  if seen is not None:
    seen = seen[None, None] if seen.ndim == 2 else seen[:, None]
    scores = jnp.where(seen, scores, -jnp.inf)
  probs = jax.nn.softmax(scores, axis=-1)
  probs = jnp.where(jnp.isnan(probs), 0.0, probs)
  return jnp.einsum('bnts,bsnh->btnh', probs, v).astype(q_BTNH.dtype)
