"""Models of other sizes: the same shape, wider or deeper."""

import dataclasses
from typing import TypeVar

from t2x.layers import attention_kinds
from t2x.layers import moe
from t2x.models import common

Config = TypeVar('Config', bound=common.TransformerConfig)


def with_width(config: Config, width: int) -> Config:
  """Returns a model of another width, whose other widths grow with it.

  There are more heads of the same size, and feed-forward layers keep their
  ratio to `embed_dim`.

  Args:
    config: settings of the model.
    width: `embed_dim` of the result.

  Raises:
    ValueError: heads or feed-forward layers would not be whole.
  """

  def scaled(part: object, name: str, of: str) -> int:
    size, rest = divmod(getattr(part, name) * width, config.embed_dim)
    if rest or not size:
      raise ValueError(
        f'embed_dim={width} is {width / config.embed_dim:g} times that of the '
        f'model, and {of}.{name}={getattr(part, name)} does not become whole. '
        'Choose another width.'
      )
    return size

  def attention(
    part: attention_kinds.AttentionConfig,
  ) -> attention_kinds.AttentionConfig:
    heads = {'num_heads': scaled(part, 'num_heads', 'attention')}
    if part.num_kv_heads is not None:
      # One that all heads share stays one.
      shared = part.num_kv_heads == 1
      number = 1 if shared else scaled(part, 'num_kv_heads', 'attention')
      heads['num_kv_heads'] = number
    return dataclasses.replace(part, **heads)

  def mlp(part: moe.FeedForwardConfig) -> moe.FeedForwardConfig:
    return dataclasses.replace(part, hidden=scaled(part, 'hidden', 'mlp'))

  return dataclasses.replace(
    config,
    embed_dim=width,
    attention=attention(config.attention),
    attention_pattern=tuple(map(attention, config.attention_pattern)),
    mlp=mlp(config.mlp),
    mlp_pattern=tuple(map(mlp, config.mlp_pattern)),
  )
