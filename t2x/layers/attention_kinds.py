"""The list of all kinds of attention, and the module that runs each of them."""

import types
import typing

from flax import nnx

from t2x.attention import context
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


def mixer(
  config: attention_config.Heads, *, rngs: nnx.Rngs
) -> context.Mixer | None:
  """Builds the mixer of a kind without scores; None for softmax attention."""
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
  """Returns the config of cross-attention in a block with self-attention.

  Cross-attention is softmax attention over the whole other sequence: patterns
  are for self-attention.
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
  """Returns the number of heads over all projections of a layer.

  These are the projections to queries, keys, values and output, or of a
  convolution those to values, gate and output. FLOPs are proportional to it.
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
  """Returns the pattern of a layer: the order and the kind's own pattern.

  Args:
    config: config of the layer.
    length: number of tokens in a sequence.
    causal: whether the model's mask is causal.
  """
  order = patterns.ordered(causal=causal)
  if not isinstance(config, attention_config.Softmax):
    return order
  return order & config.pattern(length, causal=causal)


def no_decoding(config: attention_config.Heads) -> str:
  """Returns the error message for generation with a kind that cannot do it."""
  return (
    f'attention.kind={config.kind} has no incremental decoding: it trains and '
    'evaluates, but cannot generate token by token. Kinds that can: '
    f'{", ".join(k.kind for k in all_of(AttentionConfig) if k.decoding)}.'
  )


def check_pages(config: attention_config.Heads) -> None:
  """Raises ValueError if a kind cannot use the paged caches of serving."""
  if config.decoding is None:
    raise ValueError(no_decoding(config))
  if not isinstance(config, attention_config.Softmax):
    raise ValueError(
      f'attention.kind={config.kind} keeps a state for each row and no keys, '
      'which is what pages hold: it cannot be served. It writes in batches '
      'that begin together: experiments/generate.py.'
    )


def all_of(union: types.UnionType) -> tuple[type[attention_config.Heads], ...]:
  """Returns the config classes of a union, in its order."""
  return typing.get_args(union)


def mixing_flops(
  config: MixerConfig | convolution.Convolution,
  length: int,
  embed: int,
  causal: bool,
) -> int:
  """Returns the FLOPs of one row that stand in the place of softmax attention.

  Args:
    config: config of the layer.
    length: number of tokens in the row.
    embed: width of the activations.
    causal: whether the model's mask is causal.
  """
  match config:
    case regional.Regional():
      return regional.num_flops(config, length, causal)
    case linear.Linear() | linear.Performer():
      return linear.num_flops(config, length, causal)
    case low_rank.Linformer() | low_rank.Nystromformer():
      return low_rank.num_flops(config, length)
  return convolution.num_flops(config, length, embed)
