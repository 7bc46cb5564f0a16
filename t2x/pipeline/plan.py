"""Makes the plan of a pipeline, its schedule and layers, from a config."""

from collections.abc import Sequence
import dataclasses
import functools

from t2x.layers import stack
from t2x.models import common
from t2x.models import model as model_lib
from t2x.pipeline import balancer
from t2x.pipeline import config as config_lib
from t2x.pipeline import instructions
from t2x.pipeline import layer_costs
from t2x.pipeline import placement as placement_lib
from t2x.pipeline import schedule as schedule_lib
from t2x.pipeline import schedules


@dataclasses.dataclass(frozen=True, eq=False)
class PipelinePlan:
  """A schedule with the layers of its parts.

  Attributes:
    table: schedule.
    placement: layers of its parts.
    config: settings of the pipeline.
    execution: recomputation, and the order of tokens.
  """

  table: schedule_lib.Schedule
  placement: placement_lib.Placement
  config: config_lib.PipelineConfig
  execution: stack.Execution

  @functools.cached_property
  def instructions(self) -> instructions.Instructions:
    """The instructions of all devices."""
    return instructions.make(self.table, self.placement)

  def summary(self) -> str:
    """Returns a line that describes the pipeline and its idle time."""
    table, config = self.table, self.config
    times = table.simulate()
    of = f' of {table.num_chunks} chunks' if table.num_chunks > 1 else ''
    text = (
      f'{config.schedule}, {table.num_stages} stages{of} x '
      f'{table.num_microbatches} microbatches'
    )
    if config.uniform:
      return f'{text}, uniform: {times.uniform:.1f} x the work'
    text += f', {times.bubble_executed:.0%} idle if F, B and W last as long'
    has_few = table.num_microbatches < 2 * table.num_stages
    if has_few and not config.own_table:
      text += '; more pipeline.microbatches leave less idle'
    return text

  def for_evaluation(self) -> 'PipelinePlan':
    """Returns the plan for evaluation: forwards alone."""
    table = schedules.forward_only(
      self.table.num_stages,
      self.table.num_microbatches,
      self.table.num_chunks,
      self.table.placement,
    )
    return dataclasses.replace(self, table=table)


def make(
  model: model_lib.ModelConfig,
  config: config_lib.PipelineConfig,
  execution: stack.Execution,
  num_stages: int,
  batch: layer_costs.Batch | None = None,
  layout: layer_costs.MeshSplit | None = None,
) -> PipelinePlan:
  """Returns the plan of a model.

  Args:
    model: config of the model.
    config: settings of the pipeline.
    execution: recomputation, and the order of tokens.
    num_stages: number of devices along `pipe`.
    batch: a device's share of a microbatch, for `balanced` layers; may be None
      for others.
    layout: layout of parameters and activations, for `balanced` layers; may be
      None for others.

  Raises:
    ValueError: the schedule cannot have these numbers, the layers do not fit
      the schedule, or a device needs more memory than the limit.
  """
  recompute = execution.remat == 'full'
  table = _table(config, num_stages, recompute)
  towers = _towers(model)
  units = config.layers
  if units == 'even':
    units = placement_lib.even(towers, table.num_parts)
  elif units == 'balanced':
    units = _balanced(model, config, table, towers, batch, layout)
  place = placement_lib.place(towers, units, table)
  return PipelinePlan(table, place, config, execution)


def _balanced(
  model: model_lib.ModelConfig,
  config: config_lib.PipelineConfig,
  table: schedule_lib.Schedule,
  towers: Sequence[placement_lib.TowerLayers],
  batch: layer_costs.Batch | None,
  layout: layer_costs.MeshSplit | None,
) -> list[int]:
  assert batch is not None and layout is not None
  stacks = layer_costs.stacks(model, towers, batch, table.recompute)
  if config.memory_limit is None:
    return balancer.balance(stacks, table)
  stacks, fixed, moved = layer_costs.with_bytes(
    stacks, table, model, batch, layout
  )
  limit = config.memory_limit * 2**30
  return balancer.balance(
    stacks, table, fixed_bytes=fixed, moved_bytes=moved, limit=limit
  )


def _towers(model: common.TransformerConfig) -> list[placement_lib.TowerLayers]:
  group = len(model.group)
  return [
    placement_lib.TowerLayers(name, num_layers, min(group, num_layers))
    for name, num_layers in model.depths.items()
  ]


def _table(
  config: config_lib.PipelineConfig, num_stages: int, recompute: bool
) -> schedule_lib.Schedule:
  if config.own_table:
    return _own_table(config, num_stages, recompute)
  try:
    return _named(
      config.schedule,
      num_stages=num_stages,
      num_microbatches=config.microbatches,
      num_chunks=config.chunks,
      recompute=recompute,
    )
  except ValueError as error:
    raise ValueError(
      f'pipeline.schedule={config.schedule} of mesh.pipe={num_stages}, '
      f'pipeline.microbatches={config.microbatches}, '
      f'pipeline.chunks={config.chunks}: {error}'
    ) from error


# A run makes its schedule several times, and a search for layouts many times.
_named = functools.lru_cache(maxsize=16)(schedules.make)


def _own_table(
  config: config_lib.PipelineConfig, num_stages: int, recompute: bool
) -> schedule_lib.Schedule:
  """Reads the table of a file, and checks that it has the config's numbers."""
  table = schedule_lib.read(config.schedule)
  chunks = config.chunks or table.num_chunks
  for name, given, needed, setting in (
    ('stages', num_stages, table.num_stages, 'mesh.pipe'),
    (
      'microbatches',
      config.microbatches,
      table.num_microbatches,
      'pipeline.microbatches',
    ),
    ('chunks', chunks, table.num_chunks, 'pipeline.chunks'),
  ):
    if given != needed:
      raise ValueError(
        f'{config.schedule} is a table of {needed} {name}, and '
        f'{setting}={given}. Set {setting}={needed}, or another table.'
      )
  if recompute != table.recompute or not table.training:
    kind = 'with' if recompute else 'without'
    raise ValueError(
      f'{config.schedule}: this run needs a table of training {kind} '
      'recomputation (R), as train.remat says.'
    )
  return table
