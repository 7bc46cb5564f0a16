"""Mixture of experts: a feed-forward layer of which a token sees a part.

Shape suffixes: B batch, T position, E experts, D embed, F feed-forward.
"""

import dataclasses
from typing import ClassVar
from typing import NamedTuple

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t2x import field_checks
from t2x.layers import experts
from t2x.layers import mlp
from t2x.layers import param
from t2x.layers import routing
from t2x.parallel import manual_sharding
from t2x.parallel import sharding
from t2x.parallel import zigzag as zigzag_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(mlp.MlpConfig):
  """Experts, each a feed-forward layer of `MlpConfig`'s fields, and a router.

  Attributes:
    num_experts: E.
    router: who chooses whom.
    z_loss: factor of the mean of log(sum exp(router logits))^2 over the tokens
      of a row (Zoph et al., 2022, equation 5).
  """

  kind: ClassVar[str] = 'moe'
  num_experts: int = 8
  router: routing.RouterConfig = routing.TokenChoice()
  z_loss: float = 1e-3

  def __post_init__(self):
    super().__post_init__()
    field_checks.least(self, 'mlp.', num_experts=2, z_loss=0.0)
    if self.dropout:
      raise ValueError(
        f'mlp.dropout={self.dropout}: experts drop none of their hidden '
        'activations. Set mlp.dropout=0; model.dropout drops what they add.'
      )
    choice = self.router
    if (
      isinstance(choice, routing.TokenChoice)
      and choice.top_k > self.num_experts
    ):
      raise ValueError(
        f'mlp.router.top_k={choice.top_k} of mlp.num_experts='
        f'{self.num_experts}: a token cannot have more experts than there are.'
      )

  @property
  def experts_of_token(self) -> float:
    """Experts that compute for a token, in the mean and at the most."""
    router, num = self.router, self.num_experts
    if isinstance(router, routing.ExpertChoice):
      return min(router.capacity, num)
    # Below 1, capacity turns away that share of the choices.
    return router.top_k * min(1.0, router.capacity or 1.0)

  @property
  def is_causal(self) -> bool:
    """Whether no token depends on later ones."""
    return not isinstance(self.router, routing.ExpertChoice)


class BalanceBias(nnx.Variable):
  """A bias that keeps experts evenly used; moved by rule, never by gradient."""


class Stats(NamedTuple):
  """What one layer's router did, or stacked, what those of many did.

  Attributes:
    balance_B: balance loss of each row, its factor included.
    z_B: router z-loss of each row, its factor included.
    load: tokens of each expert.
  """

  balance_B: jax.Array
  z_B: jax.Array
  load: routing.Load


class Moe(nnx.Module):
  """sum_e weight_e expert_e(x) over the experts that a token has."""

  def __init__(
    self,
    config: MoeConfig,
    embed: int,
    *,
    init: param.Init,
    out_factor: float,
    rngs: nnx.Rngs,
  ):
    self.config = config
    E, F = config.num_experts, config.hidden
    into = param.initializer(init, fan_in=embed, fan_out=F)
    out = param.initializer(init, fan_in=F, fan_out=embed, factor=out_factor)
    route = param.initializer(init, fan_in=embed, fan_out=E)
    self.router_DE = param.param(rngs, (embed, E), ('embed', None), route)
    rate = config.router.bias_rate
    self.balance_E = (
      BalanceBias(jnp.zeros(E, jnp.float32), axes=(None,), rate=rate)
      if rate
      else None
    )
    axes, shape = ('experts', 'embed', 'mlp'), (E, embed, F)
    self.gate_EDF = (
      param.weight(rngs, shape, axes, into) if config.gated else None
    )
    self.up_EDF = param.weight(rngs, shape, axes, into)
    self.down_EFD = param.weight(
      rngs, (E, F, embed), ('experts', 'mlp', 'embed'), out
    )
    biased = config.bias
    bias = lambda size, axis: (
      param.param(rngs, (E, size), ('experts', axis), param.zeros)
      if biased
      else None
    )
    self.up_bias_EF = bias(F, 'mlp')
    self.down_bias_ED = bias(embed, None)

  def __call__(
    self,
    x_BTD: jax.Array,
    real_BT: jax.Array | None = None,
    zigzag: int = 1,
    *,
    drop: bool = True,
  ) -> tuple[jax.Array, Stats]:
    """Returns what the experts add to each token, and how they were used.

    Args:
      x_BTD: the input.
      real_BT: False for padding, which goes to no expert; None has none.
      zigzag: devices over which the tokens of a row lie in zigzag order.
      drop: False lets an expert take all that choose it, whatever the capacity.
    """
    config, router = self.config, self.config.router
    if not drop and isinstance(router, routing.TokenChoice):
      router = dataclasses.replace(router, capacity=None)
    if real_BT is None:
      real_BT = jnp.ones(x_BTD.shape[:2], bool)
    with jax.named_scope('router'):
      logits_BTE = param.project(
        x_BTD.astype(jnp.float32),
        self.router_DE,
        'BTD,DE->BTE',
        precision=jax.lax.Precision.HIGHEST,
      )
    # A row is routed as a whole; its logits are few beside its activations.
    logits_BTE = sharding.constrain(logits_BTE, 'batch', None, None)
    real_BT = sharding.constrain(real_BT, 'batch', None)
    log_sum_BT = jax.nn.logsumexp(logits_BTE, -1)
    squares_BT = jnp.where(real_BT, log_sum_BT**2, 0.0)
    z_B = config.z_loss * squares_BT.sum(1) / jnp.maximum(real_BT.sum(1), 1)
    bias_E = None if self.balance_E is None else self.balance_E[...]
    order_T = zigzag_lib.index(x_BTD.shape[1], zigzag)
    routed, load, balance_B = _by_rows(
      lambda logits_BTE, real_BT, bias_E: routing.choose(
        logits_BTE, real_BT, bias_E, router, order_T
      ),
      (logits_BTE, real_BT),
      bias_E,
    )
    # Kept for the backward pass: computed again, a near tie could fall
    # elsewhere.
    routed = type(routed)(checkpoint_name(routed[0], routing.CHOICE), routed[1])
    names = ('gate_EDF', 'up_EDF', 'down_EFD', 'up_bias_EF', 'down_bias_ED')
    weights = {name: getattr(self, name) for name in names}
    weights = {name: w for name, w in weights.items() if w is not None}
    out_BTD = experts.run(weights, x_BTD, routed, config)
    return out_BTD, Stats(balance_B, z_B, load)


def _by_rows(fn, rows, whole):
  """Returns fn(*rows, whole) of the rows of each device, by itself.

  Sorts, gathers and scatters stay within a row, but the partitioner moves
  whole batches for some of them, and fails on others.

  Args:
    fn: takes and returns arrays that begin with rows.
    rows: such arrays.
    whole: what every device has.
  """
  axes = manual_sharding.all_auto_axes()
  if not axes:
    return fn(*rows, whole)
  split = P(manual_sharding.auto_axes('batch'))
  return jax.shard_map(
    fn,
    in_specs=(*(split for _ in rows), P()),
    out_specs=split,
    axis_names=set(axes),
    check_vma=False,
  )(*rows, whole)


FeedForwardConfig = mlp.MlpConfig | MoeConfig


def make(config: FeedForwardConfig, embed: int, **kwargs) -> mlp.Mlp | Moe:
  """Builds the feed-forward layer that `config` describes."""
  if isinstance(config, MoeConfig):
    return Moe(config, embed, **kwargs)
  return mlp.Mlp(config, embed, **kwargs)
