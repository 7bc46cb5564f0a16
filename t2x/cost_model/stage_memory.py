"""Estimates the buffers that a pipeline's stage keeps between ticks.

They are those of `pipeline.layer_costs`: activations of the parts in flight,
weights on the stage that uses them with their float32 gradients, and messages.
The temporary memory within a tick comes on top.
"""

from collections.abc import Sequence

from t2x.cost_model import device_share
from t2x.data import config as data_config
from t2x.pipeline import layer_costs
from t2x.pipeline import placement_cost


def between_ticks(local: device_share.DeviceShare) -> dict[str, float]:
  """Returns the bytes of the buffers between ticks, by name.

  Args:
    local: the share of a device on a mesh with stages.
  """
  plan, config, model = local.plan, local.config, local.config.model
  assert plan is not None
  loss, data = config.train.loss, config.data
  batch = layer_costs.Batch(
    rows=local.rows,
    length=local.length,
    num_targets=data_config.num_targets(data, data.length),
    encoder_length=data.length if data.objective.has_encoder else None,
    head_chunks=loss.vocab_chunks * loss.token_chunks,
    kernels=True,
  )
  layout = layer_costs.MeshSplit(
    sizes=local.sizes, rules=config.rules, gather=config.pipeline.gather
  )
  stacks = layer_costs.stacks(
    model, plan.placement.towers, batch, plan.table.recompute
  )
  stacks, _, _ = layer_costs.with_bytes(
    stacks, plan.table, model, batch, layout
  )
  return {
    **_of_units(local, stacks),
    **_of_shared(local),
    'messages': layer_costs.messages(stacks, plan.table, model, batch, layout),
  }


def _of_units(
  local: device_share.DeviceShare, stacks: Sequence[placement_cost.TowerCosts]
) -> dict[str, float]:
  """Returns the bytes of activations, and of weights and their gradients."""
  plan = local.plan
  assert plan is not None
  model = placement_cost.CostModel(stacks, plan.table, 0.0, 0.0, None)
  units_P, begin = plan.placement.units_P, 0
  activations = weights = 0.0
  for t, num in enumerate(model.shares_of(units_P)):
    end = begin + num
    unit, part = model.prices(t, begin, end)
    in_tower_SV = (model.part_SV >= begin) & (model.part_SV < end)
    num_units = (units_P[model.part_SV] * in_tower_SV).sum(-1).max()
    weights += unit * float(num_units)
    activations += part * float(units_P[begin:end].max())
    begin = end
  return {'activations': activations, 'weights and gradients': weights}


def on_the_move(local: device_share.DeviceShare) -> float:
  """Returns the bytes of float32 gradients that move to where they are kept."""
  assert local.plan is not None
  if local.plan.placement.is_contiguous:
    return 0.0
  layers = [w for w in local.weights if w.in_layers]
  return 4 * sum(w.used / local.split(w) for w in layers)


def _of_shared(local: device_share.DeviceShare) -> dict[str, float]:
  """Returns the bytes of embeddings and head, which every stage has whole."""
  kept = sum(w.used / local.split(w) for w in local.weights if not w.in_layers)
  return {'tables of all stages': 4 * kept, 'their gradients': 4 * kept}
