"""Position encodings against their papers, one number at a time."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from t2x.layers import position


def scalar_bucket(relative, num, farthest, bidirectional):
  """Raffel et al., 2020, section 2.1, as the released code has it."""
  base = 0
  if bidirectional:
    num //= 2
    base = num if relative > 0 else 0
    distance = abs(relative)
  else:
    distance = max(-relative, 0)
  exact = num // 2
  if distance < exact:
    return base + distance
  part = math.log(distance / exact) / math.log(farthest / exact)
  return base + min(exact + int(part * (num - exact) + 1e-6), num - 1)


@pytest.mark.parametrize('bidirectional', [False, True])
@pytest.mark.parametrize('num,farthest', [(32, 128), (8, 20)])
def test_t5_buckets(num, farthest, bidirectional):
  config = position.RelativeBuckets(num_buckets=num, max_distance=farthest)
  relative = np.arange(-300, 301)
  got = np.asarray(
    position.bucket(jnp.asarray(relative), config, bidirectional)
  )
  want = [scalar_bucket(int(r), num, farthest, bidirectional) for r in relative]
  np.testing.assert_array_equal(got, want)
  assert got.min() == 0 and got.max() == num - 1


def frequencies(config, size):
  """One frequency at a time; Llama 3's scaling as its release defines it."""
  result = []
  for i in range(size // 2):
    frequency = config.base ** (-2 * i / size)
    scaling = config.scaling
    if scaling is not None:
      turns = scaling.original_length * frequency / (2 * math.pi)
      low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
      if turns < low:
        frequency /= scaling.factor
      elif turns <= high:
        mix = (turns - low) / (high - low)
        frequency *= mix + (1 - mix) / scaling.factor
    result.append(frequency)
  return np.array(result)


ROTARIES = {
  'half': position.Rotary(),
  'interleaved': position.Rotary(style='interleaved', base=500.0),
  'part': position.Rotary(fraction=0.5),
  'llama 3': position.Rotary(
    base=1000.0,
    scaling=position.Llama3Scaling(original_length=64),
  ),
}


@pytest.mark.parametrize('name', ROTARIES)
def test_rotary_is_a_complex_product(name):
  config = ROTARIES[name]
  H = 16
  size = int(H * config.fraction)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 5, 3, H)).astype(np.float32)
  positions = rng.integers(0, 90, (2, 5))
  turned = np.array(x, np.float64)
  part = turned[..., :size]
  if config.style == 'half':
    pairs = part[..., : size // 2] + 1j * part[..., size // 2 :]
  else:
    pairs = part[..., 0::2] + 1j * part[..., 1::2]
  angle = positions[..., None] * frequencies(config, size)
  pairs = pairs * np.exp(1j * angle)[:, :, None]
  if config.style == 'half':
    turned[..., :size] = np.concatenate([pairs.real, pairs.imag], -1)
  else:
    turned[..., 0:size:2], turned[..., 1:size:2] = pairs.real, pairs.imag
  got = position.rotate(jnp.asarray(x), jnp.asarray(positions), config)
  np.testing.assert_allclose(got, turned, atol=2e-4)
  # Not the identity, and position 0 is not turned.
  assert np.abs(turned - x)[..., :size].max() > 1
  still = position.rotate(
    jnp.asarray(x), jnp.zeros_like(jnp.asarray(positions)), config
  )
  np.testing.assert_array_equal(still, x)


def test_llama3_scaling_has_three_regimes():
  scaled, plain = (
    np.array(frequencies(config, 16))
    for config in (ROTARIES['llama 3'], position.Rotary(base=1000.0))
  )
  ratio = scaled / plain
  assert ratio[0] == 1 and ratio[-1] == 1 / 8
  assert ((ratio > 1 / 8) & (ratio < 1)).any()


def test_rotary_scores_depend_on_distance_only():
  rng = np.random.default_rng(0)
  q, k = (
    jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2)
  )
  turn = lambda x, at: position.rotate(
    x, jnp.full((1, 1), at), ROTARIES['half']
  )
  score = lambda a, b: float((turn(q, a) * turn(k, b)).sum())
  assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-3)
  assert abs(score(7, 3) - score(3, 7)) > 1e-2


def test_sinusoidal():
  """sin and cos of pos / 10000^(i / (D/2 - 1)), as tensor2tensor has it."""
  size = 10
  got = position.sinusoidal(jnp.asarray([[0, 1, 40]]), size)
  for row, at in enumerate((0, 1, 40)):
    for i in range(size // 2):
      angle = at / 10000 ** (i / (size // 2 - 1))
      assert got[0, row, i] == pytest.approx(math.sin(angle), abs=1e-5)
      assert got[0, row, i + 5] == pytest.approx(math.cos(angle), abs=1e-5)


def test_alibi_slopes():
  """Press et al., 2022, section 3, and its released code beyond powers."""
  assert position.alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
  assert position.alibi_slopes(16)[:3] == [2**-0.5, 2**-1, 2**-1.5]
  # 12 heads: those of 8, then every other of 16.
  assert position.alibi_slopes(12) == pytest.approx(
    [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
  )


def test_alibi_bias():
  relative = jnp.asarray([[0, 1], [-1, 0], [-2, -1]])
  bias = position.AlibiBias(2)(relative)
  assert bias.shape == (2, 3, 2)
  np.testing.assert_allclose(bias[0], -np.abs(np.asarray(relative)) * 2.0**-4)
  np.testing.assert_allclose(bias[1], -np.abs(np.asarray(relative)) * 2.0**-8)
