"""What a mesh makes of an experiment, worked out once for both.

parts = partitioning.of(config, mesh.shape)
parts.pipeline, parts.step_config, parts.rows_multiple
"""

from collections.abc import Iterable
from collections.abc import Mapping
import dataclasses
import functools
import math

from t2x import files
from t2x import reading
from t2x.config import experiment
from t2x.data import config as data_config
from t2x.layers import stack
from t2x.models import encoder
from t2x.parallel import sharding
from t2x.pipeline import layer_costs
from t2x.pipeline import placement
from t2x.pipeline import plan as plan_lib
from t2x.training import train_state
from t2x.training import train_step


class PipelineError(ValueError):
  """Settings of a pipeline that do not fit: no other layout is advised."""


@dataclasses.dataclass(frozen=True)
class Partitioning:
  """An experiment on mesh axes of given sizes.

  Everything else follows from these two, is worked out at its first use, and
  kept. `of` makes them.

  Attributes:
    config: the experiment.
    axis_sizes: name and number of devices of each mesh axis.
  """

  config: experiment.Experiment
  axis_sizes: tuple[tuple[str, int], ...]

  @functools.cached_property
  def sizes(self) -> dict[str, int]:
    """The number of devices along each mesh axis."""
    return dict(self.axis_sizes)

  @property
  def has_stages(self) -> bool:
    """Whether layers lie in the stages of a pipeline."""
    return self.sizes.get(sharding.PIPE, 1) > 1

  @functools.cached_property
  def pipeline(self) -> plan_lib.PipelinePlan | None:
    """What the stages of a pipeline run; None without stages.

    Raises:
      PartsError: fewer layers than parts; other stages may do.
      PipelineError: a schedule that cannot be, or layers that do not fit it.
    """
    if not self.has_stages:
      return None
    config, data, loss = self.config, self.config.data, self.config.train.loss
    batch = layer_costs.Batch(
      rows=data.batch_size / self.rows_multiple,
      length=data_config.target_length(data),
      num_targets=data_config.num_targets(data, data.length),
      encoder_length=data.length if data.objective.has_encoder else None,
      head_chunks=loss.vocab_chunks * loss.token_chunks,
    )
    layout = layer_costs.MeshSplit(
      sizes=self.sizes, rules=config.rules, gather=config.pipeline.gather
    )
    num_stages = self.sizes[sharding.PIPE]
    try:
      return plan_lib.make(
        config.model,
        config.pipeline,
        self.execution,
        num_stages,
        batch,
        layout,
      )
    except placement.PartsError:
      raise
    except ValueError as error:
      raise PipelineError(str(error)) from error

  @functools.cached_property
  def rules(self) -> sharding.Rules:
    """The rules of the train state, whose layers may lie in stages.

    Raises:
      PartsError, PipelineError: see `pipeline`.
    """
    rules = self.config.rules
    if self.pipeline is not None and self.pipeline.placement.is_contiguous:
      return dataclasses.replace(rules, layers=sharding.PIPE)
    return rules

  @functools.cached_property
  def step_config(self) -> train_state.StepConfig:
    """What an update does, the order of tokens and the stages included.

    Raises:
      PartsError, PipelineError: see `pipeline`.
    """
    return dataclasses.replace(
      self.config.step_config,
      execution=self.execution,
      pipeline=self.pipeline,
    )

  @functools.cached_property
  def execution(self) -> stack.Execution:
    """How layers run, and in which order the tokens of a row lie."""
    return dataclasses.replace(self.config.train.execution, zigzag=self.zigzag)

  @functools.cached_property
  def row_axes(self) -> tuple[str, ...]:
    """The mesh axes over which the rows of a batch are dealt, by name."""
    by_hand = train_step.axes_by_hand(self.config.step_config, self.has_stages)
    batch = sharding.mesh_axes(self.config.rules.batch)
    return tuple(sorted({*batch, *by_hand}))

  @functools.cached_property
  def rows_multiple(self) -> int:
    """The number that the rows of a batch must be a multiple of."""
    devices = math.prod(self.sizes.get(axis, 1) for axis in self.row_axes)
    micro = self.config.pipeline.microbatches if self.has_stages else 1
    return devices * self.config.train.accumulate * micro

  @functools.cached_property
  def context_size(self) -> int:
    """The number of devices over which a row is split."""
    return self._devices(sharding.mesh_axes(self.config.rules.length))

  @functools.cached_property
  def fine_axes(self) -> frozenset[str]:
    """The mesh axes that split a row only between layers."""
    rules = self.config.rules
    coarse = sharding.mesh_axes(rules.length)
    return frozenset(sharding.mesh_axes(rules.norm_length)) - {*coarse}

  @functools.cached_property
  def zigzag(self) -> int:
    """The number of devices over which causal rows lie in zigzag order."""
    rules = self.config.rules
    balanced = rules.context_attention == 'ring' and rules.balance_context
    if not balanced or isinstance(self.config.model, encoder.EncoderConfig):
      return 1
    return self.context_size

  @functools.cached_property
  def source_multiple(self) -> int:
    """The number that the tokens of an encoder's row must be a multiple of."""
    return self.context_size * self._devices(self.fine_axes)

  @functools.cached_property
  def target_multiple(self) -> int:
    """The number to a multiple of which the targets of a row are padded."""
    pieces = 1 if self.zigzag == 1 else 2 * self.context_size
    return math.lcm(self.source_multiple, pieces)

  def _devices(self, axes: Iterable[str]) -> int:
    return math.prod(self.sizes[axis] for axis in axes)


def of(config: experiment.Experiment, sizes: Mapping[str, int]) -> Partitioning:
  """Returns the partitioning of an experiment, the same one for equal input.

  A table of one's own counts by what its file holds.

  Args:
    config: the experiment.
    sizes: the number of devices along each mesh axis, as `mesh.shape` has it.
  """
  made = Partitioning(config, tuple(sizes.items()))
  if not (made.has_stages and config.pipeline.own_table):
    return _interned(made, '')
  try:
    table = reading.text(files.path(config.pipeline.schedule))
  except (OSError, ValueError):
    return made  # Its `pipeline` says what is wrong.
  return _interned(made, table)


@functools.lru_cache(maxsize=32)
def _interned(made: Partitioning, table: str) -> Partitioning:
  """Returns the first that was made of those equal to it, with equal tables."""
  del table
  return made
