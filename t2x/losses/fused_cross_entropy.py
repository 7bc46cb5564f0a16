"""Cross-entropy whose gradients are made along with it, chunk by chunk.

With p the probabilities, a smoothing e over V tokens and a z-loss z, a token of
weight w has the gradient

  d logits = w (p (1 + 2 z log_sum) - (1 - e) onehot(target) - e / V),

which needs nothing that the loss has not just made; where a soft cap c bounds
logits y = c tanh(x / c), d x = (1 - (y / c)^2) d y. So logits live only while
their chunk does, and no product runs twice.

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
  """What is minimised for each token.

  Attributes:
    label_smoothing: share of the target given to the uniform distribution
      (Szegedy et al., 2016).
    z_loss: weight of the squared log-sum-exp of the logits (Chowdhery et al.,
      2022).
    vocab_chunks: pieces of the vocabulary; logits of one piece exist at a
      time, and the backward pass computes them again. 1 keeps all logits.
    token_chunks: pieces of the sequence; the logits of one piece exist at a
      time. The gradient of each is made along with its loss, while its logits
      are there, so nothing is computed twice.
  """

  label_smoothing: float = 0.0
  z_loss: float = 0.0
  vocab_chunks: int = 1
  token_chunks: int = 1

  def __post_init__(self):
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
  """A weighted sum over all tokens, and what it is made of, float32.

  Attributes:
    objective: what is minimised, smoothing and z-loss included; a scalar.
    nll_BT: minus the log-probability of each target, in nats.
    correct_BT: 1 where the target has the largest logit.
  """

  objective: jax.Array
  nll_BT: jax.Array
  correct_BT: jax.Array


def objective(nll_BT, log_sum_BT, mean_logit_BT, config: LossConfig):
  """Returns what is minimised for each token, smoothing and z-loss included."""
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
  """Returns the weighted sum; only `objective` has a gradient."""
  fn = lambda part: _losses(head, part, config)[0]
  parts = (x_BTD, targets_BT, weights_BT)
  if config.token_chunks == 1:
    return fn(parts)
  return _joined(jax.lax.map(fn, _split(parts, config.token_chunks)))


class _Softmax(NamedTuple):
  """What the gradient takes from the loss: exp(logits - largest) and more."""

  logits_BTV: jax.Array
  exp_BTV: jax.Array
  exp_sum_BT: jax.Array
  log_sum_BT: jax.Array
  is_target_BTV: jax.Array
  is_token_V: jax.Array | None


def _losses(head, part, config: LossConfig) -> tuple[MeanLoss, _Softmax]:
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


def _where(is_token_V, logits_BTV, other):
  if is_token_V is None:
    return logits_BTV
  return jnp.where(is_token_V[None, None], logits_BTV, other)


def _pick(logits_BTV, targets_BT, is_target_BTV):
  if manual_sharding.auto_axes(
    'vocab'
  ):  # A sum needs no row that is elsewhere.
    return jnp.where(is_target_BTV, logits_BTV, 0.0).sum(-1)
  return jnp.take_along_axis(logits_BTV, targets_BT[..., None], -1)[..., 0]


def _chunk_gradients(head, part, config: LossConfig):
  """Returns the sums of a part, and its gradients by features and head."""
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
  # Factors in the dtype of products, which a TPU rounds to anyhow; GPUs would
  # hold one of float32 beside the other, XLA for CPUs has no such product.
  # Summed over chunks in float32.
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


def _forward(x_BTD, head, targets_BT, weights_BT, config):
  """Returns the loss, and its gradients as residuals.

  The tokens of a batch are split over mesh axes by hand, so that the table's
  gradient is summed on each device and reduced over them once, at the end, and
  scattered over those that split the table.
  """
  rows, length = (
    manual_sharding.auto_axes('batch'),
    manual_sharding.auto_axes('length'),
  )
  axes = rows + length
  # Gathered in the dtype of the products, once.
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
  x_BTD, head, targets_BT, weights_BT, *, config, axes=(), embed_axes=()
):
  parts = (x_BTD, targets_BT, weights_BT)
  if config.token_chunks == 1:
    mean, d_x, d_head = _chunk_gradients(head, parts, config)
  else:

    def body(d_head, part):
      mean, d_x, more = _chunk_gradients(head, part, config)
      return jax.tree.map(jnp.add, d_head, more), (mean, d_x)

    zeros = lambda a: jnp.zeros(a.shape, jnp.float32)
    start, parts = jax.tree.map(zeros, head), _split(parts, config.token_chunks)
    d_head, (mean, d_x) = jax.lax.scan(body, start, parts)
    mean, d_x = _joined(mean), jnp.moveaxis(d_x, 0, 1).reshape(x_BTD.shape)
  if axes:
    mean, d_head = _reduce(mean, d_head, axes, embed_axes, x_BTD.dtype)
  return mean, (d_x, d_head)


def _reduce(mean, d_head, axes, embed_axes, of_products):
  """Sums over the devices that share a batch.

  The table's gradient in the dtype of the products, as that of any matrix.
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


def _scatter(table_VD, embed_axes):
  """Sums over `embed_axes`, each device keeping its part of dimension D."""
  fn = lambda part_VD: jax.lax.psum_scatter(
    part_VD, embed_axes, scatter_dimension=1, tiled=True
  )
  # By hand along V too: XLA would gather the table over these axes first.
  return manual_sharding.on_parts(fn, table_VD, 'vocab', None)


def _split(arrays, num: int):
  """(B, T, ...) to (num, B, T / num, ...)."""
  split = lambda a: a.reshape(a.shape[0], num, -1, *a.shape[2:])
  return jax.tree.map(lambda a: jnp.moveaxis(split(a), 1, 0), arrays)


def _joined(means: MeanLoss) -> MeanLoss:
  """Puts the losses of chunks of tokens together."""
  whole = lambda a: jnp.moveaxis(a, 0, 1).reshape(a.shape[1], -1)
  return MeanLoss(means.objective.sum(), *map(whole, means[1:]))


def _backward(config, residuals, grads: MeanLoss):
  del config
  d_x, d_head = residuals
  scale = lambda a: (a * grads.objective).astype(a.dtype)
  return scale(d_x), jax.tree.map(scale, d_head), None, None


mean_loss.defvjp(_forward, _backward)
