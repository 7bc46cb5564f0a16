"""From an experiment's config to what a pipeline runs."""

import dataclasses
import functools

from t2x import stack
from t2x.models import common
from t2x.models import encoder_decoder
from t2x.pipeline import config as config_lib
from t2x.pipeline import instructions
from t2x.pipeline import placement as placement_lib
from t2x.pipeline import schedule as schedule_lib
from t2x.pipeline import schedules


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
  """A table with the layers of its parts.

  Attributes:
    table: the schedule.
    place: the layers of its parts.
    config: of the pipeline.
    execution: what to recompute, and the order of tokens.
  """

  table: schedule_lib.Schedule
  place: placement_lib.Placement
  config: config_lib.PipelineConfig
  execution: stack.Execution

  @functools.cached_property
  def told(self) -> instructions.Instructions:
    """What devices are told."""
    return instructions.make(self.table, self.place)

  def for_evaluation(self) -> 'Plan':
    """Returns the plan of forwards alone."""
    table = schedules.forward_only(
      self.table.num_stages,
      self.table.num_microbatches,
      self.table.num_chunks,
      self.table.placement,
    )
    return dataclasses.replace(self, table=table)


def make(
  model: common.TransformerConfig,
  config: config_lib.PipelineConfig,
  execution: stack.Execution,
  num_stages: int,
) -> Plan:
  """Returns the plan of a model.

  Args:
    model: its config.
    config: of the pipeline.
    execution: what to recompute, and the order of tokens.
    num_stages: devices along `pipe`.

  Raises:
    ValueError: a schedule that cannot be, or layers that do not fit it.
  """
  table = schedules.make(
    config.schedule,
    num_stages=num_stages,
    num_microbatches=config.microbatches,
    num_chunks=config.chunks,
    recompute=execution.remat == 'full',
  )
  towers = _towers(model)
  units = config.layers or placement_lib.even(towers, table.num_parts)
  place = placement_lib.place(towers, units, table)
  return Plan(table, place, config, execution)


def _towers(model: common.TransformerConfig) -> list[placement_lib.Tower]:
  def tower(name, num_layers):
    group = min(len(model.group), num_layers)
    return placement_lib.Tower(name, num_layers, group)

  if isinstance(model, encoder_decoder.EncoderDecoderConfig):
    num = model.num_encoder_layers or model.num_layers
    return [tower('encoder', num), tower('decoder', model.num_layers)]
  return [tower('tower', model.num_layers)]
