"""Which kinds of layers a model can have."""

from typing import Any

from t2x.layers import attention_config
from t2x.layers import convolution
from t2x.layers import low_rank
from t2x.layers import moe
from t2x.layers import position
from t2x.layers import sparse
from t2x.layers import transformer_xl


def check_positions(config: Any) -> None:
  """Raises ValueError for kinds of attention that do not fit the positions.

  Args:
    config: a `TransformerConfig`.
  """
  own, kinds = config.position, config.kinds
  if isinstance(own, position.Rotary):
    for kind in kinds:
      own.rotated(kind.head_dim)
  for kind in kinds:
    if not kind.rotary and not isinstance(own, position.Rotary):
      raise ValueError(
        'attention.rotary=false leaves rotary positions out of a layer, and '
        f'model.position={own.kind if own else "none"} has none. Set '
        'attention.rotary=true, or model.position=rotary.'
      )
  by_distance = [
    kind for kind in kinds if isinstance(kind, transformer_xl.TransformerXL)
  ]
  if by_distance and own is not None and not position.is_added(own):
    raise ValueError(
      f'model.position={own.kind} and model.attention=transformer_xl, which '
      'has positions of its own. Set model.position=none.'
    )
  if own and position.is_bias(own):
    for kind in kinds:
      if not isinstance(kind, attention_config.Softmax):
        raise ValueError(
          f'model.position={own.kind} adds to scores, and model.attention='
          f'{kind.kind} has none. Choose rotary, learned or sinusoidal '
          'positions.'
        )
  apart = any(kind.global_projections for kind in kinds)
  if apart and own is not None and not position.is_added(own):
    raise ValueError(
      'attention.global_projections=true takes learned or sinusoidal '
      f'positions, as Longformer has, and model.position is {own.kind}. Set '
      'one of them, or global_projections=false.'
    )
  if len({kind.num_heads for kind in kinds}) > 1:
    raise ValueError(
      'model.attention_pattern has layers of '
      f'{[kind.num_heads for kind in kinds]} heads; all have as many, since '
      'they share their positions.'
    )


def check_causal(config: Any) -> None:
  """Raises ValueError for layers that a decoder cannot have."""
  for kind in config.kinds:
    if kind.not_causal is not None:
      raise ValueError(
        f'model.attention={kind.kind}: {kind.not_causal}, so a decoder would '
        'see the future. It is for model.kind=encoder.'
      )
    if kind.num_token_types:
      raise ValueError(
        f'attention.num_token_types={kind.num_token_types} is for model.kind='
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


def check_memory(config: Any) -> None:
  """Raises ValueError for layers that know no distance to earlier rows."""
  own = config.position
  if position.is_added(own):
    raise ValueError(
      f'model.memory={config.memory} tokens of earlier rows stand before the '
      f'first position of model.position={own.kind}. Set model.position to '
      'rotary, relative_buckets, alibi or none.'
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


def check_query_layers(config: Any) -> None:
  """Raises ValueError where tokens that are dropped could not be asked for."""
  if not position.is_added(config.position):
    kind = config.position.kind if config.position else 'none'
    raise ValueError(
      f'model.query_layers={config.query_layers} ask by where a token stood, '
      f'which model.position={kind} adds to no token: all of them would ask '
      'the same. Set model.position to learned or sinusoidal.'
    )
  whole = (sparse.BlockSparse, sparse.Random, sparse.BigBird)
  for kind in config.kinds:
    softmax = isinstance(kind, attention_config.Softmax)
    own = kind.global_projections
    if not softmax or own or isinstance(kind, whole):
      raise ValueError(
        f'model.query_layers={config.query_layers} leave rows of which tokens '
        f'are missing, and model.attention={kind.kind} goes by whole rows. '
        'Choose dense, local or another kind whose pattern goes by distance.'
      )


def check_two_stream(config: Any) -> None:
  """Raises ValueError for what does not go by the ranks of tokens."""
  for kind in config.kinds:
    whole = not kind.global_projections
    if not (isinstance(kind, attention_config.Softmax) and whole):
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


def check_documents(config: Any, segments_BT: Any) -> None:
  """Raises ValueError for documents that would see each other in their row.

  Args:
    config: a `TransformerConfig`.
    segments_BT: of the tokens; values that a compiled function is yet to be
      given are let pass.
  """
  for kind in config.kinds:
    if kind.mixes_rows:
      low_rank.check_documents(kind.kind, segments_BT)


def check_bidirectional(config: Any) -> None:
  """Raises ValueError for layers that cannot look to both sides."""
  for kind in config.kinds:
    if isinstance(kind, convolution.Convolution) and kind.width % 2 == 0:
      raise ValueError(
        f'attention.width={kind.width}: an encoder has as many taps on both '
        'sides of a token. Set it to an odd number.'
      )
