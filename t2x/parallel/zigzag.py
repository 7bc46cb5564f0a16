"""The zigzag order of a row's tokens, which balances causal attention.

A causal query attends to all earlier tokens, so the last piece of a row costs
most. If the row is cut into twice as many pieces as there are devices, n, and
device i has the pieces i and 2 n - 1 - i, every device has the same work. The
idea is that of "Striped attention" (Brandon et al., 2023); the form with two
pieces is that of context parallelism in Llama 3 (2024).
"""

import numpy as np


def pieces(num_devices: int) -> np.ndarray:
  """Returns the indices of a row's pieces in zigzag order, (2 n,).

  Args:
    num_devices: n, the number of devices that share a row.
  """
  early = np.arange(num_devices)
  return np.stack([early, 2 * num_devices - 1 - early], 1).reshape(-1)


def index(length: int, num_devices: int) -> np.ndarray:
  """Returns the position in its row of each token in zigzag order, (length,).

  Args:
    length: number of tokens of a row, a multiple of 2 x num_devices.
    num_devices: number of devices that share a row; 1 gives 0, 1, 2, ...
  """
  if num_devices == 1:
    return np.arange(length)
  return (
    np.arange(length)
    .reshape(2 * num_devices, -1)[pieces(num_devices)]
    .reshape(-1)
  )
