"""The heads of a device under sequence parallelism, which may be some of all.

Shape suffixes: B batch, S key position, K key/value heads, G query heads per
key/value head, H head dim.
"""

import jax
import jax.numpy as jnp

from t2x.layers import attention_config
from t2x.parallel import manual_sharding
from t2x.parallel import sharding


def key_heads(config: attention_config.Heads, num: int, num_kv: int) -> int:
  """Returns the number of key/value heads that a device's query heads use.

  Args:
    config: config of the layer.
    num: number of neighbouring query heads on a device.
    num_kv: number of key/value heads on the device.

  Raises:
    ShardingError: the query heads are parts of several groups, or use heads
      that the device does not have.
  """
  group = config.num_heads // config.kv_heads
  needed = max(num // group, 1)
  if (num % group and group % num) or needed > num_kv:
    raise sharding.ShardingError(
      f'Under sequence parallelism a device has {num} of attention.num_heads='
      f'{config.num_heads} and {num_kv} of attention.num_kv_heads='
      f'{config.kv_heads}, of which each serves {group} query heads: those '
      'that a device has must be some whole groups, or lie within one, and '
      'their key/value heads be there. Choose another mesh.tensor, the same '
      'axes for rules.heads and rules.kv_heads, or rules.norm_length=context.'
    )
  return needed


def numbers(config: attention_config.Heads) -> jax.Array:
  """Returns the numbers of this device's query heads among all, (K, G)."""
  start, num = manual_sharding.manual_part('heads', config.num_heads)
  group = config.num_heads // config.kv_heads
  return (start + jnp.arange(num)).reshape(-1, min(group, num))


def used_key_heads(
  x_BSKH: jax.Array, config: attention_config.Heads
) -> jax.Array:
  """Returns the key/value heads that this device's query heads use.

  Inside `sequence_parallel.run` a device may have some of the query heads and,
  by `rules.kv_heads`, all key/value heads.

  Args:
    x_BSKH: keys or values of the heads on this device.
    config: config of the layer.
  """
  start, num = manual_sharding.manual_part('heads', config.num_heads)
  _, num_kv = manual_sharding.manual_part('kv_heads', config.kv_heads)
  needed = key_heads(config, num, num_kv)
  if needed == num_kv:
    return x_BSKH
  first = start // (config.num_heads // config.kv_heads)
  return jax.lax.dynamic_slice_in_dim(x_BSKH, first, needed, axis=2)
