"""Checks that the layers of a model fit together."""

from typing import ClassVar
from typing import Protocol

import jax

from t2x.layers import attention_config
from t2x.layers import attention_kinds
from t2x.layers import convolution
from t2x.layers import low_rank
from t2x.layers import moe
from t2x.layers import position
from t2x.layers import sparse
from t2x.layers import transformer_xl


class LayerConfig(Protocol):
  """The fields of a `TransformerConfig` that the checks read."""

  kind: ClassVar[str]

  @property
  def kinds(self) -> tuple[attention_kinds.AttentionConfig, ...]:
    """Attention of each layer of its repeating group."""
    ...

  @property
  def mlp_kinds(self) -> tuple[moe.FeedForwardConfig, ...]:
    """Feed-forward layer of each layer of its repeating group."""
    ...

  @property
  def position(self) -> position.PositionConfig | None:
    """Kind of position encoding."""
    ...

  @property
  def memory(self) -> int:
    """Number of tokens of earlier rows that a row attends to."""
    ...

  @property
  def num_query_layers(self) -> int:
    """Number of layers that ask for tokens dropped from the encoder."""
    ...


def check_positions(config: LayerConfig) -> None:
  """Raises a ValueError for attention that does not fit the positions."""
  encoding, kinds = config.position, config.kinds
  if isinstance(encoding, position.Rotary):
    for kind in kinds:
      encoding.rotated(kind.head_dim)
  for kind in kinds:
    if not kind.rotary and not isinstance(encoding, position.Rotary):
      raise ValueError(
        'attention.rotary=false leaves rotary positions out of a layer, and '
        f'model.position={encoding.kind if encoding else "none"} has none. Set '
        'attention.rotary=true, or model.position=rotary.'
      )
  by_distance = [
    kind for kind in kinds if isinstance(kind, transformer_xl.TransformerXL)
  ]
  if (
    by_distance and encoding is not None and not position.is_absolute(encoding)
  ):
    raise ValueError(
      f'model.position={encoding.kind} and model.attention=transformer_xl, '
      'which has positions of its own. Set model.position=none.'
    )
  if encoding and position.is_bias(encoding):
    for kind in kinds:
      if not isinstance(kind, attention_config.Softmax):
        raise ValueError(
          f'model.position={encoding.kind} adds to scores, and model.attention='
          f'{kind.kind} has none. Choose rotary, learned or sinusoidal '
          'positions.'
        )
  any_global = any(kind.global_projections for kind in kinds)
  if any_global and encoding is not None and not position.is_absolute(encoding):
    raise ValueError(
      'attention.global_projections=true takes learned or sinusoidal '
      f'positions, as Longformer has, and model.position is {encoding.kind}. '
      'Set one of them, or global_projections=false.'
    )
  if len({kind.num_heads for kind in kinds}) > 1:
    raise ValueError(
      'model.attention_pattern has layers of '
      f'{[kind.num_heads for kind in kinds]} heads; all have as many, since '
      'they share their positions.'
    )


def check_causal(config: LayerConfig) -> None:
  """Raises a ValueError for layers that a decoder cannot have."""
  for kind in config.kinds:
    if kind.not_causal is not None:
      raise ValueError(
        f'model.attention={kind.kind}: {kind.not_causal}, so a decoder would '
        'see the future. It is for model.kind=encoder.'
      )
    if num_types := kind.num_token_types:
      raise ValueError(
        f'attention.num_token_types={num_types} is for model.kind='
        'encoder: rows of a decoder have no sentences A and B. Set it to 0.'
      )
    if kind.global_projections:
      raise ValueError(
        'attention.global_projections=true is for model.kind=encoder: the '
        'first tokens of a decoder see no later ones. Set it to false.'
      )
  for kind in config.mlp_kinds:
    if isinstance(kind, moe.MoeConfig) and not kind.is_causal:
      raise ValueError(
        'mlp.router=expert_choice lets later tokens decide which experts an '
        'earlier one has, so a decoder would see the future. Set '
        'model.mlp.router=token_choice.'
      )


def check_memory(config: LayerConfig) -> None:
  """Raises a ValueError for layers that cannot attend to earlier rows."""
  encoding = config.position
  if encoding is not None and position.is_absolute(encoding):
    raise ValueError(
      f'model.memory={config.memory} tokens of earlier rows stand before the '
      f'first position of model.position={encoding.kind}. Set model.position '
      'to rotary, relative_buckets, alibi or none.'
    )
  whole = (sparse.BlockSparse, sparse.Random, sparse.BigBird, sparse.Longformer)
  for kind in config.kinds:
    if not isinstance(kind, attention_config.Softmax) or isinstance(
      kind, whole
    ):
      raise ValueError(
        f'model.memory={config.memory}: model.attention={kind.kind} goes by '
        'whole rows. Choose dense, transformer_xl, local or dilated.'
      )
  if config.kind == 'encoder_decoder' or config.num_query_layers:
    raise ValueError(
      f'model.memory={config.memory} is for models of one stack. Set it to 0.'
    )


def check_query_layers(config: LayerConfig) -> None:
  """Raises a ValueError if the queries for dropped tokens cannot work."""
  if not position.is_absolute(config.position):
    kind = config.position.kind if config.position else 'none'
    raise ValueError(
      f'model.query_layers={config.num_query_layers} ask by where a token '
      f'stood, which model.position={kind} adds to no token: all of them would '
      'ask the same. Set model.position to learned or sinusoidal.'
    )
  whole = (sparse.BlockSparse, sparse.Random, sparse.BigBird)
  for kind in config.kinds:
    softmax = isinstance(kind, attention_config.Softmax)
    is_global = kind.global_projections
    if not softmax or is_global or isinstance(kind, whole):
      raise ValueError(
        f'model.query_layers={config.num_query_layers} leave rows of which '
        f'tokens are missing, and model.attention={kind.kind} goes by whole '
        'rows. Choose dense, local or another kind whose pattern goes by '
        'distance.'
      )


def check_two_stream(config: LayerConfig) -> None:
  """Raises a ValueError for settings that the two streams do not support."""
  for kind in config.kinds:
    is_global = kind.global_projections
    if not isinstance(kind, attention_config.Softmax) or is_global:
      raise ValueError(
        f'model.two_stream=true hides tokens by the order of a permutation, '
        f'which model.attention={kind.kind} has no place for. Choose dense, '
        'transformer_xl or another softmax kind.'
      )
  for name in ('query_layers', 'num_token_types', 'next_sentence'):
    if getattr(config, name):
      raise ValueError(
        f'model.two_stream=true and model.{name}={getattr(config, name)}: '
        'the second stream has none. Set one of them to 0 or false.'
      )
  for mlp in config.mlp_kinds:
    if isinstance(mlp, moe.MoeConfig):
      raise ValueError(
        'model.two_stream=true is for plain feed-forward layers. Set '
        'model.mlp.kind=mlp.'
      )


def check_documents(config: LayerConfig, segments_BT: jax.Array | None) -> None:
  """Raises a ValueError for documents that a layer would mix in their row.

  Args:
    config: settings of the model.
    segments_BT: number of each token's document; None for one document. Traced
      values are not checked.
  """
  for kind in config.kinds:
    if kind.mixes_rows:
      low_rank.check_documents(kind.kind, segments_BT)


def check_bidirectional(config: LayerConfig) -> None:
  """Raises a ValueError for layers that cannot attend to both sides."""
  for kind in config.kinds:
    if isinstance(kind, convolution.Convolution) and kind.width % 2 == 0:
      raise ValueError(
        f'attention.width={kind.width}: an encoder has as many taps on both '
        'sides of a token. Set it to an odd number.'
      )
