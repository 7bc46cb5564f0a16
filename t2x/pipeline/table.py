"""The table of a pipeline schedule: the operation of each stage in each tick.

Ticks are lock-step. At the end of a tick stages exchange messages with their
neighbours, and a result can be used from the next tick on. A tick lasts as long
as its slowest operation, so each operation is about as much work as a forward.
The backward is two operations: the gradient of a part's input (B) and that of
its weights (W). Recomputation of the forward is an operation of its own (R).

Shape suffixes: T ticks, S stages.
"""

import dataclasses

import numpy as np

from t2x.pipeline import operations as ops


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Table:
  """The table of a schedule; `schedule.Schedule` is one that can run.

  Attributes:
    name: name of the schedule.
    operation_TS: kind of operation: IDLE, FORWARD, BACKWARD, WEIGHT or
      RECOMPUTE of `operations`.
    microbatch_TS: index of the microbatch; 0 where idle.
    chunk_TS: index of the chunk, that is, of the stage's part; 0 where idle.
    num_microbatches: number of microbatches, M.
    num_chunks: parts on each stage.
    placement: order in which the stages hold the parts; see `operations`.
    recompute: whether there is an R before every B; F then keeps the input of
      the part alone.
    training: whether there are backward passes; False for forwards alone.
  """

  name: str
  operation_TS: np.ndarray
  microbatch_TS: np.ndarray
  chunk_TS: np.ndarray
  num_microbatches: int
  num_chunks: int = 1
  placement: ops.Placement = 'loop'
  recompute: bool = False
  training: bool = True

  @property
  def num_ticks(self) -> int:
    """Number of ticks, T."""
    return self.operation_TS.shape[0]

  @property
  def num_stages(self) -> int:
    """Number of stages, S."""
    return self.operation_TS.shape[1]

  @property
  def num_parts(self) -> int:
    """Number of parts into which the model is cut, over all stages."""
    return self.num_stages * self.num_chunks

  def part(self, stage: ops.Ints, chunk: ops.Ints) -> ops.Ints:
    """Returns the part of a chunk that a stage holds.

    Args:
      stage: index of the stage, or an array of indices.
      chunk: index of the chunk, or an array of indices.
    """
    return ops.part(stage, chunk, self.num_stages, self.placement)

  def stage_of(self, part: ops.Ints) -> ops.Ints:
    """Returns the stage that holds a part, or those of an array of parts."""
    return ops.stage_of(part, self.num_stages, self.placement)

  def chunk_of(self, part: ops.Ints) -> ops.Ints:
    """Returns the chunk of a part, or those of an array of parts."""
    return ops.chunk_of(part, self.num_stages)
