"""Routing: the choice of experts for each token, row by row.

Capacity, balance and priority are per row, so that neither the layout nor
microbatches change the experts of a token. Padding in a row goes to no expert
and does not count.

Shape suffixes: B batch, T position, E experts, C slots of an expert, J choices
of a token, P pairs of token and choice.
"""

import dataclasses
import math
from typing import ClassVar
from typing import Literal
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from t2x import field_checks

CHOICE = 'routing'  # Name of the choice of experts, for `remat`.


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenChoice:
  """Each token chooses its experts (Shazeer et al., 2017).

  Attributes:
    top_k: number of experts of a token; 1 is the Switch Transformer (Fedus et
      al., 2022).
    capacity: number of slots of an expert, relative to the mean (tokens of the
      row) x top_k / experts. Earlier tokens have priority, so that no token
      depends on later ones. None takes all tokens (Gale et al., 2022), as
      generation always does.
    score: scores of a token, a `softmax` over the experts, or a `sigmoid` for
      each of them (DeepSeek-V3, 2024).
    normalize: whether the scores of the chosen experts are divided by their sum
      (Mixtral, Jiang et al., 2024).
    balance_loss: factor of the balance loss of each row, E sum_e (share of the
      choices of e) x (mean score of e) (Fedus et al., 2022, equation 4).
    bias_rate: step by which an expert's bias is raised or lowered after each
      training step, if it had fewer or more tokens than the mean. The bias is
      added to the scores for the choice only, and never changes the loss (Wang
      et al., 2024). 0 is no bias.
  """

  kind: ClassVar[str] = 'token_choice'
  top_k: int = 2
  capacity: float | None = None
  score: Literal['softmax', 'sigmoid'] = 'softmax'
  normalize: bool = True
  balance_loss: float = 0.01
  bias_rate: float = 0.0

  def __post_init__(self) -> None:
    prefix = 'mlp.router.'
    field_checks.least(self, prefix, top_k=1, balance_loss=0.0, bias_rate=0.0)
    field_checks.positive(self, prefix, 'capacity')
    if self.normalize and self.top_k == 1:
      raise ValueError(
        'mlp.router.normalize=true with top_k=1 makes every weight 1, so that '
        'the router would learn nothing. Set mlp.router.normalize=false.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertChoice:
  """Each expert chooses its tokens (Zhou et al., 2022).

  All experts have the same number of tokens, and a token may have any number of
  experts. The choice of a token depends on later ones, so that causal models
  cannot use it.

  Attributes:
    capacity: mean number of experts of a token; an expert takes capacity x
      (tokens of the row) / experts.
  """

  kind: ClassVar[str] = 'expert_choice'
  bias_rate = 0.0  # A field of TokenChoice.
  capacity: float = 2.0

  def __post_init__(self) -> None:
    field_checks.positive(self, 'mlp.router.', 'capacity')


RouterConfig = TokenChoice | ExpertChoice


class Choices(NamedTuple):
  """Experts of each token, without a capacity.

  Attributes:
    experts_BTJ: numbers of the experts; E is no expert.
    weights_BTJ: factors of the experts' outputs, float32.
  """

  experts_BTJ: jax.Array
  weights_BTJ: jax.Array


class Slots(NamedTuple):
  """Tokens of each expert, at most C.

  Attributes:
    tokens_BEC: index in the arrays of each slot's token; T is an empty slot.
    weights_BEC: factors of the expert's outputs, float32.
  """

  tokens_BEC: jax.Array
  weights_BEC: jax.Array


class Load(NamedTuple):
  """Numbers of tokens, float32.

  Attributes:
    tokens_BE: number of tokens that chose each expert, also those for which it
      had no slot; where experts choose, number of tokens of each expert.
    lost_B: number of choices for which the expert had no slot; where experts
      choose, number of tokens that no expert chose.
    total_B: number of choices; where experts choose, number of tokens.
  """

  tokens_BE: jax.Array
  lost_B: jax.Array
  total_B: jax.Array


def choose(
  logits_BTE: jax.Array,
  real_BT: jax.Array,
  bias_E: jax.Array | None,
  config: RouterConfig,
  order_T: np.ndarray,
) -> tuple[Choices | Slots, Load, jax.Array]:
  """Routes the tokens of each row.

  Args:
    logits_BTE: logits of the router, float32.
    real_BT: False for padding.
    bias_E: bias of the scores for the choice only; None is none.
    config: config of the router.
    order_T: position in its row of each token of the arrays.

  Returns:
    The routing, the load, and the balance loss of each row, (B,).
  """
  if isinstance(config, ExpertChoice):
    return _by_experts(logits_BTE, real_BT, config)
  choices, scores_BTE = _by_tokens(logits_BTE, real_BT, bias_E, config)
  num_experts = logits_BTE.shape[-1]
  counts_BE = _one_hot(choices.experts_BTJ, num_experts).sum((1, 2))
  num_B = jnp.maximum(real_BT.sum(1), 1)[:, None]
  shares_BE = counts_BE / (num_B * config.top_k)
  means_BE = jnp.where(real_BT[..., None], scores_BTE, 0.0).sum(1) / num_B
  loss_B = config.balance_loss * num_experts * (shares_BE * means_BE).sum(1)
  total_B = counts_BE.sum(1)
  if config.capacity is None:
    return choices, Load(counts_BE, jnp.zeros_like(total_B), total_B), loss_B
  slots = _assign(choices, real_BT, num_experts, config, order_T)
  kept_B = (slots.tokens_BEC < real_BT.shape[1]).sum((1, 2))
  return slots, Load(counts_BE, total_B - kept_B, total_B), loss_B


def _by_tokens(
  logits_BTE: jax.Array,
  real_BT: jax.Array,
  bias_E: jax.Array | None,
  config: TokenChoice,
) -> tuple[Choices, jax.Array]:
  """Returns the choices of each token, and scores that sum to 1."""
  num_experts = logits_BTE.shape[-1]
  log = jax.nn.log_softmax if config.score == 'softmax' else jax.nn.log_sigmoid
  logs_BTE = log(logits_BTE)
  wanted_BTE = jax.lax.stop_gradient(logs_BTE)
  if bias_E is not None:
    wanted_BTE = jnp.exp(wanted_BTE) + bias_E[None, None]
  # Unlike top_k, a sort does not move rows between devices on any backend.
  ranked_BTE = jnp.argsort(wanted_BTE, axis=-1, descending=True)
  experts_BTJ = ranked_BTE[..., : config.top_k]
  logs_BTJ = jnp.take_along_axis(logs_BTE, experts_BTJ, -1)
  # From logarithms, since all scores may be too small for a float.
  weights_BTJ = (jax.nn.softmax if config.normalize else jnp.exp)(logs_BTJ)
  real = real_BT[..., None]
  choices = Choices(
    jnp.where(real, experts_BTJ, num_experts),
    jnp.where(real, weights_BTJ, 0.0),
  )
  return choices, jax.nn.softmax(logs_BTE)


def _assign(
  choices: Choices,
  real_BT: jax.Array,
  num_experts: int,
  config: TokenChoice,
  order_T: np.ndarray,
) -> Slots:
  """Assigns slots, in the order of tokens and then of their choices."""
  batch, length, top_k = choices.experts_BTJ.shape
  assert config.capacity is not None
  share = config.capacity * top_k / num_experts
  limits = _limits(share, length)
  token_T = np.argsort(order_T)  # Index in the arrays of each position.
  flat = lambda a: a[:, token_T].reshape(batch, length * top_k)
  experts_BP, weights_BP = map(flat, choices)
  one_hot_BPE = _one_hot(experts_BP, num_experts, jnp.int32)
  # Number of earlier pairs with the same expert.
  before_BPE = jnp.cumsum(one_hot_BPE, 1) - one_hot_BPE
  place_BP = (before_BPE * one_hot_BPE).sum(-1)
  limit_B = jnp.asarray(limits)[real_BT.sum(1)]
  kept_BP = place_BP < limit_B[:, None]
  experts_BP = jnp.where(kept_BP, experts_BP, num_experts)
  token_P = jnp.asarray(np.repeat(token_T, top_k), jnp.int32)
  shape = num_experts, int(limits[-1])

  def scatter(
    experts_P: jax.Array, place_P: jax.Array, weights_P: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    put = lambda empty, values: (
      jnp.full(shape, empty).at[experts_P, place_P].set(values, mode='drop')
    )
    return put(jnp.int32(length), token_P), put(jnp.float32(0), weights_P)

  return Slots(*jax.vmap(scatter)(experts_BP, place_BP, weights_BP))


def _by_experts(
  logits_BTE: jax.Array, real_BT: jax.Array, config: ExpertChoice
) -> tuple[Slots, Load, jax.Array]:
  length, num_experts = logits_BTE.shape[1:]
  limits = _limits(config.capacity / num_experts, length)
  scores_BTE = jax.nn.softmax(logits_BTE)
  wanted_BTE = jnp.where(real_BT[..., None], scores_BTE, -1.0)
  ranked_BTE = jnp.argsort(wanted_BTE, axis=1, descending=True)
  tokens_BCE = ranked_BTE[:, : limits[-1]]
  weights_BCE = jnp.take_along_axis(scores_BTE, tokens_BCE, 1)
  num_B = real_BT.sum(1)
  taken_B = jnp.minimum(jnp.asarray(limits)[num_B], num_B)
  index_C = jnp.arange(tokens_BCE.shape[1])
  full_BC1 = (index_C[None] < taken_B[:, None])[..., None]
  swap = lambda a: jnp.swapaxes(a, 1, 2)
  slots = Slots(
    swap(jnp.where(full_BC1, tokens_BCE, length)),
    swap(jnp.where(full_BC1, weights_BCE, 0.0)),
  )
  mark = lambda tokens_EC: (
    jnp.zeros(length, bool).at[tokens_EC].set(True, mode='drop')
  )
  chosen_BT = jax.vmap(mark)(slots.tokens_BEC)
  tokens_BE = jnp.broadcast_to(taken_B[:, None], (len(num_B), num_experts))
  counts = tokens_BE, (real_BT & ~chosen_BT).sum(1), num_B
  load = Load(*(n.astype(jnp.float32) for n in counts))
  return slots, load, jnp.zeros(real_BT.shape[:1], jnp.float32)


def _limits(share: float, length: int) -> np.ndarray:
  """Returns the number of slots of an expert for 0, 1, ..., T tokens a row."""
  # Slightly less, so that 1.1 x 10 gives 11 and not 12.
  slots = [math.ceil(share * num * (1 - 1e-9)) for num in range(length + 1)]
  return np.minimum(np.asarray(slots, np.int32), length)


def _one_hot(
  experts: jax.Array,
  num_experts: int,
  dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
  return jax.nn.one_hot(experts, num_experts, dtype=dtype)
