"""Position encodings: sinusoidal, learned, rotary, T5 buckets, ALiBi.

Shape suffixes: B batch, T query position, S key position, D embed, N heads, H
head dim, R relative buckets, P positions.
"""

import dataclasses
import math
from typing import ClassVar
from typing import Literal

from flax import nnx
import jax
import jax.numpy as jnp

from t2x import field_checks
from t2x.layers import param
from t2x.parallel import manual_sharding
from t2x.parallel import sharding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sinusoidal:
  """Sines and cosines added to the embeddings (Vaswani et al., 2017)."""

  kind: ClassVar[str] = 'sinusoidal'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
  """A learned vector for each position, added to the embeddings.

  Attributes:
    max_length: number of positions.
    std: standard deviation of the initial vectors.
    offset: number of unused rows before the first position (RoBERTa counts
      positions from 2).
  """

  kind: ClassVar[str] = 'learned'
  max_length: int = 1024
  std: float = 0.02
  offset: int = 0

  def __post_init__(self) -> None:
    field_checks.least(self, 'position.', max_length=1, offset=0, std=0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
  """Lowers the low rotary frequencies for longer contexts (Llama 3, 2024).

  Attributes:
    factor: divisor of low frequencies.
    low_frequency_factor: number of periods in `original_length` below which
      frequencies are divided.
    high_frequency_factor: number of periods in `original_length` above which
      frequencies stay as they are; between the two they are interpolated.
    original_length: number of positions before the context was extended.
  """

  kind: ClassVar[str] = 'llama3'
  factor: float = 8.0
  low_frequency_factor: float = 1.0
  high_frequency_factor: float = 4.0
  original_length: int = 8192

  def __post_init__(self) -> None:
    names = [f.name for f in dataclasses.fields(self)]
    field_checks.positive(self, 'position.scaling.', *names)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rotary:
  """Queries and keys rotated by their position (Su et al., 2021).

  Attributes:
    base: base of the frequencies.
    style: pairing of entries; `half` pairs entry i with i + H/2 (Llama),
      `interleaved` pairs neighbours (the paper, PaLM).
    fraction: share of the head dim that is rotated.
    scaling: change of the frequencies for longer contexts; None is none.
  """

  kind: ClassVar[str] = 'rotary'
  base: float = 10000.0
  style: Literal['half', 'interleaved'] = 'half'
  fraction: float = 1.0
  scaling: Llama3Scaling | None = None

  def __post_init__(self) -> None:
    field_checks.positive(self, 'position.', 'base', 'fraction')

  def rotated(self, head_dim: int) -> int:
    """Returns the number of entries of a head that are rotated, an even one.

    Args:
      head_dim: head dim H.

    Raises:
      ValueError: the number is odd, 0, or larger than `head_dim`.
    """
    size = int(head_dim * self.fraction)
    if size % 2 or not 0 < size <= head_dim:
      raise ValueError(
        f'position.fraction={self.fraction} of attention.head_dim={head_dim} '
        f'rotates {size} entries; rotary positions turn pairs, so this must be '
        f'an even number from 2 to {head_dim}.'
      )
    return size


@dataclasses.dataclass(frozen=True, kw_only=True)
class RelativeBuckets:
  """A learned bias of the scores by head and bucket of distance (T5).

  Raffel et al., 2020, section 2.1.

  Attributes:
    num_buckets: number of buckets.
    max_distance: distance from which on all keys share one bucket.
  """

  kind: ClassVar[str] = 'relative'
  num_buckets: int = 32
  max_distance: int = 128

  def __post_init__(self) -> None:
    field_checks.least(self, 'position.', num_buckets=4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alibi:
  """A fixed bias of the scores, linear in the distance (Press et al., 2022)."""

  kind: ClassVar[str] = 'alibi'


PositionConfig = Sinusoidal | Learned | Rotary | RelativeBuckets | Alibi


def is_bias(config: PositionConfig) -> bool:
  """Returns whether positions are a bias of the attention scores."""
  return isinstance(config, RelativeBuckets | Alibi)


def is_absolute(config: PositionConfig | None) -> bool:
  """Returns whether positions are added to the token embeddings."""
  return isinstance(config, Learned | Sinusoidal)


class LearnedPositions(nnx.Module):
  """A table of position vectors."""

  def __init__(
    self,
    config: Learned,
    embed: int,
    *,
    distribution: str = 'normal',
    rngs: nnx.Rngs,
  ):
    self.config = config
    init = param.make_initializer(distribution, config.std)
    shape = (config.max_length + config.offset, embed)
    self.table_PD = param.param(rngs, shape, (None, 'embed'), init)

  def __call__(
    self, positions_BT: jax.Array, dtype: jax.typing.DTypeLike
  ) -> jax.Array:
    """Returns the vectors of positions, (B, T, D), in `dtype`."""
    rows_BT = positions_BT + self.config.offset
    # Whole before the look-up, as the token table: see layers/embed.py.
    whole = lambda table_PD: sharding.constrain(table_PD, None, 'act_embed')
    if not manual_sharding.in_stage():
      return param.look_up(whole(self.table_PD[...].astype(dtype)), rows_BT)
    # Each device sums the gradients of its own rows, and the sums are added in
    # float32. The partitioner would gather the gradients of all rows here.
    look_up = lambda table_PD, rows: param.look_up(table_PD, rows).astype(dtype)
    return manual_sharding.on_rows(look_up, whole(self.table_PD[...]), rows_BT)


def sinusoidal(positions_BT: jax.Array, size: int) -> jax.Array:
  """Returns sinusoidal positions: sines of all frequencies, then cosines.

  Vaswani et al., 2017, section 3.5. The paper interleaves sines and cosines,
  which is a permutation of this; its released code has the two halves.

  Args:
    positions_BT: positions.
    size: width of the result.

  Returns:
    (B, T, size), float32.
  """
  half = size // 2
  step = math.log(10000.0) / max(half - 1, 1)
  frequency_F = jnp.exp(-step * jnp.arange(half))
  angle = positions_BT[..., None] * frequency_F[None, None]
  return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)


def rotate(
  x_BTNH: jax.Array, positions_BT: jax.Array | None, config: Rotary
) -> jax.Array:
  """Rotates queries or keys by their positions.

  Args:
    x_BTNH: queries or keys.
    positions_BT: positions; None is 0, 1, 2, ...
    config: the rotary encoding.
  """
  if positions_BT is None:
    positions_BT = jnp.arange(x_BTNH.shape[1])[None]
  size = config.rotated(x_BTNH.shape[-1])
  angle = positions_BT[..., None] * _frequencies(config, size)[None, None]
  cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]
  x, rest = x_BTNH[..., :size].astype(jnp.float32), x_BTNH[..., size:]
  if config.style == 'half':
    a, b = jnp.split(x, 2, -1)
    out = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
  else:
    a, b = x[..., 0::2], x[..., 1::2]
    pairs = jnp.stack([a * cos - b * sin, b * cos + a * sin], -1)
    out = pairs.reshape(x.shape)
  return jnp.concatenate([out.astype(x_BTNH.dtype), rest], -1)


def _frequencies(config: Rotary, size: int) -> jax.Array:
  frequency = config.base ** (-jnp.arange(0, size, 2) / size)
  s = config.scaling
  if s is None:
    return frequency
  wavelength = 2 * math.pi / frequency
  low = s.original_length / s.low_frequency_factor
  high = s.original_length / s.high_frequency_factor
  # 0 below the low frequency, 1 above the high one, a ramp between.
  mix = (s.original_length / wavelength - s.low_frequency_factor) / (
    s.high_frequency_factor - s.low_frequency_factor
  )
  ramp = (1 - mix) * frequency / s.factor + mix * frequency
  slow = jnp.where(wavelength > low, frequency / s.factor, ramp)
  return jnp.where(wavelength < high, frequency, slow)


class RelativeBias(nnx.Module):
  """T5's bias of the scores, which all layers of a stack share."""

  def __init__(
    self,
    config: RelativeBuckets,
    num_heads: int,
    *,
    bidirectional: bool,
    std: float,
    rngs: nnx.Rngs,
  ):
    exact = config.num_buckets // (4 if bidirectional else 2)
    if config.max_distance <= exact:
      raise ValueError(
        f'position.max_distance={config.max_distance} must be above the '
        f'{exact} distances that position.num_buckets={config.num_buckets} '
        'tells apart exactly.'
      )
    self.config = config
    self.bidirectional = bidirectional
    shape = (config.num_buckets, num_heads)
    init = param.make_initializer('normal', std)
    self.table_RN = param.param(rngs, shape, (None, 'heads'), init)

  def __call__(self, relative: jax.Array) -> jax.Array:
    """Maps key minus query index, (..., T, S), to (..., N, T, S)."""
    buckets = bucket(relative, self.config, self.bidirectional)
    return jnp.moveaxis(self.table_RN[...][buckets], -1, -3)


def bucket(
  relative: jax.Array, config: RelativeBuckets, bidirectional: bool
) -> jax.Array:
  """Returns the bucket of each distance: exact if near, logarithmic if far.

  Args:
    relative: key index minus query index.
    config: numbers of buckets and distances.
    bidirectional: whether later keys have buckets of their own; else they are
      in the bucket of distance 0.
  """
  num = config.num_buckets
  start = jnp.zeros_like(relative)
  if bidirectional:
    num //= 2
    start = jnp.where(relative > 0, num, 0)
    distance = jnp.abs(relative)
  else:
    distance = jnp.maximum(-relative, 0)
  exact = num // 2
  # max() keeps the log finite where the exact branch is taken anyway.
  ratio = jnp.maximum(distance, 1) / exact
  scale = (num - exact) / math.log(config.max_distance / exact)
  far = exact + (jnp.log(ratio) * scale).astype(relative.dtype)
  far = jnp.minimum(far, num - 1)
  return start + jnp.where(distance < exact, distance, far)


class AlibiBias(nnx.Module):
  """ALiBi's bias of the scores: minus the distance times a slope per head."""

  def __init__(self, num_heads: int):
    self.num_heads = num_heads

  def __call__(self, relative: jax.Array) -> jax.Array:
    """Maps key minus query index, (..., T, S), to (..., N, T, S)."""
    start, num = manual_sharding.manual_part('heads', self.num_heads)
    slopes = jnp.asarray(alibi_slopes(self.num_heads))
    slopes = jax.lax.dynamic_slice_in_dim(slopes, start, num)
    slopes = slopes.reshape((1,) * (relative.ndim - 2) + (-1, 1, 1))
    return -slopes * jnp.abs(relative)[..., None, :, :].astype(jnp.float32)


def alibi_slopes(num_heads: int) -> list[float]:
  """Returns the slopes of ALiBi, a geometric sequence.

  Heads beyond a power of two have slopes between the others, as in the paper's
  code.
  """
  power = 2 ** int(math.log2(num_heads))
  slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
  between = [2 ** (-4 * (i + 1) / power) for i in range(2 * power)]
  return slopes + between[0::2][: num_heads - power]
