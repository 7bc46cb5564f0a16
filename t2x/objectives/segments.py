"""Where the documents of a row start.

Shape suffixes: B rows, T tokens of a row.
"""

import numpy as np


def starts(segments_BT: np.ndarray) -> np.ndarray:
  """Returns the tokens at which a segment begins, padding's too, (B, T)."""
  is_start_BT = np.ones(segments_BT.shape, bool)
  is_start_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
  return is_start_BT
