"""Regional attention: full within a region, pooled between regions.

Shape suffixes: B batch, T position, N query heads, K key/value heads, H head
dim, R regions, L tokens of a region.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from t2x import field_checks
from t2x.attention import dense
from t2x.attention import mask as mask_lib
from t2x.attention import patterns
from t2x.layers import attention_config

# Keys, values, logarithm of the number of tokens, and segment of each region.
_Pooled = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Regional(attention_config.Heads):
  """A query sees its own region's keys, and one pooled key of each other one.

  The pooled key and value of a region are the means over its tokens, and count
  as often as it has tokens: log(number of tokens) is added to the score. If all
  tokens of each region are equal, this is dense attention. A decoder sees only
  the regions before its own. In a region with parts of several documents only
  the tokens of the last document are pooled, for its own queries.

  Attributes:
    region: number of tokens L in a region.
  """

  kind: ClassVar[str] = 'regional'
  decoding: ClassVar[str | None] = None
  region: int = 256

  def __post_init__(self) -> None:
    super().__post_init__()
    field_checks.least(self, 'attention.', region=1)

  def check_length(self, length: int) -> None:
    if self.region > length:
      raise ValueError(
        f'attention.region={self.region} is longer than a sequence of {length} '
        'tokens, so there would be one region. Lower it, or set '
        'model.attention=dense.'
      )


@dataclasses.dataclass(frozen=True)
class _Elsewhere(patterns.Pattern):
  """Keys of other regions.

  Attributes:
    size: number of tokens in a region.
  """

  size: int
  is_relative = False

  def sees(
    self,
    q: patterns.Indices,
    k: patterns.Indices,
    prefix: patterns.Indices | None,
  ) -> patterns.Indices:
    return q // self.size != k // self.size

  def reach(self, q: patterns.Span, k: patterns.Span) -> patterns.Reach:
    shape = np.broadcast_shapes(q[0].shape, k[0].shape)
    return np.broadcast_to(True, shape), np.broadcast_to(False, shape)


class RegionalMixer(nnx.Module):
  """Runs `Regional`; see `context.Mixer`."""

  def __init__(self, config: Regional):
    self.config = config

  def __call__(
    self,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask: mask_lib.Mask,
    heads_N: jax.Array,
  ) -> jax.Array:
    del heads_N
    T, L = q_BTNH.shape[1], min(self.config.region, q_BTNH.shape[1])
    num = -(-T // L)
    causal = patterns.has(mask.pattern, patterns.Causal)

    def cut(a: jax.Array) -> jax.Array:
      """(B, T, ...) to (B, R, L, ...)."""
      width = [(0, 0), (0, num * L - T)] + [(0, 0)] * (a.ndim - 2)
      return jnp.pad(a, width).reshape(a.shape[0], num, L, *a.shape[2:])

    segments_BT = mask.q_segments_BT
    if segments_BT is None:
      segments_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)
    segments_BRL = cut(segments_BT)
    q, k, v = cut(q_BTNH), cut(k_BTKH), cut(v_BTKH)
    near = _within(q, k, v, segments_BRL, causal)
    pooled = _pooled(k, v, segments_BRL)
    far = _between(q_BTNH, pooled, segments_BT, L, causal)
    join = lambda a: a.reshape(a.shape[0], -1, *a.shape[3:])[:, :T]
    out, _ = dense.merge(tuple(map(join, near)), far)
    return out.astype(q_BTNH.dtype)


def _within(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  segments_BRL: jax.Array,
  causal: bool,
) -> list[jax.Array]:
  """Attends within each region; returns (B, R, L, ...) and the log-sum-exp."""
  B, R = segments_BRL.shape[:2]
  rows = lambda a: a.reshape(B * R, *a.shape[2:])
  mask = mask_lib.self_attention(rows(segments_BRL), causal=causal)
  parts = dense.attend_part(rows(q), rows(k), rows(v), mask)
  return [a.reshape(B, R, *a.shape[1:]) for a in parts]


def _pooled(k: jax.Array, v: jax.Array, segments_BRL: jax.Array) -> _Pooled:
  """Averages the keys and values of each region."""
  # Padding at the end has segment 0: the last document is the largest.
  segments_BR = segments_BRL.max(-1)
  counted = (segments_BRL == segments_BR[..., None]).astype(jnp.float32)
  num_BR = jnp.maximum(counted.sum(-1), 1.0)
  mean = lambda a: (
    jnp.einsum('BRLKH,BRL->BRKH', a.astype(jnp.float32), counted)
    / num_BR[..., None, None]
  ).astype(a.dtype)
  return mean(k), mean(v), jnp.log(num_BR), segments_BR


def _between(
  q_BTNH: jax.Array,
  pooled: _Pooled,
  segments_BT: jax.Array,
  size: int,
  causal: bool,
) -> dense.Part:
  """Attends to the pooled keys of other regions.

  Args:
    q_BTNH: queries.
    pooled: pooled keys and values.
    segments_BT: segment of each query.
    size: number of tokens in a region.
    causal: whether only earlier regions are seen.
  """
  k_BRKH, v_BRKH, log_BR, segments_BR = pooled
  scale = q_BTNH.shape[-1] ** -0.5
  # An additional entry of keys and queries adds the logarithm to the score.
  one = jnp.ones((*q_BTNH.shape[:-1], 1), jnp.float32)
  q = jnp.concatenate([q_BTNH.astype(jnp.float32) * scale, one], -1)
  log = jnp.broadcast_to(log_BR[..., None, None], (*k_BRKH.shape[:-1], 1))
  k = jnp.concatenate([k_BRKH.astype(jnp.float32), log], -1)
  start_R = jnp.arange(k.shape[1]) * size
  mask = mask_lib.Mask(
    # The index of a region is that after its last token.
    pattern=patterns.Causal() if causal else _Elsewhere(size),
    q_index_BT=jnp.arange(q.shape[1])[None],
    k_index_BS=(start_R + (size if causal else 0))[None],
    q_segments_BT=segments_BT,
    k_segments_BS=segments_BR,
  )
  return dense.attend_part(
    q, k, v_BRKH, mask, options=dense.AttentionOptions(scale=1.0)
  )


def num_flops(config: Regional, length: int, causal: bool) -> int:
  """Returns the FLOPs of a row's scores and weighted values.

  Args:
    config: config of the layer.
    length: number of tokens in the row.
    causal: whether the model's mask is causal.
  """
  L = min(config.region, length)
  pairs = length * L * (0.5 if causal else 1) + length * -(-length // L)
  return int(4 * config.num_heads * config.head_dim * pairs)
