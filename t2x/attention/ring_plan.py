"""What a ring computes at each step, known before anything runs.

C is the number of devices, T and S are the queries and keys of a whole row.
"""

import dataclasses

import numpy as np

from t2x.attention import mask as mask_lib
from t2x.parallel import zigzag

NONE, SOME, ALL = 0, 1, 2  # How much of a pair of pieces is seen.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
  """A pair of a query piece and a key piece, on every device at one step.

  Attributes:
    q_C: the query piece of each device, by its number on the device.
    k_C: the key piece of the visitor.
    seen_C: nothing, something or everything, by the order of tokens.
    diagonal: everywhere the two are the same stretch of the sequence.
  """

  q_C: np.ndarray
  k_C: np.ndarray
  seen_C: np.ndarray
  diagonal: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """What is computed while the visitor comes from `shift` devices before."""

  shift: int
  slots: tuple[Slot, ...]


def plan(
  mask: mask_lib.Mask, num_queries: int, num_keys: int, num_devices: int
) -> list[Step]:
  """Returns the steps of a ring in which something is seen.

  Args:
    mask: its order of tokens; segments are looked at when it runs.
    num_queries: of a whole row.
    num_keys: of a whole row.
    num_devices: C.
  """
  C = num_devices
  q_starts, q_size = stretches(num_queries, C, mask.q_zigzag)
  k_starts, k_size = stretches(num_keys, C, mask.k_zigzag)
  steps = []
  for shift in range(C):
    pairs = []  # Of each device: (query piece, key piece, how much is seen).
    for device in range(C):
      found = []
      for q, q_start in enumerate(q_starts[device]):
        for k, k_start in enumerate(k_starts[(device - shift) % C]):
          seen = _seen(mask, q_start, q_size, k_start, k_size)
          if seen != NONE:
            found.append((q, k, seen))
      pairs.append(found)
    slots = _slots(pairs)
    same = shift == 0 and mask.q_zigzag == mask.k_zigzag
    same = same and num_queries == num_keys
    slots = tuple(
      dataclasses.replace(s, diagonal=same and (s.q_C == s.k_C).all())
      for s in slots
    )
    if slots:
      steps.append(Step(shift=shift, slots=slots))
  return steps


def stretches(length, num_devices, zigzagged):
  """Returns where each device's pieces start, (C, P), and their length."""
  if zigzagged == 1:
    size = length // num_devices
    return np.arange(num_devices)[:, None] * size, size
  assert zigzagged == num_devices, (zigzagged, num_devices)
  size = length // (2 * num_devices)
  return zigzag.pieces(num_devices).reshape(-1, 2) * size, size


def _seen(mask, q_start, q_size, k_start, k_size) -> int:
  """How much queries from `q_start` see of keys from `k_start`, by order."""
  span = lambda start, size: (np.array(start), np.array(start + size - 1))
  some, every = mask.pattern.reach(span(q_start, q_size), span(k_start, k_size))
  return ALL if every else SOME if some else NONE


def _slots(pairs) -> list[Slot]:
  """Lines up the pairs of all devices; those that all have come first."""
  places = [{(q, k) for q, k, _ in found} for found in pairs]
  common = set.intersection(*places)
  ordered = [
    sorted(found, key=lambda pair: (pair[:2] not in common, pair[:2]))
    for found in pairs
  ]
  slots = []
  for i in range(max(map(len, ordered))):
    column = [f[i] if i < len(f) else (0, 0, NONE) for f in ordered]
    q_C, k_C, seen_C = (np.array(c) for c in zip(*column))
    slots.append(Slot(q_C=q_C, k_C=k_C, seen_C=seen_C, diagonal=False))
  return slots
