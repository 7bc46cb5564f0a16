"""The table of a pipeline schedule: who does what in which tick, checked.

Ticks are lock-step: at the end of each, stages exchange messages with their
neighbours, and what was made in a tick can be used from the next on. So a tick
lasts as long as its dearest operation, and one tick carries about one forward
of work: the backward is a tick for the gradient of a part's input (B) and one
for that of its weights (W), and recomputing the forward is a tick too (R).

Shape suffixes: T ticks, S stages, O kinds of operation, M microbatches, P
parts.
"""

import dataclasses
from typing import Any

import numpy as np

from t2x.pipeline import operations as ops
from t2x.pipeline import validation

Placement = ops.Placement


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Table:
  """A table that has been checked: making one that cannot run raises.

  Attributes:
    name: of the schedule.
    operation_TS: IDLE, FORWARD, BACKWARD, WEIGHT or RECOMPUTE of `operations`.
    microbatch_TS: which microbatch; 0 where idle.
    chunk_TS: which of the stage's parts; 0 where idle.
    num_microbatches: M.
    num_chunks: parts on each stage.
    placement: which parts they are; see `operations`.
    recompute: an R stands before every B, and F keeps only a part's input.
    training: False for a table of forwards alone.
    tick_OMP: the tick of each operation, computed; -1 for kinds not used.

  Raises:
    ValueError: an operation is lost, done twice, or before what it needs; a
      value is out of range. It names the tick, stage and microbatch.
  """

  name: str
  operation_TS: np.ndarray
  microbatch_TS: np.ndarray
  chunk_TS: np.ndarray
  num_microbatches: int
  num_chunks: int = 1
  placement: Placement = 'loop'
  recompute: bool = False
  training: bool = True
  tick_OMP: np.ndarray = dataclasses.field(init=False, repr=False)

  def __post_init__(self):
    validation.check_fields(self)
    used_TS = np.asarray(self.operation_TS) != ops.IDLE
    for name in ('operation_TS', 'microbatch_TS', 'chunk_TS'):
      array_TS = np.where(used_TS, getattr(self, name), 0).astype(np.int32)
      self._keep(name, array_TS)
    self._keep('tick_OMP', validation.check_table(self))

  def _keep(self, name: str, array: np.ndarray) -> None:
    array.setflags(write=False)
    object.__setattr__(self, name, array)

  @property
  def num_ticks(self) -> int:
    return self.operation_TS.shape[0]

  @property
  def num_stages(self) -> int:
    return self.operation_TS.shape[1]

  @property
  def num_parts(self) -> int:
    """Pieces into which the model is cut, over all stages."""
    return self.num_stages * self.num_chunks

  def part(self, stage: Any, chunk: Any) -> Any:
    """The part that a stage holds of a chunk: integers or integer arrays."""
    return ops.part(stage, chunk, self.num_stages, self.placement)

  def stage_of(self, part: Any) -> Any:
    """The stage that holds a part."""
    return ops.stage_of(part, self.num_stages, self.placement)

  def chunk_of(self, part: Any) -> Any:
    """The chunk that a part is of."""
    return ops.chunk_of(part, self.num_stages)
