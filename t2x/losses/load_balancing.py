"""Balancing the load of the experts of a mixture of experts.

Shape suffixes: B batch, E experts, R layers of one kind, stacked.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t2x.layers import moe
from t2x.parallel import sharding


class LayerLoad(NamedTuple):
  """The load of the experts of a layer, or of R stacked layers, over a batch.

  Attributes:
    tokens_E: number of tokens of each expert, (E,) or (R, E).
    lost: number of choices for which no slot was left, a scalar or (R,).
    total: number of choices, a scalar or (R,).
  """

  tokens_E: jax.Array
  lost: jax.Array
  total: jax.Array


# By the path of the router in the model.
StatsByPath = dict[str, moe.Stats]
LoadsByPath = dict[str, LayerLoad]


def loads(stats: StatsByPath) -> LoadsByPath:
  """Returns the load of each router, summed over rows."""
  by_rows = {path: s.load for path, s in stats.items()}
  return {
    path: LayerLoad(
      tokens_E=load.tokens_BE.sum(-2),
      lost=load.lost_B.sum(-1),
      total=load.total_B.sum(-1),
    )
    for path, load in by_rows.items()
  }


@jax.named_scope('balance')
def losses(stats: StatsByPath, share_B: jax.Array) -> dict[str, jax.Array]:
  """Returns the auxiliary losses of the routers, summed over layers.

  Args:
    stats: statistics of the routers; empty for a model without experts, which
      has no such losses.
    share_B: weight of each row, divided by the weight of the whole batch.
  """
  if not stats:
    return {}
  # Layers of one kind are stacked, (R, B).
  total = lambda values: jnp.stack([jnp.dot(v, share_B).sum() for v in values])
  return {
    'balance_loss': total([s.balance_B for s in stats.values()]).sum(),
    'router_z_loss': total([s.z_B for s in stats.values()]).sum(),
  }


def update(model: Any, loads: LoadsByPath) -> Any:
  """Returns a model whose balancing biases have taken one step.

  b_e += rate x sign(mean load - load of e) (Wang et al., 2024, algorithm 1).

  Args:
    model: the whole model, or the part of it that is not trained.
    loads: loads of a whole batch.
  """

  def moved(path: tuple[Any, ...], x: object) -> object:
    if not isinstance(x, moe.BalanceBias):
      return x
    owner = sharding.path_name(path[:-1])
    tokens = loads[owner].tokens_E
    behind = jnp.sign(tokens.mean(-1, keepdims=True) - tokens)
    return x.replace(x.get_value() + x.get_metadata('rate') * behind)

  return jax.tree_util.tree_map_with_path(
    moved, model, is_leaf=sharding.is_variable
  )


def metrics(loads: LoadsByPath) -> dict[str, jax.Array]:
  """Returns metrics that show how evenly the experts are used.

  `expert_load/PATH` holds the share of each expert in its layer's tokens, (E,)
  or (R, E). `expert_load_max` is the largest share of all, as a multiple of its
  layer's mean, so 1 if all loads are equal. `tokens_dropped` is the share of
  choices for which no slot was left (with expert choice: of tokens that no
  expert chose).

  Args:
    loads: loads of a whole batch; there are no metrics without experts.
  """
  if not loads:
    return {}
  shares = {
    path: tokens / jnp.maximum(tokens.sum(-1, keepdims=True), 1.0)
    for path, tokens in ((p, load.tokens_E) for p, load in loads.items())
  }
  largest = [
    (s.max(-1) / jnp.maximum(s.mean(-1), 1e-9)).max() for s in shares.values()
  ]
  lost = jnp.stack([load.lost.sum() for load in loads.values()]).sum()
  total = jnp.stack([load.total.sum() for load in loads.values()]).sum()
  return {
    'expert_load_max': jnp.stack(largest).max(),
    'tokens_dropped': lost / jnp.maximum(total, 1.0),
    **{f'expert_load/{path}': share for path, share in shares.items()},
  }
