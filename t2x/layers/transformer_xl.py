"""Transformer-XL's attention: scores by content and by distance.

With content and position biases u and v, and R(d) the sines and cosines of a
distance d, the score of a query q at place a and a key k at place b is

  (q + u) . k + (q + v) . W R(a - b)          (Dai et al., 2019, section 3.3).

The angles of the second term are differences, so it is a product of a vector of
the query and one of the key. With s and c the coefficients W^T (q + v) of the
sines and the cosines, it is

  (s sin a + c cos a) . cos b + (c sin a - s cos a) . sin b.

Queries and keys are widened by these vectors, and then any implementation of
attention computes these scores: in blocks, under any mask, order of tokens or
layout.

XLNet adds (q + w) . e, where e is one vector for keys of the query's sentence
and another for all other keys (Yang et al., 2019, section 2.5). This needs a
column for each sentence, in which a key has 1 or 0.

Shape suffixes: B batch, T query position, S key position, D embed, N query
heads, K key/value heads, H head dim, F frequencies (D / 2), C token types, Z
the same type or another.
"""

import dataclasses
from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp

from t2x import field_checks
from t2x.layers import attention_config
from t2x.layers import param


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerXL(attention_config.Softmax):
  """Scores by content and by distance; the model needs no other positions.

  Attributes:
    num_token_types: number of sentences (token types) that the scores of an
      encoder distinguish, where a batch has them; 0 is none.
  """

  num_token_types: int = 0

  kind: ClassVar[str] = 'transformer_xl'

  def __post_init__(self) -> None:
    super().__post_init__()
    field_checks.least(self, 'attention.', num_token_types=0)
    if self.kernel == 'flash':
      raise ValueError(
        'attention.kernel=flash: keys that are wider than values, as those of '
        'transformer_xl, are not in it. Set it to auto.'
      )


class Distances(nnx.Module):
  """Widens the queries and keys of one layer by position terms."""

  def __init__(
    self,
    config: TransformerXL,
    embed: int,
    *,
    init: param.Init,
    rngs: nnx.Rngs,
  ):
    N, H = config.num_heads, config.head_dim
    drawn = param.initializer(init, fan_in=embed, fan_out=N * H)
    self.r_DNH = param.weight(
      rngs, (embed, N, H), ('embed', 'heads', 'head_dim'), drawn
    )
    bias = param.make_initializer('normal', init.std)
    axes = ('heads', 'head_dim')
    self.content_bias_NH = param.param(rngs, (N, H), axes, bias)
    self.position_bias_NH = param.param(rngs, (N, H), axes, bias)
    self.num_types = C = config.num_token_types
    self.type_bias_NH = param.param(rngs, (N, H), axes, bias) if C else None
    # For keys of the query's own type, and for those of others.
    self.types_ZNH = (
      param.param(rngs, (2, N, H), (None, *axes), bias) if C else None
    )

  def queries(
    self,
    q_BTNH: jax.Array,
    positions_BT: jax.Array,
    types_BT: jax.Array | None = None,
  ) -> jax.Array:
    """Widens queries.

    Args:
      q_BTNH: queries.
      positions_BT: positions of the queries.
      types_BT: token types of the queries; None is none.

    Returns:
      (B, T, N, H + D), or with types (B, T, N, H + D + C).
    """
    by_place = param.add_bias(q_BTNH, self.position_bias_NH)
    both = param.project(by_place, self.r_DNH, 'BTNH,DNH->BTND')
    s, c = jnp.split(both.astype(jnp.float32), 2, axis=-1)
    sin, cos = _waves(positions_BT, both.shape[-1])
    wide = jnp.concatenate([s * sin + c * cos, c * sin - s * cos], axis=-1)
    content = param.add_bias(q_BTNH, self.content_bias_NH)
    parts = [content, wide.astype(content.dtype)]
    if self.types_ZNH is not None and types_BT is not None:
      by_type = param.add_bias(q_BTNH, self.type_bias_NH)
      table_ZNH = self.types_ZNH[...].astype(by_type.dtype)
      scores_BTNZ = jnp.einsum('BTNH,ZNH->BTNZ', by_type, table_ZNH)
      is_own_BTC = jax.nn.one_hot(types_BT, self.num_types, dtype=bool)
      is_own_BT1C = is_own_BTC[:, :, None]
      parts.append(
        jnp.where(is_own_BT1C, scores_BTNZ[..., :1], scores_BTNZ[..., 1:])
      )
    return jnp.concatenate(parts, axis=-1)

  def keys(
    self,
    k_BSKH: jax.Array,
    positions_BS: jax.Array,
    types_BS: jax.Array | None = None,
  ) -> jax.Array:
    """Widens keys.

    Args:
      k_BSKH: keys.
      positions_BS: positions of the keys.
      types_BS: token types of the keys; None is none.

    Returns:
      (B, S, K, H + D), or with types (B, S, K, H + D + C).
    """
    sin, cos = _waves(positions_BS, self.r_DNH.shape[0])
    parts = [cos, sin]
    if self.types_ZNH is not None and types_BS is not None:
      parts.append(jax.nn.one_hot(types_BS, self.num_types)[:, :, None])
    wide = jnp.concatenate(parts, axis=-1).astype(k_BSKH.dtype)
    shape = (*k_BSKH.shape[:3], wide.shape[-1])
    return jnp.concatenate([k_BSKH, jnp.broadcast_to(wide, shape)], axis=-1)


def _waves(positions_BT: jax.Array, size: int) -> tuple[jax.Array, jax.Array]:
  """Returns sines and cosines of positions, (B, T, 1, F)."""
  frequency_F = 10000.0 ** (-jnp.arange(0, size, 2) / size)
  angle = positions_BT[..., None, None] * frequency_F[None, None, None]
  return jnp.sin(angle), jnp.cos(angle)


def num_flops(
  config: TransformerXL, length: int, embed: int, pairs: float
) -> int:
  """Returns the FLOPs of a row that dense attention does not have.

  Args:
    config: config of the layer.
    length: number of tokens in the row.
    embed: width D of the activations.
    pairs: number of pairs of a query and a key that are computed.
  """
  N, H = config.num_heads, config.head_dim
  return int(2 * N * embed * (length * H + pairs))
