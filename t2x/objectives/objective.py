"""The contract of an objective: from rows of tokens to a batch."""

from collections.abc import Callable
from typing import ClassVar
from typing import Protocol

import numpy as np

from t2x.objectives import masking as masking_lib


class Objective(Protocol):
  """What a model is asked to predict.

  An objective is a frozen dataclass, part of the experiment's config, and a
  pure function of rows: equal arguments give equal batches. It inherits from
  this class, which holds what most objectives share.

  Attributes:
    kind: name on the command line, `data.objective=KIND`.
    has_encoder: whether a batch has a source side, for encoder-decoders.
    paired: whether examples are pairs of a source and a target text.
    follows_text: whether the rows are pieces of documents, in their order; if
      not, a row is an example by itself.
    examples: the function from rows to a batch, `examples(source, *, keys,
      vocab, length)`, of pairs `examples(source, target, *, ...)`. `source` and
      `target` are `rows.Rows` of `source_length(length)` tokens; `keys`
      (uint64, (B,)) decide all that is random, a row's alone by its own key;
      `vocab` holds the special ids. The arrays returned are those of `lengths`,
      with the dtypes and meanings of `batch_keys`.
  """

  kind: ClassVar[str]
  has_encoder: ClassVar[bool] = False
  paired: ClassVar[bool] = False
  follows_text: ClassVar[bool] = True
  examples: Callable[..., dict[str, np.ndarray]]

  def source_length(self, length: int) -> int:
    """Returns the raw tokens that one row of `length` is made from."""
    return length

  def stride(self, length: int) -> int:
    """Returns the raw tokens from the start of one row to that of the next.

    Only for objectives that follow the text.
    """
    return self.source_length(length)

  def lengths(self, length: int) -> dict[str, int]:
    """Returns how long each array of a batch is, by its name.

    Args:
      length: tokens of a row, as `data.length` has it.
    """
    ...

  def check(self, length: int) -> None:
    """Raises ValueError for rows of `length` that leave nothing to predict."""
    del length

  @property
  def num_ahead(self) -> int:
    """The number of heads for tokens after the next."""
    return 0

  @property
  def token_masking(self) -> masking_lib.Config | None:
    """How masked tokens are chosen; None if none are."""
    return None

  @property
  def drops_tokens(self) -> bool:
    """Whether chosen tokens are taken out of the row and asked for apart."""
    return False

  @property
  def draws_once(self) -> bool:
    """Whether random choices of a row are the same at each visit."""
    return False
