"""Next-token prediction, the objective of decoder-only language models."""

import dataclasses
from typing import ClassVar

import numpy as np

from t2x import field_checks
from t2x.objectives import objective
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class CausalLM(objective.Objective):
  """Predicts each token of a document from the tokens before it.

  A row of `length` predictions needs `length + 1` tokens. Neighbouring rows
  share one token, so that every token is a target exactly once.

  Attributes:
    ahead: number of extra heads, which predict the second next token, the third
      next, and so on; equal to the model's (`model.ahead`).
  """

  ahead: int = 0

  kind: ClassVar[str] = 'causal_lm'

  @property
  def num_ahead(self) -> int:
    return self.ahead

  def __post_init__(self) -> None:
    field_checks.least(self, 'data.objective.', ahead=0)

  def source_length(self, length: int) -> int:
    """Returns the number of raw tokens that a row of `length` is made from."""
    return length + 1

  def stride(self, length: int) -> int:
    """Returns the number of raw tokens between the starts of two rows."""
    return length

  def lengths(self, length: int) -> dict[str, int]:
    """Returns the length of a row in each array of a batch, by name."""
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
    """Returns the batch made from rows of `length + 1` tokens.

    A target in another document than its input has weight 0, so the start of a
    document is never predicted from the end of another.
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
      # Every token up to the target is in the same document.
      weights = weights * _shifted(batch['weights'], i)
      batch[f'{name}_targets'] = _shifted(batch['targets'], i)
      batch[f'{name}_weights'] = weights
    return batch


_ARRAYS = 'targets', 'weights'


def ahead_name(number: int) -> str:
  """Returns the name of an extra head.

  Args:
    number: number of the extra head, from 0; head 0 is `ahead2`, which predicts
      the second next token.
  """
  return f'ahead{number + 2}'


def _shifted(a_BT: np.ndarray, by: int) -> np.ndarray:
  """Shifts rows to the left by `by` places and appends zeros."""
  return np.pad(a_BT, ((0, 0), (0, by)))[:, by:]
