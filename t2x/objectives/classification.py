"""Classification of texts, by a head on an encoder's first token."""

import dataclasses
from typing import ClassVar

import numpy as np

from t2x import field_checks
from t2x.objectives import objective
from t2x.objectives import rows as rows_lib
from t2x.objectives import vocab as vocab_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Classification(objective.Objective):
  """Predicts the class of a text; the label is the pair's target text.

  Classes are the labels of the training text in the order of their ids. A text
  is cut to the row.

  Attributes:
    num_classes: number of classes.
    head: number of the model's head (`model.classes`) that is trained.
    labels: labels in the order of their classes, such as the order of a head
      that comes from elsewhere; a label without any training example has a
      class too. Empty for the order of their ids in the training text.
  """

  num_classes: int = 2
  head: int = 0
  labels: tuple[str, ...] = ()

  kind: ClassVar[str] = 'classification'
  follows_text: ClassVar[bool] = False
  paired: ClassVar[bool] = True

  def __post_init__(self) -> None:
    field_checks.least(self, 'data.objective.', num_classes=2, head=0)
    if self.labels and len(set(self.labels)) != self.num_classes:
      raise ValueError(
        f'data.objective.labels={self.labels} and num_classes='
        f'{self.num_classes}: name each class once.'
      )

  @property
  def name(self) -> str:
    """Name of the head's term in the loss."""
    return f'class{self.head}'

  def source_length(self, length: int) -> int:
    """Returns the largest number of raw tokens of a text in a row."""
    return length - 1

  def lengths(self, length: int) -> dict[str, int]:
    """Returns the length of a row in each array of a batch, by name.

    No token is predicted: the arrays of targets hold one place of weight 0.
    """
    unused = ('targets', 'weights', 'target_positions')
    classes = (f'{self.name}_targets', f'{self.name}_weights')
    return rows_lib.lengths(length) | dict.fromkeys((*unused, *classes), 1)

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
      ValueError: if the training text does not have a label.
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
  """Returns the ids of a label.

  Args:
    tokens: ids of the target text, with its end and padding.
    vocab: vocabulary of the tokenizer.
  """
  is_end = np.isin(tokens, (vocab_lib.PAD, vocab.eos))
  return tuple(int(token) for token in tokens[~is_end])


def _class(tokens: np.ndarray, vocab: vocab_lib.Vocab) -> int:
  """Returns the class of a target text; 0 for an empty row."""
  label = label_of(tokens, vocab)
  if not label:
    return 0
  if label not in vocab.labels:
    raise ValueError(
      f'A label (ids {label}) is none of the {len(vocab.labels)} of the '
      'training text. Let data.train_split have every label.'
    )
  return vocab.labels.index(label)
