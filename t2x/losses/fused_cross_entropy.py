"""Cross-entropy whose gradients are computed along with it, chunk by chunk.

With probabilities p, a label smoothing e over V tokens and a z-loss z, a token
of weight w has the gradient

  d logits = w (p (1 + 2 z log_sum) - (1 - e) onehot(target) - e / V),

which needs only values that the loss has just computed. Where a soft cap c
bounds logits y = c tanh(x / c), d x = (1 - (y / c)^2) d y. So only the logits
of one chunk exist at a time, and no product is computed twice.

Shape suffixes: B batch, T position, D embed, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t2x.layers import embed
from t2x.layers import param
from t2x.parallel import manual_sharding
from t2x.parallel import sharding

_NEVER = -1e30


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
  """Settings of the loss of a token.

  Attributes:
    label_smoothing: share of the target distribution that is uniform (Szegedy
      et al., 2016).
    z_loss: weight of the squared log-sum-exp of the logits (Chowdhery et al.,
      2022).
    vocab_chunks: number of chunks of the vocabulary. The logits of one chunk
      exist at a time, and the backward pass computes them again; 1 keeps all
      logits.
    token_chunks: number of chunks of the sequence. The logits of one chunk
      exist at a time; its gradient is computed along with its loss, so nothing
      is computed twice.
  """

  label_smoothing: float = 0.0
  z_loss: float = 0.0
  vocab_chunks: int = 1
  token_chunks: int = 1

  def __post_init__(self) -> None:
    if not 0.0 <= self.label_smoothing < 1.0:
      raise ValueError(
        f'train.loss.label_smoothing={self.label_smoothing}; it is in [0, 1).'
      )
    for name in ('vocab_chunks', 'token_chunks'):
      if getattr(self, name) < 1:
        raise ValueError(
          f'train.loss.{name}={getattr(self, name)}; it is 1 or more.'
        )
    if self.vocab_chunks > 1 and self.token_chunks > 1:
      raise ValueError(
        f'train.loss.vocab_chunks={self.vocab_chunks} and token_chunks='
        f'{self.token_chunks}: set one of them to 1.'
      )


class MeanLoss(NamedTuple):
  """A weighted sum of losses over all tokens, and its parts, float32.

  Attributes:
    objective: minimised loss, a scalar, with label smoothing and z-loss.
    nll_BT: minus the log-probability of each target, in nats.
    correct_BT: 1 where the target has the largest logit.
  """

  objective: jax.Array
  nll_BT: jax.Array
  correct_BT: jax.Array


# Features, targets and weights of some tokens.
_Tokens = tuple[jax.Array, jax.Array, jax.Array]
# The loss, and its gradients with respect to the features and the head.
_LossAndGradients = tuple[MeanLoss, tuple[jax.Array, embed.Head]]


def objective(
  nll_BT: jax.Array,
  log_sum_BT: jax.Array,
  mean_logit_BT: jax.Array,
  config: LossConfig,
) -> jax.Array:
  """Returns the minimised loss of each token, (B, T).

  Args:
    nll_BT: minus the log-probability of the target, in nats.
    log_sum_BT: log-sum-exp of the logits.
    mean_logit_BT: mean of the logits over the vocabulary.
    config: label smoothing and z-loss.
  """
  smooth = config.label_smoothing
  result_BT = nll_BT
  if smooth:
    even_BT = log_sum_BT - mean_logit_BT
    result_BT = (1.0 - smooth) * nll_BT + smooth * even_BT
  if config.z_loss:
    result_BT = result_BT + config.z_loss * jnp.square(log_sum_BT)
  return result_BT


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def mean_loss(
  x_BTD: jax.Array,
  head: embed.Head,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  config: LossConfig,
) -> MeanLoss:
  """Returns the weighted sum of the tokens' losses.

  Only `objective` of the result has a gradient.

  Args:
    x_BTD: features.
    head: output head.
    targets_BT: target ids.
    weights_BT: weight of each token, divided by the weight of the whole batch.
    config: label smoothing, z-loss and chunks of tokens.
  """
  fn = lambda part: _losses(head, part, config)[0]
  parts = (x_BTD, targets_BT, weights_BT)
  if config.token_chunks == 1:
    return fn(parts)
  return _joined(jax.lax.map(fn, _split(parts, config.token_chunks)))


class _Softmax(NamedTuple):
  """Values that the gradient takes from the loss.

  Attributes:
    logits_BTV: logits, after the soft cap.
    exp_BTV: exp(logits - largest logit).
    exp_sum_BT: sum of `exp_BTV` over the vocabulary.
    log_sum_BT: log-sum-exp of the logits.
    is_target_BTV: whether an id is the target.
    is_token_V: whether a row of the table is a token; None without padded rows.
  """

  logits_BTV: jax.Array
  exp_BTV: jax.Array
  exp_sum_BT: jax.Array
  log_sum_BT: jax.Array
  is_target_BTV: jax.Array
  is_token_V: jax.Array | None


def _losses(
  head: embed.Head, part: _Tokens, config: LossConfig
) -> tuple[MeanLoss, _Softmax]:
  """Returns the loss of some tokens, and values that its gradient needs."""
  x_BTD, targets_BT, weights_BT = part
  logits_BTV = head.logits(x_BTD, head.table_VD, head.bias_V)
  ids_V = jnp.arange(logits_BTV.shape[-1])
  padded = head.vocab_size < ids_V.size
  is_token_V = ids_V < head.vocab_size if padded else None
  masked_BTV = _where(is_token_V, logits_BTV, _NEVER)
  largest_BT = masked_BTV.max(-1)
  exp_BTV = jnp.exp(masked_BTV - largest_BT[..., None])
  exp_sum_BT = exp_BTV.sum(-1)
  log_sum_BT = largest_BT + jnp.log(exp_sum_BT)
  is_target_BTV = ids_V[None, None] == targets_BT[..., None]
  picked_BT = _pick(logits_BTV, targets_BT, is_target_BTV)
  nll_BT = log_sum_BT - picked_BT
  mean_logit_BT = _where(is_token_V, logits_BTV, 0.0).sum(-1) / head.vocab_size
  objective_BT = objective(nll_BT, log_sum_BT, mean_logit_BT, config)
  correct_BT = (picked_BT >= largest_BT).astype(jnp.float32)
  mean = MeanLoss((objective_BT * weights_BT).sum(), nll_BT, correct_BT)
  return mean, _Softmax(
    logits_BTV, exp_BTV, exp_sum_BT, log_sum_BT, is_target_BTV, is_token_V
  )


def _where(
  is_token_V: jax.Array | None, logits_BTV: jax.Array, other: float
) -> jax.Array:
  """Returns the logits, with `other` in place of those of padded rows."""
  if is_token_V is None:
    return logits_BTV
  return jnp.where(is_token_V[None, None], logits_BTV, other)


def _pick(
  logits_BTV: jax.Array, targets_BT: jax.Array, is_target_BTV: jax.Array
) -> jax.Array:
  """Returns the logit of each target, (B, T)."""
  # A sum over a sharded vocabulary needs no logits of other devices.
  if manual_sharding.auto_axes('vocab'):
    return jnp.where(is_target_BTV, logits_BTV, 0.0).sum(-1)
  return jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]


def _chunk_gradients(
  head: embed.Head, part: _Tokens, config: LossConfig
) -> tuple[MeanLoss, jax.Array, embed.Head]:
  """Returns the loss of some tokens, and its gradients by features and head."""
  mean, s = _losses(head, part, config)
  x_BTD, _, weights_BT = part
  smooth = config.label_smoothing
  share_BT = weights_BT * (1.0 + 2.0 * config.z_loss * s.log_sum_BT)
  share_BT = share_BT / s.exp_sum_BT
  wanted_BT = (1.0 - smooth) * weights_BT
  d_BTV = s.exp_BTV * share_BT[..., None]
  d_BTV = d_BTV - jnp.where(s.is_target_BTV, wanted_BT[..., None], 0.0)
  if smooth:
    even_BT = weights_BT * (smooth / head.vocab_size)
    d_BTV = _where(s.is_token_V, d_BTV - even_BT[..., None], 0.0)
  d_BTV = head.uncapped_gradient(d_BTV, s.logits_BTV)
  dtype = x_BTD.dtype
  d_bias_V = None if head.bias_V is None else d_BTV.sum((0, 1))
  # Factors have the dtype of the products, to which a TPU rounds them anyway; a
  # GPU would keep a float32 copy of a factor beside it. XLA for CPUs has no
  # such product. The sum over chunks is float32.
  factors = jnp.float32 if manual_sharding.platform() == 'cpu' else dtype
  d_BTV = d_BTV.astype(factors)
  d_table_VD = param.weight_gradient(
    x_BTD.astype(factors), d_BTV, embed.LOGITS, jnp.float32
  )
  d_table_VD = head.scale * d_table_VD
  table_VD = head.table_VD.astype(dtype)
  d_x_BTD = jnp.einsum('BTV,VD->BTD', d_BTV.astype(dtype), table_VD)
  d_head = dataclasses.replace(head, table_VD=d_table_VD, bias_V=d_bias_V)
  return mean, d_x_BTD * jnp.asarray(head.scale, dtype), d_head


def _forward(
  x_BTD: jax.Array,
  head: embed.Head,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  config: LossConfig,
) -> _LossAndGradients:
  """Returns the loss, and its gradients as residuals.

  The tokens of a batch are split over mesh axes manually. The table's gradient
  is then summed on each device, and reduced over devices once, at the end, and
  scattered over the axes that split the table.
  """
  rows = manual_sharding.auto_axes('batch')
  length = manual_sharding.auto_axes('length')
  axes = rows + length
  # Gathered once, in the dtype of the products.
  table_VD = head.table_VD.astype(x_BTD.dtype)
  table_VD = sharding.constrain(table_VD, 'vocab', 'act_embed')
  args = (
    x_BTD,
    dataclasses.replace(head, table_VD=table_VD),
    targets_BT,
    weights_BT,
  )
  fn = functools.partial(_all_gradients, config=config)
  if not axes:
    return fn(*args)
  sizes = jax.sharding.get_abstract_mesh().shape
  embed_axes = tuple(a for a in manual_sharding.auto_axes('embed') if a in axes)
  if x_BTD.shape[-1] % math.prod(sizes[a] for a in embed_axes):
    embed_axes = ()
  tokens, columns = P(rows, length), P(None, embed_axes)
  head_spec = jax.tree.map(lambda _: P(), head)
  mean_spec: Any = (P(), tokens, tokens)
  return jax.shard_map(
    functools.partial(fn, axes=axes, embed_axes=embed_axes),
    in_specs=(tokens, P(), tokens, tokens),
    out_specs=(
      MeanLoss(*mean_spec),
      (tokens, dataclasses.replace(head_spec, table_VD=columns)),
    ),
    axis_names=set(axes),
    check_vma=False,
  )(*args)


def _all_gradients(
  x_BTD: jax.Array,
  head: embed.Head,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  config: LossConfig,
  axes: tuple[str, ...] = (),
  embed_axes: tuple[str, ...] = (),
) -> _LossAndGradients:
  parts = (x_BTD, targets_BT, weights_BT)
  if config.token_chunks == 1:
    mean, d_x, d_head = _chunk_gradients(head, parts, config)
  else:

    def body(
      d_head: embed.Head, part: _Tokens
    ) -> tuple[embed.Head, tuple[MeanLoss, jax.Array]]:
      mean, d_x, more = _chunk_gradients(head, part, config)
      return jax.tree.map(jnp.add, d_head, more), (mean, d_x)

    zeros = lambda a: jnp.zeros(a.shape, jnp.float32)
    start, parts = jax.tree.map(zeros, head), _split(parts, config.token_chunks)
    d_head, (mean, d_x) = jax.lax.scan(body, start, parts)
    mean, d_x = _joined(mean), jnp.moveaxis(d_x, 0, 1).reshape(x_BTD.shape)
  if axes:
    mean, d_head = _reduce(mean, d_head, axes, embed_axes, x_BTD.dtype)
  return mean, (d_x, d_head)


def _reduce(
  mean: MeanLoss,
  d_head: embed.Head,
  axes: tuple[str, ...],
  embed_axes: tuple[str, ...],
  of_products: jnp.dtype,
) -> tuple[MeanLoss, embed.Head]:
  """Sums the loss and the head's gradient over the devices of a batch.

  The table's gradient is reduced in the dtype of the products, as that of any
  matrix.

  Args:
    mean: loss of this device's tokens.
    d_head: gradient of the head from this device's tokens.
    axes: mesh axes that split the tokens.
    embed_axes: those of `axes` that split the table's dimension D.
    of_products: dtype of the products.
  """
  table_VD, dtype = d_head.table_VD, d_head.table_VD.dtype
  if not sharding.reduces_in_float32():
    table_VD = table_VD.astype(of_products)
  if embed_axes:
    table_VD = _scatter(table_VD, embed_axes)
  rest = tuple(a for a in axes if a not in embed_axes)
  table_VD = jax.lax.psum(table_VD, rest) if rest else table_VD
  total, bias_V = jax.lax.psum((mean.objective, d_head.bias_V), axes)
  table_VD = table_VD.astype(dtype)
  d_head = dataclasses.replace(d_head, table_VD=table_VD, bias_V=bias_V)
  return mean._replace(objective=total), d_head


def _scatter(table_VD: jax.Array, embed_axes: tuple[str, ...]) -> jax.Array:
  """Sums over `embed_axes`; each device keeps its part of dimension D."""
  fn = lambda part_VD: jax.lax.psum_scatter(
    part_VD, embed_axes, scatter_dimension=1, tiled=True
  )
  # Manual along V too: XLA would gather the table over its axes first.
  return manual_sharding.on_parts(fn, table_VD, 'vocab', None)


def _split(arrays: _Tokens, num: int) -> _Tokens:
  """Reshapes arrays from (B, T, ...) to (num, B, T / num, ...)."""
  split = lambda a: a.reshape(a.shape[0], num, -1, *a.shape[2:])
  return jax.tree.map(lambda a: jnp.moveaxis(split(a), 1, 0), arrays)


def _joined(means: MeanLoss) -> MeanLoss:
  """Joins the losses of chunks of tokens into one."""
  whole = lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1)
  return MeanLoss(means.objective.sum(), *map(whole, means[1:]))


def _backward(
  config: LossConfig, residuals: tuple[jax.Array, embed.Head], grads: MeanLoss
) -> tuple[jax.Array, embed.Head, None, None]:
  del config
  d_x_BTD, d_head = residuals
  scale = lambda a: (a * grads.objective).astype(a.dtype)
  return scale(d_x_BTD), jax.tree.map(scale, d_head), None, None


mean_loss.defvjp(_forward, _backward)
