import numpy as np

from t2x.objectives import noise


def test_rows_depend_on_their_key_alone():
  keys = noise.keys(3, np.arange(10))
  whole = noise.uniform(keys, 7)
  np.testing.assert_array_equal(whole[4:6], noise.uniform(keys[4:6], 7))
  np.testing.assert_array_equal(whole[:, :3], noise.uniform(keys, 3))


def test_keys_and_streams_differ():
  draws = [
    noise.uniform(noise.keys(seed, np.arange(4)), 50, stream=stream)
    for seed in (0, 1)
    for stream in (0, 1)
  ]
  assert len(np.unique(np.concatenate(draws))) == 4 * 4 * 50


def test_numbers_are_uniform_and_independent():
  x = noise.uniform(noise.keys(0, np.arange(400)), 500)
  assert x.min() >= 0 and x.max() < 1
  counts, _ = np.histogram(x, bins=20, range=(0, 1))
  chi_squared = ((counts - x.size / 20) ** 2 / (x.size / 20)).sum()
  assert chi_squared < 50  # 19 degrees of freedom; p < 1e-4 beyond.
  for a, b in ((x[:, 1:], x[:, :-1]), (x[1:], x[:-1])):
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01
