"""The zigzag order of a row's tokens, which balances causal attention.

A causal query sees all that came before it, so of a row cut into pieces the
last costs most. Cut into twice as many pieces as there are devices, with piece
i and piece 2 n - 1 - i on device i, every device has the same work (Brandon et
al., 2023, "Striped attention", has the idea; the two-piece form is that of
Llama 3's context parallelism, 2024).
"""

import numpy as np


def pieces(num_devices: int) -> np.ndarray:
  """Returns the pieces of a row in the order of the arrays, (2 n,)."""
  early = np.arange(num_devices)
  return np.stack([early, 2 * num_devices - 1 - early], 1).reshape(-1)


def index(length: int, num_devices: int) -> np.ndarray:
  """Returns the place in its sequence of each token of the arrays.

  Args:
    length: tokens of a row, a multiple of 2 x num_devices.
    num_devices: that share a row; 1 is the natural order 0, 1, 2, ...
  """
  if num_devices == 1:
    return np.arange(length)
  return (
    np.arange(length)
    .reshape(2 * num_devices, -1)[pieces(num_devices)]
    .reshape(-1)
  )
