"""What a mesh makes of an experiment: stages, rows and the order of tokens."""

from collections.abc import Mapping
import dataclasses
import math

from t2x.config import experiment
from t2x.data import config as data_config
from t2x.layers import stack
from t2x.models import encoder
from t2x.parallel import sharding
from t2x.pipeline import layer_costs
from t2x.pipeline import placement
from t2x.pipeline import plan as plan_lib
from t2x.training import train_step

Experiment = experiment.Experiment


class PipelineError(ValueError):
  """Settings of a pipeline that do not fit: no other layout is advised."""


def pipeline(
  config: Experiment, sizes: Mapping[str, int]
) -> plan_lib.Plan | None:
  """Returns what the stages of a pipeline run; None without stages.

  Args:
    config: the experiment.
    sizes: of the mesh axes.

  Raises:
    PartsError: fewer layers than parts; other stages may do.
    PipelineError: a schedule that cannot be, or layers that do not fit it.
  """
  if not has_stages(sizes):
    return None
  data, loss = config.data, config.train.loss
  batch = layer_costs.Batch(
    rows=data.batch_size / rows_multiple(config, sizes),
    length=data_config.target_length(data),
    num_targets=data_config.num_targets(data, data.length),
    encoder_length=data.length if data.objective.has_encoder else None,
    head_chunks=loss.vocab_chunks * loss.token_chunks,
  )
  layout = layer_costs.Layout(
    sizes=sizes, rules=config.rules, gather=config.pipeline.gather
  )
  execution = execution_of(config, sizes)
  num = sizes[sharding.PIPE]
  try:
    return plan_lib.make(
      config.model, config.pipeline, execution, num, batch, layout
    )
  except placement.PartsError:
    raise
  except ValueError as error:
    raise PipelineError(str(error)) from error


def has_stages(sizes: Mapping[str, int]) -> bool:
  """Returns whether layers lie in stages."""
  return sizes.get(sharding.PIPE, 1) > 1


def rows_multiple(config: Experiment, sizes: Mapping[str, int]) -> int:
  """Returns what the rows of a batch must be a multiple of."""
  parts = math.prod(sizes.get(axis, 1) for axis in row_axes(config, sizes))
  micro = config.pipeline.microbatches if has_stages(sizes) else 1
  return parts * config.train.accumulate * micro


def row_axes(config: Experiment, sizes: Mapping[str, int]) -> list[str]:
  """Returns the mesh axes over which rows are dealt."""
  step = config.step_config
  by_hand = train_step.axes_by_hand(step, has_stages(sizes))
  return sorted({*sharding.mesh_axes(config.rules.batch), *by_hand})


def execution_of(
  config: Experiment, sizes: Mapping[str, int]
) -> stack.Execution:
  """Returns how layers run on a mesh: also in which order tokens lie."""
  order = zigzag(config, sizes)
  return dataclasses.replace(config.train.execution, zigzag=order)


def zigzag(config: Experiment, sizes: Mapping[str, int]) -> int:
  """Returns over how many devices causal rows are dealt in zigzag order.

  Args:
    config: the experiment.
    sizes: of the mesh axes.
  """
  rules = config.rules
  balanced = rules.context_attention == 'ring' and rules.balance_context
  if not balanced or isinstance(config.model, encoder.EncoderConfig):
    return 1
  return context_size(config, sizes)


def context_size(config: Experiment, sizes: Mapping[str, int]) -> int:
  """Returns over how many devices a row is split."""
  return math.prod(sizes[a] for a in sharding.mesh_axes(config.rules.length))


def source_parts(config: Experiment, sizes: Mapping[str, int]) -> int:
  """Returns what the tokens of a row must be a multiple of, in an encoder."""
  fine = fine_axes(config.rules)
  return context_size(config, sizes) * math.prod(sizes[a] for a in fine)


def fine_axes(rules: sharding.Rules) -> set[str]:
  """Returns the mesh axes that split a row only between layers."""
  coarse = sharding.mesh_axes(rules.length)
  return {*sharding.mesh_axes(rules.norm_length)} - {*coarse}


def target_parts(config: Experiment, sizes: Mapping[str, int]) -> int:
  """Returns what the targets of a row are padded to a multiple of."""
  pieces = 1 if zigzag(config, sizes) == 1 else 2 * context_size(config, sizes)
  return math.lcm(source_parts(config, sizes), pieces)
