"""How a pipeline runs, as part of an experiment's config."""

import dataclasses
from typing import Literal

from t2x import field_checks
from t2x.pipeline import schedules


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
  """Used where `mesh.pipe` is more than 1; the numbers do not depend on it.

  Attributes:
    schedule: gpipe, one_f_one_b, interleaved, breadth_first, zb_h1, zb_h2,
      zb_v, or the path of a table (a CSV file, see `Schedule.to_csv`).
    microbatches: pieces of a batch that go through the pipeline one by one;
      of each of `train.accumulate` batches.
    chunks: parts of the model on each stage; None is the schedule's own.
    layers: `even` shares, `balanced` ones, where the stage with the most to do
      has as little as can be (embeddings and head included), or the layers of
      each part, in order of depth (groups, where the layers repeat in groups).
    memory_limit: GiB of a device that `balanced` may use, as estimated from
      shapes (see `layer_costs`); None for no limit.
    gather: weights that `fsdp` splits are gathered `once` a step, or each
      `tick`, which needs less memory and moves more.
    uniform: all stages do whatever one of them does, masked, for machines on
      which devices of one program must not diverge.
  """

  schedule: str = 'one_f_one_b'
  microbatches: int = 8
  chunks: int | None = None
  layers: tuple[int, ...] | Literal['even', 'balanced'] = 'even'
  memory_limit: float | None = None
  gather: Literal['once', 'tick'] = 'once'
  uniform: bool = False

  def __post_init__(self):
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
    """Whether the schedule is the path of a table."""
    return self.schedule.endswith('.csv')
