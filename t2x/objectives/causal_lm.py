"""Next-token prediction."""

import dataclasses
from typing import ClassVar

import numpy as np

from t2x import field_checks
from t2x.objectives import objective
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM(objective.Objective):
  """Predicts each token of a document from those before it.

  A row of `length` predictions needs `length + 1` tokens; neighbouring rows
  share one token, so that every token is a target exactly once.

  Attributes:
    ahead: heads that predict tokens further ahead, the second, the third, ...;
      as many as the model's (`model.ahead`).
  """

  ahead: int = 0

  kind: ClassVar[str] = 'causal_lm'

  @property
  def num_ahead(self) -> int:
    return self.ahead

  def __post_init__(self):
    field_checks.least(self, 'data.objective.', ahead=0)

  def source_length(self, length: int) -> int:
    """Raw tokens that one row of `length` is made from."""
    return length + 1

  def stride(self, length: int) -> int:
    """Raw tokens from the start of one row to the start of the next."""
    return length

  def lengths(self, length: int) -> dict[str, int]:
    """How long the arrays of a batch are, by name."""
    names = [f'{name}_{what}' for name in self._names for what in _ARRAYS]
    return rows_lib.lengths(length) | dict.fromkeys(names, length)

  @property
  def _names(self) -> list[str]:
    return [ahead_name(i) for i in range(self.ahead)]

  def examples(
    self,
    source: rows_lib.Rows,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the batch of `source`, whose rows hold `length + 1` tokens.

    A target in another document than its input has weight 0, so the start of
    a document is never predicted from the end of another.
    """
    del keys, vocab, length  # Nothing is random here.
    tokens, segments = source
    is_inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] != 0)
    batch = {
      'inputs': tokens[:, :-1],
      'targets': tokens[:, 1:],
      'weights': is_inside.astype(np.float32),
      'segments': segments[:, :-1],
      'positions': rows_lib.positions(segments[:, :-1]),
    }
    weights = batch['weights']
    for i, name in enumerate(self._names, start=1):
      # Every token on the way there is of the same document.
      weights = weights * _shifted(batch['weights'], i)
      batch[f'{name}_targets'] = _shifted(batch['targets'], i)
      batch[f'{name}_weights'] = weights
    return batch


_ARRAYS = 'targets', 'weights'


def ahead_name(number: int) -> str:
  """Returns the name of a further head: `ahead2` predicts the second token."""
  return f'ahead{number + 2}'


def _shifted(a_BT: np.ndarray, by: int) -> np.ndarray:
  """Moves rows to the left; zeros follow."""
  return np.pad(a_BT, ((0, 0), (0, by)))[:, by:]
