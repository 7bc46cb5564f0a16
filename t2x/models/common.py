"""Parts that all architectures share: config, embeddings and output head.

Shape suffixes: B batch, T position, D embed, V vocabulary.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any
from typing import ClassVar
from typing import Generic
from typing import Literal
from typing import TypeVar

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
from t2x.layers import mup as mup_lib
from t2x.layers import norm as norm_lib
from t2x.layers import param
from t2x.layers import position as position_lib
from t2x.models import layer_checks
from t2x.parallel import sharding
from t2x.parallel import zigzag as zigzag_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
  """Settings that encoders, decoders and encoder-decoders share.

  Attributes:
    vocab_size: number of tokens; the table has more rows, see `vocab_multiple`.
    num_layers: number of layers of the stack (the decoder's, if there are two).
    embed_dim: width of the residual stream, D.
    attention: attention of every layer, if `attention_pattern` is empty.
    attention_pattern: attention of each layer of a repeating group (GPT-3:
      dense, local).
    mlp: feed-forward layer, plain or of experts, if `mlp_pattern` is empty.
    mlp_pattern: feed-forward layer of each layer of a repeating group (Switch
      Transformer: mlp, moe).
    norm: LayerNorm or RMSNorm.
    residual: place of the norms in a block: `pre_norm`, `post_norm`, `sandwich`
      (Gemma 2: a norm of a branch's input and one of its output), or `parallel`
      (PaLM).
    position: kind of position encoding; None leaves order to the mask.
    init: initialisation of the weights.
    mup: sizes at which rates and initialisation are set, from which they follow
      for other sizes; None takes them as they are.
    dropout: dropout rate on embeddings and on the output of each branch.
    embed_scale: whether embeddings are multiplied by sqrt(D) (Vaswani et al.,
      2017).
    tied_head: table that makes logits: `tied`, the token table; `tied_scaled`,
      the same with features divided by sqrt(D) (T5, PaLM); `untied`, a table of
      its own.
    logit_soft_cap: cap that bounds logits by cap * tanh(logit / cap) (Gemma 2),
      in the loss and in generation; None for no cap.
    vocab_multiple: number of which the table's rows are a multiple, so that
      mesh axes divide them; the logits of padded rows are masked everywhere.
    dtype: dtype of activations; parameters are float32.
    memory: number of tokens of earlier rows that a row attends to, if it
      continues their document (`data.batching=stream`); see
      `t2x.models.segment_memory`.
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
  mup: mup_lib.Mup | None = None
  dropout: float = 0.0
  embed_scale: bool = False
  tied_head: Literal['tied', 'tied_scaled', 'untied'] = 'tied'
  logit_soft_cap: float | None = None
  vocab_multiple: int = 128
  dtype: Literal['float32', 'bfloat16'] = 'float32'
  memory: int = 0

  kind: ClassVar[str]
  overruled: ClassVar[dict[str, str]] = {
    'attention': 'attention_pattern',
    'mlp': 'mlp_pattern',
  }

  def __post_init__(self) -> None:
    sizes = ('vocab_size', 'num_layers', 'embed_dim', 'vocab_multiple')
    field_checks.least(self, 'model.', **dict.fromkeys(sizes, 1))
    field_checks.share(self, 'model.', 'dropout')
    field_checks.least(self, 'model.', memory=0)
    field_checks.positive(self, 'model.', 'logit_soft_cap')
    if self.mup is not None and self.mup.base_depth and self.init.depth_scaled:
      raise ValueError(
        f'model.mup.base_depth={self.mup.base_depth} scales the branches by '
        'depth, and model.init.depth_scaled=true does too. Set one of them.'
      )
    if self.memory:
      layer_checks.check_memory(self)
    layer_checks.check_positions(self)

  @property
  def kinds(self) -> tuple[attention_kinds.AttentionConfig, ...]:
    """Attention of each layer of its repeating group."""
    return self.attention_pattern or (self.attention,)

  @property
  def mlp_kinds(self) -> tuple[moe.FeedForwardConfig, ...]:
    """Feed-forward layer of each layer of its repeating group."""
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
  def width_factor(self) -> float:
    """Width as a multiple of the one at which rates are set; 1 without."""
    return 1.0 if self.mup is None else self.mup.width(self.embed_dim)

  @property
  def matrix_init(self) -> param.Init:
    """Initialisation of matrices, whose std follows the width with `mup`.

    One that goes by the fan-in does so by itself.
    """
    if self.mup is None or self.init.scale != 'fixed':
      return self.init
    std = self.init.std * self.width_factor**-0.5
    return dataclasses.replace(self.init, std=std)

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
    """Number of layers of each tower, by its name, in order of depth."""
    return {'tower': self.num_layers}

  @property
  def max_length(self) -> int | None:
    """Largest number of positions that the model has; None for no limit."""
    position = self.position
    limits = [kind.limit for kind in self.kinds]
    if isinstance(position, position_lib.Learned):
      limits.append(position.max_length)
    return min((n for n in limits if n is not None), default=None)


def table_distribution(init: param.Init) -> str:
  """Returns the distribution from which embedding tables are drawn.

  A table has no fan-in or fan-out: where matrices are uniform, it is normal.
  """
  return 'normal' if init.distribution == 'uniform' else init.distribution


class Embeddings(nnx.Module):
  """Token embeddings, and position embeddings if the model adds them.

  Args:
    config: settings of the model.
    rngs: random keys of the initialisation.
  """

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    self.config = config
    D = config.embed_dim
    rows = embed.padded(config.vocab_size, config.vocab_multiple)
    std = config.init.embed_std
    distribution = table_distribution(config.init)
    init = param.make_initializer(
      distribution, config.init.std if std is None else std
    )
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
  def __call__(
    self, tokens_BT: jax.Array, positions_BT: jax.Array
  ) -> jax.Array:
    dtype = jnp.dtype(self.config.dtype)
    x_BTD = self.tokens(tokens_BT, dtype)
    if self.config.embed_scale:
      # With `mup` tables keep their std: so must what they give.
      width = self.config.embed_dim / self.config.width_factor
      x_BTD = x_BTD * jnp.asarray(width**0.5, dtype)
    return self.placed(x_BTD, positions_BT)

  def placed(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Adds position embeddings to embeddings, if the model has them."""
    dtype = x_BTD.dtype
    if self.positions is not None:
      x_BTD = x_BTD + self.positions(positions_BT, dtype)
    elif isinstance(self.config.position, position_lib.Sinusoidal):
      table = position_lib.sinusoidal(positions_BT, self.config.embed_dim)
      x_BTD = x_BTD + table.astype(dtype)
    return sharding.constrain(x_BTD, 'batch', 'norm_length', 'act_embed')


class OutputTable(nnx.Module):
  """The output head's own table, if it is not tied to the embeddings.

  Args:
    config: settings of the model.
    rngs: random keys of the initialisation.
  """

  def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
    rows = embed.padded(config.vocab_size, config.vocab_multiple)
    D = config.embed_dim
    init = config.init
    if init.scale != 'fixed':
      width = D / config.width_factor
      init = dataclasses.replace(init, scale='fixed', std=width**-0.5)
    self.table_VD = param.param(
      rngs, (rows, D), ('vocab', 'embed'), param.initializer(init)
    )


def output_table(
  config: TransformerConfig, *, rngs: nnx.Rngs
) -> OutputTable | None:
  """Returns the head's own table; None if it is tied to the embeddings."""
  untied = config.tied_head == 'untied'
  return OutputTable(config, rngs=rngs) if untied else None


Config = TypeVar('Config', bound=TransformerConfig)


class LanguageModel(nnx.Module, Generic[Config]):
  """The base of the architectures: features, and the head over them.

  Attributes:
    config: settings of the model.
    embeddings: token and position embeddings.
    output: the head's own table; None if it is tied to the embeddings.
    output_bias_V: bias of the logits; None without bias.
    features: method that returns the features (B, T, D), and the statistics of
      routers.
  """

  config: Config
  embeddings: Embeddings
  output: OutputTable | None
  output_bias_V: nnx.Variable | None = None
  features: Callable[..., tuple[jax.Array, dict[str, moe.Stats]]]

  def __call__(self, inputs: jax.Array, **kwargs: Any) -> jax.Array:
    """Returns float32 logits (B, T, V); takes the arguments of `features`."""
    return self.head(self.hidden(inputs, **kwargs))

  def hidden(self, inputs: jax.Array, **kwargs: Any) -> jax.Array:
    """Returns the features alone; takes the arguments of `features`."""
    return self.features(inputs, **kwargs)[0]

  @property
  def head(self) -> embed.Head:
    """The output head, which turns features into logits."""
    config, bias_V = self.config, self.output_bias_V
    table = self.output or self.embeddings.tokens
    scale = 1.0 / config.width_factor
    if config.tied_head == 'tied_scaled':
      # By the base width: the rest of the width is in the factor.
      scale *= (config.embed_dim / config.width_factor) ** -0.5
    return embed.Head(
      table_VD=table.table_VD[...],
      bias_V=None if bias_V is None else bias_V[...],
      scale=scale,
      soft_cap=config.logit_soft_cap,
      vocab_size=config.vocab_size,
    )


def positions_of(
  batch: dict[str, Any], prefix: str = '', zigzag: int = 1
) -> jax.Array:
  """Returns the positions of a batch, by default 0, 1, 2, ..., (B, T).

  Args:
    batch: arrays by name.
    prefix: prefix of the names, such as `encoder_` for the source.
    zigzag: number of devices over which the tokens of a row are in zigzag
      order.
  """
  positions_BT = batch.get(f'{prefix}positions')
  if positions_BT is not None:
    return positions_BT
  tokens_BT = batch[f'{prefix}inputs']
  index_T = jnp.asarray(zigzag_lib.index(tokens_BT.shape[1], zigzag))
  return jnp.broadcast_to(index_T, tokens_BT.shape)


def check_length(config: TransformerConfig, length: int) -> None:
  """Raises a ValueError if the model has fewer positions than `length`."""
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
