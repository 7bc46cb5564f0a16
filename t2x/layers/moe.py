"""Mixture of experts: feed-forward layers of which each token uses some.

Shape suffixes: B batch, T position, E experts, D embed, F feed-forward.
"""

from collections.abc import Callable
import dataclasses
from typing import ClassVar
from typing import NamedTuple
from typing import TypeVar

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

Out = TypeVar('Out')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig(mlp.MlpConfig):
  """Config of experts, each a feed-forward layer, and of their router.

  The fields of `MlpConfig` are those of each expert.

  Attributes:
    num_experts: number of experts E.
    router: config of the router: tokens choose experts, or experts tokens.
    z_loss: factor of the router z-loss, the mean of log(sum exp(router
      logits))^2 over the tokens of a row (Zoph et al., 2022, equation 5).
  """

  kind: ClassVar[str] = 'moe'
  num_experts: int = 8
  router: routing.RouterConfig = routing.TokenChoice()
  z_loss: float = 1e-3

  def __post_init__(self) -> None:
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
    """Largest mean number of experts that compute for a token."""
    router, num = self.router, self.num_experts
    if isinstance(router, routing.ExpertChoice):
      return min(router.capacity, num)
    # With a capacity below 1, only that share of the choices has slots.
    return router.top_k * min(1.0, router.capacity or 1.0)

  @property
  def is_causal(self) -> bool:
    """Whether no token depends on later ones."""
    return not isinstance(self.router, routing.ExpertChoice)


class BalanceBias(nnx.Variable):
  """A bias that balances the load of experts; updated without a gradient."""


class Stats(NamedTuple):
  """Statistics of one layer's router, or, stacked, of several layers.

  Attributes:
    balance_B: balance loss of each row, multiplied by its factor.
    z_B: router z-loss of each row, multiplied by its factor.
    load: number of tokens of each expert.
  """

  balance_B: jax.Array
  z_B: jax.Array
  load: routing.Load


class Moe(nnx.Module):
  """The mixture sum_e weight_e expert_e(x) over the experts of each token."""

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
    """Applies the layer.

    Args:
      x_BTD: input.
      real_BT: False for padding, which goes to no expert; None is no padding.
      zigzag: number of devices over which the tokens of a row are in zigzag
        order.
      drop: whether experts have their capacity; else an expert takes all tokens
        that choose it.

    Returns:
      The output, (B, T, D), and statistics of the router.
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
    # A row is routed as a whole. Its logits are small beside its activations.
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
    # Kept for the backward pass: computed again, scores that are almost equal
    # could give another choice.
    routed = type(routed)(checkpoint_name(routed[0], routing.CHOICE), routed[1])
    names = ('gate_EDF', 'up_EDF', 'down_EFD', 'up_bias_EF', 'down_bias_ED')
    weights = {name: getattr(self, name) for name in names}
    weights = {name: w for name, w in weights.items() if w is not None}
    out_BTD = experts.run(weights, x_BTD, routed, config)
    return out_BTD, Stats(balance_B, z_B, load)


def _by_rows(
  fn: Callable[..., Out], rows: tuple[jax.Array, ...], whole: jax.Array | None
) -> Out:
  """Returns fn(*rows, whole), computed by each device for its own rows.

  Sorts, gathers and scatters within a row need no other rows, but the
  partitioner gathers whole batches for some of them, and fails on others.

  Args:
    fn: function of `rows` and `whole` that returns arrays of rows.
    rows: arrays whose first dimension is rows.
    whole: array that every device has whole, or None.
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


def make(
  config: FeedForwardConfig,
  embed: int,
  *,
  init: param.Init,
  out_factor: float,
  rngs: nnx.Rngs,
) -> mlp.Mlp | Moe:
  """Builds the feed-forward layer of a config.

  Args:
    config: config of the layer.
    embed: width D of the activations.
    init: initialisation of the weights.
    out_factor: factor of the std of the last product's weights.
    rngs: random keys of the parameters.
  """
  if isinstance(config, MoeConfig):
    return Moe(config, embed, init=init, out_factor=out_factor, rngs=rngs)
  return mlp.Mlp(config, embed, init=init, out_factor=out_factor, rngs=rngs)
