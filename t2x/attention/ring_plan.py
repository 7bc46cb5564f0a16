"""Plans ring attention: the pairs of pieces that each device computes, by step.

C is the number of devices, T and S are the numbers of queries and keys of a
whole row.
"""

import dataclasses

import numpy as np

from t2x.attention import mask as mask_lib
from t2x.parallel import zigzag

NONE, SOME, ALL = 0, 1, 2  # How much of a pair of pieces is seen.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slot:
  """A pair of a query piece and a key piece on every device, in one step.

  Attributes:
    q_C: number of the query piece among those of each device.
    k_C: number of the key piece among those that visit each device.
    seen_C: `NONE`, `SOME` or `ALL`: how many keys of the pair are seen, by the
      order of tokens.
    diagonal: whether on every device both are the same part of the sequence.
  """

  q_C: np.ndarray
  k_C: np.ndarray
  seen_C: np.ndarray
  diagonal: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class RingStep:
  """A step of the ring.

  Attributes:
    shift: number of devices by which the visiting keys have moved.
    slots: pairs of pieces to compute.
  """

  shift: int
  slots: tuple[Slot, ...]


def plan(
  mask: mask_lib.Mask, num_queries: int, num_keys: int, num_devices: int
) -> list[RingStep]:
  """Returns the steps of a ring in which any query sees a key.

  Args:
    mask: mask whose pattern decides; its segments are not used.
    num_queries: number of queries in a whole row.
    num_keys: number of keys in a whole row.
    num_devices: number of devices C in the ring.
  """
  C = num_devices
  q_starts, q_size = stretches(num_queries, C, mask.q_zigzag)
  k_starts, k_size = stretches(num_keys, C, mask.k_zigzag)
  steps = []
  for shift in range(C):
    # For each device: (query piece, key piece, how much is seen).
    pairs = []
    for device in range(C):
      visible = []
      for q, q_start in enumerate(q_starts[device]):
        for k, k_start in enumerate(k_starts[(device - shift) % C]):
          seen = _seen(mask, q_start, q_size, k_start, k_size)
          if seen != NONE:
            visible.append((q, k, seen))
      pairs.append(visible)
    slots = _slots(pairs)
    same = shift == 0 and mask.q_zigzag == mask.k_zigzag
    same = same and num_queries == num_keys
    slots = tuple(
      dataclasses.replace(s, diagonal=same and (s.q_C == s.k_C).all())
      for s in slots
    )
    if slots:
      steps.append(RingStep(shift=shift, slots=slots))
  return steps


def stretches(
  length: int, num_devices: int, zigzagged: int
) -> tuple[np.ndarray, int]:
  """Returns the start of each device's pieces, (C, P), and their length.

  Args:
    length: number of tokens in a whole row.
    num_devices: number of devices C in the ring.
    zigzagged: number of devices over which tokens are in zigzag order: C, or 1
      for the order of the sequence.
  """
  if zigzagged == 1:
    size = length // num_devices
    return np.arange(num_devices)[:, None] * size, size
  assert zigzagged == num_devices, (zigzagged, num_devices)
  size = length // (2 * num_devices)
  return zigzag.pieces(num_devices).reshape(-1, 2) * size, size


def _seen(
  mask: mask_lib.Mask, q_start: int, q_size: int, k_start: int, k_size: int
) -> int:
  """Returns whether queries see `NONE`, `SOME` or `ALL` of some keys."""
  span = lambda start, size: (np.array(start), np.array(start + size - 1))
  some, every = mask.pattern.reach(span(q_start, q_size), span(k_start, k_size))
  return ALL if every else SOME if some else NONE


def _slots(pairs: list[list[tuple[int, int, int]]]) -> list[Slot]:
  """Combines the pairs of all devices; pairs that all have come first."""
  pieces = [{(q, k) for q, k, _ in visible} for visible in pairs]
  common = set.intersection(*pieces)
  ordered = [
    sorted(visible, key=lambda pair: (pair[:2] not in common, pair[:2]))
    for visible in pairs
  ]
  slots = []
  for i in range(max(map(len, ordered))):
    column = [f[i] if i < len(f) else (0, 0, NONE) for f in ordered]
    q_C, k_C, seen_C = (np.array(c) for c in zip(*column))
    slots.append(Slot(q_C=q_C, k_C=k_C, seen_C=seen_C, diagonal=False))
  return slots
