"""All kinds of attention: their configs, and what runs each of them."""

import typing
from typing import Any
from typing import Protocol

from flax import nnx
import jax

from t2x.attention import mask as mask_lib
from t2x.attention import patterns
from t2x.layers import attention_config
from t2x.layers import convolution
from t2x.layers import linear
from t2x.layers import low_rank
from t2x.layers import regional
from t2x.layers import sparse
from t2x.layers import transformer_xl

SoftmaxConfig = (
  attention_config.Dense
  | transformer_xl.TransformerXL
  | attention_config.Local
  | sparse.Dilated
  | sparse.BlockSparse
  | sparse.Random
  | sparse.BigBird
  | sparse.Longformer
)
MixerConfig = (
  regional.Regional
  | linear.Linear
  | linear.Performer
  | low_rank.Linformer
  | low_rank.Nystromformer
)
AttentionConfig = SoftmaxConfig | MixerConfig | convolution.Convolution


class Mixer(Protocol):
  """Mixes values by queries and keys, in the place of softmax attention."""

  def __call__(
    self,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    mask: mask_lib.Mask,
    heads_N: jax.Array,
  ) -> jax.Array:
    """Returns (B, T, N, H) of a sequence that looks at itself.

    Args:
      q_BTNH: queries.
      k_BTKH: keys.
      v_BTKH: values.
      mask: causal or of everything, with segments or none.
      heads_N: numbers of the query heads among all of the layer.
    """
    ...


def mixer(config: Any, *, rngs: nnx.Rngs) -> Any:
  """Returns what mixes values, a `Mixer`; None for softmax attention."""
  match config:
    case regional.Regional():
      return regional.RegionalMixer(config)
    case linear.Linear():
      return linear.LinearMixer(config)
    case linear.Performer():
      return linear.PerformerMixer(config, rngs=rngs)
    case low_rank.Linformer():
      return low_rank.LinformerMixer(config, rngs=rngs)
    case low_rank.Nystromformer():
      return low_rank.NystromMixer(config, rngs=rngs)
  return None


def for_cross(config: AttentionConfig) -> SoftmaxConfig:
  """Returns the kind that looks at another sequence, in a layer of `config`.

  Softmax attention over all of it; the patterns are for a sequence itself.
  """
  by_distance = isinstance(config, transformer_xl.TransformerXL)
  if isinstance(config, attention_config.Softmax) and not by_distance:
    return config
  return attention_config.Dense(
    num_heads=config.num_heads,
    num_kv_heads=config.num_kv_heads,
    head_dim=config.head_dim,
    bias=config.bias,
    out_bias=config.out_bias,
    qk_norm=config.qk_norm,
    qk_norm_eps=config.qk_norm_eps,
  )


def projected_heads(config: AttentionConfig) -> int:
  """Returns the heads whose width a layer's products make or read.

  Of queries, keys, values and output; of a convolution's values, gate and
  output.
  """
  N, K = config.num_heads, config.kv_heads
  if isinstance(config, convolution.Convolution):
    return 3 * N
  # Keys and values for global tokens; their few queries are not counted.
  more = isinstance(config, sparse.Longformer) and config.global_projections
  return 2 * (N + K) + (2 * N if more else 0)


def pattern_of(
  config: AttentionConfig, length: int, causal: bool
) -> patterns.Pattern:
  """Returns the order and what a kind of softmax attention adds to it."""
  order = patterns.ordered(causal=causal)
  if not isinstance(config, attention_config.Softmax):
    return order
  return order & config.pattern(length, causal=causal)


def no_decoding(config: Any) -> str:
  """Returns why a decoder of this kind cannot generate."""
  return (
    f'attention.kind={config.kind} has no incremental decoding: it trains and '
    'evaluates, but cannot generate token by token. Kinds that can: '
    f'{", ".join(k.kind for k in all_of(AttentionConfig) if k.decoding)}.'
  )


def check_pages(config: Any) -> None:
  """Raises ValueError if rows of this kind cannot come and go in one batch."""
  if config.decoding is None:
    raise ValueError(no_decoding(config))
  if not isinstance(config, attention_config.Softmax):
    raise ValueError(
      f'attention.kind={config.kind} keeps a state for each row and no keys, '
      'which is what pages hold: it cannot be served. It writes in batches '
      'that begin together: experiments/generate.py.'
    )


def all_of(union: Any) -> tuple[type[attention_config.Heads], ...]:
  """Returns the kinds of a union of them, in its order."""
  return typing.get_args(union)


def mixing_flops(
  config: MixerConfig | convolution.Convolution,
  length: int,
  embed: int,
  causal: bool,
) -> int:
  """Returns the FLOPs of one row, in the place of scores and values."""
  match config:
    case regional.Regional():
      return regional.num_flops(config, length, causal)
    case linear.Linear() | linear.Performer():
      return linear.num_flops(config, length, causal)
    case low_rank.Linformer() | low_rank.Nystromformer():
      return low_rank.num_flops(config, length)
  return convolution.num_flops(config, length, embed)
