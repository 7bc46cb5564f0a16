"""Which heads a device has, where it has a part of them.

Shape suffixes: B batch, S key position, K key/value heads, G query heads per
key/value head, H head dim.
"""

import jax
import jax.numpy as jnp

from t2x.layers import attention_config
from t2x.parallel import manual_sharding
from t2x.parallel import sharding


def key_heads(config: attention_config.Heads, num: int, held: int) -> int:
  """Returns how many key/value heads some neighbouring query heads look at.

  Args:
    config: of the layer.
    num: query heads that a device has under sequence parallelism.
    held: key/value heads that it has.

  Raises:
    ShardingError: they are not among those that the device has, or parts of
      groups.
  """
  group = config.num_heads // config.kv_heads
  needed = max(num // group, 1)
  if (num % group and group % num) or needed > held:
    raise sharding.ShardingError(
      f'Under sequence parallelism a device has {num} of attention.num_heads='
      f'{config.num_heads} and {held} of attention.num_kv_heads='
      f'{config.kv_heads}, of which each serves {group} query heads: those '
      'that a device has must be some whole groups, or lie within one, and '
      'their key/value heads be there. Choose another mesh.tensor, the same '
      'axes for rules.heads and rules.kv_heads, or rules.norm_length=context.'
    )
  return needed


def numbers(config: attention_config.Heads) -> jax.Array:
  """Returns the numbers of this device's query heads, (K, G)."""
  start, num = manual_sharding.manual_part('heads', config.num_heads)
  group = config.num_heads // config.kv_heads
  return (start + jnp.arange(num)).reshape(-1, min(group, num))


def met(x_BSKH: jax.Array, config: attention_config.Heads) -> jax.Array:
  """Returns the key/value heads that this device's query heads look at.

  Inside `sequence_parallel.run` a device may have part of the query heads and,
  by `rules.kv_heads`, all key/value heads.
  """
  start, num = manual_sharding.manual_part('heads', config.num_heads)
  _, held = manual_sharding.manual_part('kv_heads', config.kv_heads)
  needed = key_heads(config, num, held)
  if needed == held:
    return x_BSKH
  first = start // (config.num_heads // config.kv_heads)
  return jax.lax.dynamic_slice_in_dim(x_BSKH, first, needed, axis=2)
