"""Random numbers that depend on an example's key and on nothing else.

A batch needs the same numbers however its rows are dealt to hosts, and a
generator object for every row would cost more than the masking. So each number
is a hash of (key, index): SplitMix64 (Steele et al., 2014), whose n-th output
is a function of n.
"""

import hashlib

import numpy as np

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: np.ndarray) -> np.ndarray:
  x = (x ^ (x >> np.uint64(30))) * _MIX_1
  x = (x ^ (x >> np.uint64(27))) * _MIX_2
  return x ^ (x >> np.uint64(31))


def keys(seed: int, indices: np.ndarray) -> np.ndarray:
  """Returns one uint64 key for each example index under `seed`."""
  seed_1 = np.array([seed % 2**64], np.uint64)
  return _mix(_mix(seed_1 + _GAMMA) + np.asarray(indices, np.uint64) * _GAMMA)


def named(seed: int, name: str) -> int:
  """Returns the seed of what is drawn under `name`, apart from other names."""
  digest = hashlib.sha256(name.encode()).digest()
  return int(keys(seed, np.frombuffer(digest[:8], np.uint64))[0])


def visited(keys_B: np.ndarray, visits_B: np.ndarray) -> np.ndarray:
  """Returns the keys of examples that are visited again and again.

  Args:
    keys_B: uint64, one an example, from `keys`.
    visits_B: how often each was visited before.
  """
  return _mix(keys_B + _mix(np.asarray(visits_B, np.uint64) * _GAMMA))


def uniform(keys_B: np.ndarray, num: int, *, stream: int = 0) -> np.ndarray:
  """Returns (B, num) float64 in [0, 1), a row for each key.

  Args:
    keys_B: (B,) uint64, from `keys`.
    num: numbers a row.
    stream: draws with different streams are independent.
  """
  stream_1 = np.array([stream + 1], np.uint64)
  keys_B = _mix(keys_B + _mix(stream_1 * _GAMMA))
  counter = np.arange(1, num + 1, dtype=np.uint64) * _GAMMA
  bits = _mix(keys_B[:, None] + counter[None])
  return (bits >> np.uint64(11)) * 2.0**-53
