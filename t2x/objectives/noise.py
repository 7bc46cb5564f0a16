"""Random numbers that depend on nothing but an example's key.

A batch must have the same numbers however its rows are distributed over hosts,
and a generator object for every row would cost more than the masking. So each
number is a hash of (key, index): SplitMix64 (Steele et al., 2014), whose n-th
output is a function of n.
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
  """Returns one uint64 key for each example's index, under a seed."""
  seed_1 = np.array([seed % 2**64], np.uint64)
  return _mix(_mix(seed_1 + _GAMMA) + np.asarray(indices, np.uint64) * _GAMMA)


def seed_of_name(seed: int, name: str) -> int:
  """Returns a seed for a named purpose, independent of that of other names."""
  digest = hashlib.sha256(name.encode()).digest()
  return int(keys(seed, np.frombuffer(digest[:8], np.uint64))[0])


def keys_of_visits(keys_B: np.ndarray, visits_B: np.ndarray) -> np.ndarray:
  """Returns keys that differ each time that an example is read.

  Args:
    keys_B: uint64 keys of the examples, from `keys`.
    visits_B: number of times that each example was read before.
  """
  return _mix(keys_B + _mix(np.asarray(visits_B, np.uint64) * _GAMMA))


def uniform(keys_B: np.ndarray, num: int, *, stream: int = 0) -> np.ndarray:
  """Returns uniform float64 numbers in [0, 1), (B, num).

  Args:
    keys_B: uint64 keys of the examples, from `keys`.
    num: number of draws for each key.
    stream: number of the stream; different streams are independent.
  """
  stream_1 = np.array([stream + 1], np.uint64)
  keys_B = _mix(keys_B + _mix(stream_1 * _GAMMA))
  counter = np.arange(1, num + 1, dtype=np.uint64) * _GAMMA
  bits = _mix(keys_B[:, None] + counter[None])
  return (bits >> np.uint64(11)) * 2.0**-53
