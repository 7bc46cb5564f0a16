"""Merges arrays of released checkpoints as `transformers` has them."""

from collections.abc import Mapping
import re

import numpy as np

_EXPERT = re.compile(r'(.*)block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight')


def merge_weights(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Merges the experts' arrays, which Mixtral's released files keep apart.

  There w1 is the gate projection, w3 the up projection and w2 the down
  projection. Arrays of other families are returned as they are.

  Args:
    tensors: weights of a checkpoint by name.

  Raises:
    ValueError: some weights of an expert are missing.
  """
  experts: dict[str, dict[str, dict[int, np.ndarray]]] = {}
  result = {}
  for name, tensor in tensors.items():
    match = _EXPERT.fullmatch(name)
    if match:
      before, number, part = match.groups()
      parts = experts.setdefault(before, {'w1': {}, 'w2': {}, 'w3': {}})
      parts[part][int(number)] = tensor
    else:
      result[name.replace('block_sparse_moe.gate', 'mlp.gate')] = tensor
  for before, parts in experts.items():
    if len({tuple(sorted(part)) for part in parts.values()}) > 1:
      raise ValueError(
        f'{before}block_sparse_moe.experts: not every expert has w1, w2 and '
        'w3. Read all files of the checkpoint.'
      )
    stack = lambda part: np.stack([part[i] for i in sorted(part)])
    gate, down, up = (stack(parts[name]) for name in ('w1', 'w2', 'w3'))
    result[f'{before}mlp.experts.gate_up_proj'] = np.concatenate([gate, up], 1)
    result[f'{before}mlp.experts.down_proj'] = down
  return result
