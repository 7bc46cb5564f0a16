"""Settings of pipeline parallelism in the config of an experiment."""

import dataclasses
from typing import Literal

from t2x import field_checks
from t2x.pipeline import schedules


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
  """How a pipeline runs; the computed numbers do not depend on it.

  The settings are used where `mesh.pipe` is more than 1.

  Attributes:
    schedule: name of a schedule (gpipe, one_f_one_b, interleaved,
      breadth_first, zb_h1, zb_h2, zb_v), or path of a table (a CSV file, see
      `Schedule.to_csv`).
    microbatches: number of pieces of a batch that go through the pipeline one
      after another. Each of the `train.accumulate` batches has that many.
    chunks: parts of the model on each stage; None for the schedule's own
      number.
    layers: division of the layers among the parts. `even` gives all parts the
      same number, as nearly as possible. `balanced` gives the stage with the
      most work as little as possible, embeddings and head included. Numbers
      are the layers of each part, in order of depth (groups of layers, where
      the layers repeat in groups).
    memory_limit: most GiB of a device that `balanced` may use, as estimated
      from shapes (see `layer_costs`); None for no limit.
    gather: time at which weights that `fsdp` splits are gathered: `once` a
      step, or in each `tick`, which needs less memory and moves more bytes.
    uniform: whether all stages compute every kind of operation that any of
      them does in a tick, and mask the results of the others. For machines on
      which the devices of one program must not diverge.
  """

  schedule: str = 'one_f_one_b'
  microbatches: int = 8
  chunks: int | None = None
  layers: tuple[int, ...] | Literal['even', 'balanced'] = 'even'
  memory_limit: float | None = None
  gather: Literal['once', 'tick'] = 'once'
  uniform: bool = False

  def __post_init__(self) -> None:
    field_checks.least(self, 'pipeline.', microbatches=1, chunks=1)
    field_checks.positive(self, 'pipeline.', 'memory_limit')
    if not self.own_table:
      try:
        schedules.check_name(self.schedule)
      except ValueError as error:
        raise ValueError(f'pipeline.schedule: {error}') from None
    if self.memory_limit is not None and self.layers != 'balanced':
      raise ValueError(
        f'pipeline.memory_limit={self.memory_limit} (GiB of a device) is for '
        f'pipeline.layers=balanced, and pipeline.layers={self.layers}. Set '
        'layers to balanced, or no limit.'
      )

  @property
  def own_table(self) -> bool:
    """Whether the schedule is the path of a table, not a name."""
    return self.schedule.endswith('.csv')
