"""The starts of the documents in a row.

Shape suffixes: B rows, T tokens of a row.
"""

import numpy as np


def starts(segments_BT: np.ndarray) -> np.ndarray:
  """Returns a mask of the tokens that begin a segment or padding, (B, T)."""
  is_start_BT = np.ones(segments_BT.shape, bool)
  is_start_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
  return is_start_BT
