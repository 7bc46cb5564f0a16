"""Classes of texts, for a head on an encoder's first token."""

import dataclasses
from typing import ClassVar

import numpy as np

from t2x import field_checks
from t2x.objectives import objective
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(objective.Objective):
  """Says which class a text is of; its label is the pair's target text.

  Classes are the labels of the training text in the order of their ids. A text
  is cut to the row.

  Attributes:
    num_classes: labels that there are.
    head: which of the model's heads (`model.classes`) it trains.
    labels: the classes in another order, such as that of a head that comes from
      elsewhere; a label of which the training text has no example has its class
      too. Empty is the order of the training text.
  """

  num_classes: int = 2
  head: int = 0
  labels: tuple[str, ...] = ()

  kind: ClassVar[str] = 'classification'
  follows_text: ClassVar[bool] = False
  paired: ClassVar[bool] = True

  def __post_init__(self):
    field_checks.least(self, 'data.objective.', num_classes=2, head=0)
    if self.labels and len(set(self.labels)) != self.num_classes:
      raise ValueError(
        f'data.objective.labels={self.labels} and num_classes='
        f'{self.num_classes}: name each class once.'
      )

  @property
  def name(self) -> str:
    """Of the head's term in the loss."""
    return f'class{self.head}'

  def source_length(self, length: int) -> int:
    """Raw tokens of each side of a row of `length`."""
    return length - 1

  def lengths(self, length: int) -> dict[str, int]:
    """How long the arrays of a batch are, by name.

    No token is predicted; the place for one has no weight.
    """
    lone = ('targets', 'weights', 'target_positions')
    own = (f'{self.name}_targets', f'{self.name}_weights')
    return rows_lib.lengths(length) | dict.fromkeys((*lone, *own), 1)

  def examples(
    self,
    source: rows_lib.Rows,
    target: rows_lib.Rows,
    *,
    keys: np.ndarray,
    vocab: vocab_lib.Vocab,
    length: int,
  ) -> dict[str, np.ndarray]:
    """Returns the batch of texts, each after <bos>, and their classes.

    Raises:
      ValueError: a label that the training text has not.
    """
    del keys  # Nothing is drawn.
    is_row_B1 = source.segments[:, :1] != 0
    lead = lambda a, first: np.concatenate([first, a], axis=1)
    start = np.where(is_row_B1, vocab.bos, vocab_lib.PAD).astype(np.int32)
    segments_BT = lead(source.segments, is_row_B1.astype(np.int32))
    classes = [_class(row, vocab) for row in target.tokens]
    nothing = np.zeros((len(classes), 1), np.int32)
    assert segments_BT.shape[1] == length
    return {
      'inputs': lead(source.tokens, start),
      'segments': segments_BT,
      'positions': rows_lib.positions(segments_BT),
      'targets': nothing,
      'weights': nothing.astype(np.float32),
      'target_positions': nothing,
      f'{self.name}_targets': np.array(classes, np.int32)[:, None],
      f'{self.name}_weights': is_row_B1.astype(np.float32),
    }


def label_of(tokens: np.ndarray, vocab: vocab_lib.Vocab) -> tuple[int, ...]:
  """Returns a label's ids, without padding and end."""
  is_end = np.isin(tokens, (vocab_lib.PAD, vocab.eos))
  return tuple(int(token) for token in tokens[~is_end])


def _class(tokens: np.ndarray, vocab: vocab_lib.Vocab) -> int:
  label = label_of(tokens, vocab)
  if not label:
    return 0  # Of an empty row.
  if label not in vocab.labels:
    raise ValueError(
      f'A label (ids {label}) is none of the {len(vocab.labels)} of the '
      'training text. Let data.train_split have every label.'
    )
  return vocab.labels.index(label)
