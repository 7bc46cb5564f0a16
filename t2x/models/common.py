"""What the three architectures share: their config, embeddings and stacks.

Shape suffixes: B batch, T position, D embed, V vocabulary.
"""

import dataclasses
import math
from typing import ClassVar
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp

from t2x import field_checks
from t2x.layers import attention_config
from t2x.layers import attention_kinds
from t2x.layers import block
from t2x.layers import embed
from t2x.layers import mlp as mlp_lib
from t2x.layers import moe
from t2x.layers import norm as norm_lib
from t2x.layers import param
from t2x.layers import position as position_lib
from t2x.models import layer_checks
from t2x.parallel import sharding
from t2x.parallel import zigzag as zigzag_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Fields that encoders, decoders and encoder-decoders share.

  Attributes:
    vocab_size: tokens that exist; the table has more rows, see
      `vocab_multiple`.
    num_layers: layers of the (decoder) stack.
    embed_dim: width D.
    attention: of every layer, where `attention_pattern` is empty.
    attention_pattern: kinds of a repeating group of layers (GPT-3: dense,
      local).
    mlp: the feed-forward layer, plain or of experts, where `mlp_pattern` is
      empty.
    mlp_pattern: kinds of a repeating group of layers (Switch Transformer: mlp,
      moe).
    norm: LayerNorm or RMSNorm.
    residual: `pre_norm`, `post_norm`, `sandwich` (Gemma 2: a norm of what a
      branch reads and one of what it adds), or `parallel` (PaLM).
    position: how order is told; None leaves it to the mask.
    init: how weights are drawn.
    dropout: rate on embeddings and on each branch before it is added.
    embed_scale: multiply embeddings by sqrt(D) (Vaswani et al., 2017).
    tied_head: how logits come about: `tied` from the token table, `tied_scaled`
      the same with features divided by sqrt(D) (T5, PaLM), `untied` from a
      table of their own.
    logit_soft_cap: bounds logits by cap * tanh(logit / cap) (Gemma 2), in the
      loss as in generation; None does not.
    vocab_multiple: the table's rows are padded to a multiple of this, so that
      mesh axes divide them; padded logits are masked everywhere.
    dtype: of activations; parameters stay float32.
    memory: tokens of the rows before that a row sees, where it goes on with
      their document (`data.batching=stream`); see `t2x.models.segment_memory`.
  """

  vocab_size: int = 8192
  num_layers: int = 4
  embed_dim: int = 256
  attention: attention_kinds.AttentionConfig = attention_config.Dense()
  attention_pattern: tuple[attention_kinds.AttentionConfig, ...] = ()
  mlp: moe.FeedForwardConfig = mlp_lib.MlpConfig()
  mlp_pattern: tuple[moe.FeedForwardConfig, ...] = ()
  norm: norm_lib.NormConfig = norm_lib.LayerNorm()
  residual: block.Residual = 'pre_norm'
  position: position_lib.PositionConfig | None = position_lib.Learned()
  init: param.Init = param.Init()
  dropout: float = 0.0
  embed_scale: bool = False
  tied_head: Literal['tied', 'tied_scaled', 'untied'] = 'tied'
  logit_soft_cap: float | None = None
  vocab_multiple: int = 128
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  memory: int = 0

  overruled: ClassVar[dict[str, str]] = {
    'attention': 'attention_pattern',
    'mlp': 'mlp_pattern',
  }

  def __post_init__(self):
    sizes = ('vocab_size', 'num_layers', 'embed_dim', 'vocab_multiple')
    field_checks.least(self, 'model.', **dict.fromkeys(sizes, 1))
    field_checks.share(self, 'model.', 'dropout')
    field_checks.least(self, 'model.', memory=0)
    field_checks.positive(self, 'model.', 'logit_soft_cap')
    if self.memory:
      layer_checks.check_memory(self)
    layer_checks.check_positions(self)

  @property
  def kinds(self) -> tuple[attention_kinds.AttentionConfig, ...]:
    return self.attention_pattern or (self.attention,)

  @property
  def mlp_kinds(self) -> tuple[moe.FeedForwardConfig, ...]:
    return self.mlp_pattern or (self.mlp,)

  @property
  def group(
    self,
  ) -> list[tuple[attention_kinds.AttentionConfig, moe.FeedForwardConfig]]:
    """Attention and feed-forward of each layer of the repeating group."""
    kinds, mlps = self.kinds, self.mlp_kinds
    size = math.lcm(len(kinds), len(mlps))
    return [(kinds[i % len(kinds)], mlps[i % len(mlps)]) for i in range(size)]

  @property
  def num_ahead(self) -> int:
    """The number of heads for tokens after the next."""
    return 0

  @property
  def head_classes(self) -> tuple[int, ...]:
    """The number of classes of each head over whole texts."""
    return ()

  @property
  def is_two_stream(self) -> bool:
    """Whether a second stream of queries asks for tokens (XLNet)."""
    return False

  @property
  def num_query_layers(self) -> int:
    """The layers that ask for tokens dropped from the encoder."""
    return 0

  @property
  def depths(self) -> dict[str, int]:
    """Layers of each stack, in order of depth, by the name of the tower."""
    return {'tower': self.num_layers}

  @property
  def max_length(self) -> int | None:
    """Positions that the model can tell apart, or None for no limit."""
    position = self.position
    limits = [kind.limit for kind in self.kinds]
    if isinstance(position, position_lib.Learned):
      limits.append(position.max_length)
    return min((n for n in limits if n is not None), default=None)


def table_distribution(init: param.Init) -> str:
  """Tables that are looked up have no fan; `uniform` is for matrices."""
  return 'normal' if init.distribution == 'uniform' else init.distribution


class Embeddings(nnx.Module):
  """Token vectors, and positions where they are added."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    self.config = config
    D = config.embed_dim
    rows = embed.padded(config.vocab_size, config.vocab_multiple)
    std = config.init.embed_std
    distribution = table_distribution(config.init)
    init = param.drawn(distribution, config.init.std if std is None else std)
    self.tokens = embed.Embed(rows, D, init=init, rngs=rngs)
    position = config.position
    self.positions = (
      position_lib.LearnedPositions(
        position, D, distribution=distribution, rngs=rngs
      )
      if isinstance(position, position_lib.Learned)
      else None
    )

  @jax.named_scope('embeddings')
  def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array):
    dtype = jnp.dtype(self.config.dtype)
    x_BTD = self.tokens(tokens_BT, dtype)
    if self.config.embed_scale:
      x_BTD = x_BTD * jnp.asarray(self.config.embed_dim**0.5, dtype)
    return self.placed(x_BTD, positions_BT)

  def placed(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Adds what says where a token stands, if anything is added."""
    dtype = x_BTD.dtype
    if self.positions is not None:
      x_BTD = x_BTD + self.positions(positions_BT, dtype)
    elif isinstance(self.config.position, position_lib.Sinusoidal):
      table = position_lib.sinusoidal(positions_BT, self.config.embed_dim)
      x_BTD = x_BTD + table.astype(dtype)
    return sharding.constrain(x_BTD, 'batch', 'norm_length', 'act_embed')


class OutputTable(nnx.Module):
  """The head's own table, where it is not tied to the embeddings."""

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    rows = embed.padded(config.vocab_size, config.vocab_multiple)
    D = config.embed_dim
    init = config.init
    if init.scale != 'fixed':
      init = dataclasses.replace(init, scale='fixed', std=D**-0.5)
    self.table_VD = param.param(
      rngs, (rows, D), ('vocab', 'embed'), param.initializer(init)
    )


def make_head(config, table_VD, bias_V=None) -> embed.Head:
  """Returns the head over a table; see `TransformerConfig.tied_head`."""
  scaled = config.tied_head == 'tied_scaled'
  return embed.Head(
    table_VD=table_VD[...],
    bias_V=None if bias_V is None else bias_V[...],
    scale=config.embed_dim**-0.5 if scaled else 1.0,
    soft_cap=config.logit_soft_cap,
    vocab_size=config.vocab_size,
  )


def positions_of(batch, prefix: str = '', zigzag: int = 1) -> jax.Array:
  """Returns a batch's positions; where none are given, 0, 1, 2, ...

  Args:
    batch: name -> array.
    prefix: of the names, `encoder_` for the source.
    zigzag: devices over which the tokens of a row lie in zigzag order.
  """
  positions_BT = batch.get(f'{prefix}positions')
  if positions_BT is not None:
    return positions_BT
  tokens_BT = batch[f'{prefix}inputs']
  index_T = jnp.asarray(zigzag_lib.index(tokens_BT.shape[1], zigzag))
  return jnp.broadcast_to(index_T, tokens_BT.shape)


def check_length(config: TransformerConfig, length: int) -> None:
  """Raises ValueError if the positions do not reach `length` tokens."""
  limit = config.max_length
  if limit is not None and length > limit:
    by_kind = [k.kind for k in config.kinds if k.limit == limit]
    what = (
      f'attention.length={limit} of model.attention={by_kind[0]}'
      if by_kind
      else f'model.position.max_length={limit} positions that the model has'
    )
    raise ValueError(
      f'A sequence of {length} tokens is longer than the {what}. Shorten it, '
      'or build the model with more.'
    )
