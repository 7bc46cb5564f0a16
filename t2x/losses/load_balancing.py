"""What routers of mixtures of experts add to a training step.

Shape suffixes: B batch, E experts, R layers of one kind, stacked.
"""

from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t2x.layers import moe
from t2x.parallel import sharding


class Load(NamedTuple):
  """A `routing.Load` of a batch: (E,) or (R, E), and scalars or (R,)."""

  tokens_E: jax.Array
  lost: jax.Array
  total: jax.Array


# By a router's path in the model.
StatsByPath = dict[str, moe.Stats]
LoadsByPath = dict[str, Load]


def loads(stats: StatsByPath) -> LoadsByPath:
  """Returns the loads of layers, summed over rows."""
  by_rows = {path: s.load for path, s in stats.items()}
  return {
    path: Load(
      tokens_E=load.tokens_BE.sum(-2),
      lost=load.lost_B.sum(-1),
      total=load.total_B.sum(-1),
    )
    for path, load in by_rows.items()
  }


@jax.named_scope('balance')
def losses(stats: StatsByPath, share_B: jax.Array) -> dict[str, jax.Array]:
  """Returns what routers add to the loss, summed over layers.

  Args:
    stats: of the routers; none without experts, and then there is no loss.
    share_B: weight of each row over that of the whole batch.
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
    model: whole, or the part that is not trained.
    loads: of a whole batch.
  """

  def moved(path, x):
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
  """Returns how evenly the experts are used.

  `expert_load/PATH` holds the share of each expert in its layer's tokens,
  (E,) or (R, E); `expert_load_max` the largest of all, 1 where even, as a
  multiple of its layer's mean; `tokens_dropped` the share of choices that no
  slot was left for (where experts choose: of tokens that none chose).
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
