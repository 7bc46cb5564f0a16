"""Gradients and evaluation of a model whose layers are spread over stages.

Shape suffixes: M microbatches, B rows, N slots of a device, U units.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from t2x.pipeline import pieces
from t2x.pipeline import plan as plan_lib
from t2x.pipeline import stage
from t2x.pipeline import weights

PIPE = weights.PIPE
Combine = Callable[[Any, Any], Any]


def run(
  trained: Any,
  rest: Any,
  batch: dict[str, jax.Array],
  key: jax.Array | None,
  plan: plan_lib.Plan,
  *,
  loss: pieces.Loss,
  combine: Combine,
  accumulate: int = 1,
  manual: tuple[str, ...] = (),
) -> tuple[Any, dict[str, Any]]:
  """Returns gradients (None for a table of forwards) and sums of a batch.

  Args:
    trained: the part of the model that gradients are wanted of.
    rest: the others.
    batch: its `weights` are over those of the whole batch.
    key: of dropout, or None.
    plan: what is run.
    loss: of terms and their batch, what they make and measure.
    combine: puts a trained and another part together.
    accumulate: times that the table is run, each with its share of the rows.
    manual: mesh axes over which gradients are reduced once, after all.
  """
  layouts = tuple(weights.Layout.of(tree, plan) for tree in (trained, rest))

  def run_stage(*args):
    own = stage.Stage(plan, layouts, loss, combine, manual, *args)
    return own.run(accumulate)

  batch_spec = jax.tree.map(lambda _: P(manual or None), batch)
  specs = [layout.specs for layout in layouts]
  grads = specs[0] if plan.table.training else None
  return jax.shard_map(
    run_stage,
    in_specs=(*specs, batch_spec, P()),
    out_specs=(grads, P()),
    axis_names={PIPE, *manual},
    check_vma=False,
  )(trained, rest, batch, key)
