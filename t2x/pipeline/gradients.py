"""Gradients and evaluation of a model whose layers are on several stages.

Shape suffixes: M microbatches, B rows, N slots of a device, U units.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from t2x.models import model as model_lib
from t2x.parallel import sharding
from t2x.pipeline import pieces
from t2x.pipeline import plan as plan_lib
from t2x.pipeline import stage
from t2x.pipeline import weights


def run(
  trained: model_lib.Transformer,
  rest: model_lib.Transformer,
  batch: dict[str, jax.Array],
  key: jax.Array | None,
  plan: plan_lib.PipelinePlan,
  *,
  loss: pieces.Loss,
  combine: pieces.Combine,
  accumulate: int = 1,
  manual: tuple[str, ...] = (),
) -> tuple[Any, dict[str, Any]]:
  """Returns the gradients of a batch and the sums of its metrics.

  Args:
    trained: model with its trained parameters alone.
    rest: model with its other parameters alone.
    batch: arrays by name, (rows, ...) each. Its `weights` are divided by those
      of the whole batch.
    key: dropout key of the step, or None without dropout.
    plan: schedule, and the layers of its parts.
    loss: function from the terms of the loss and their batch to the loss and
      its metrics.
    combine: function that joins trained and other parameters.
    accumulate: times that the table runs, each time with its share of the rows.
    manual: mesh axes over which gradients are reduced once, after the last
      microbatch.

  Returns:
    The gradients in the structure of `trained`, or None for a schedule without
    backward passes; and the sums of metrics by name.
  """
  layouts = tuple(
    weights.StageLayout.of(tree, plan) for tree in (trained, rest)
  )

  def run_stage(*args: Any) -> tuple[Any, dict[str, Any]]:
    on_device = stage.Stage(plan, layouts, loss, combine, manual, *args)
    return on_device.run(accumulate)

  batch_spec = jax.tree.map(lambda _: P(manual or None), batch)
  specs = [layout.specs for layout in layouts]
  grads = specs[0] if plan.table.training else None
  return jax.shard_map(
    run_stage,
    in_specs=(*specs, batch_spec, P()),
    out_specs=(grads, P()),
    axis_names={sharding.PIPE, *manual},
    check_vma=False,
  )(trained, rest, batch, key)
