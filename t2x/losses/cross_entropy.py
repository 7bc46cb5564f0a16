"""Cross-entropy in chunks, with memory that does not grow with the vocabulary.

Shape suffixes: B batch, T position, D embed, V vocabulary, C rows of a chunk.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t2x.layers import embed
from t2x.losses import fused_cross_entropy
from t2x.losses import loss_based_masking
from t2x.losses import task_weighting
from t2x.models import loss_terms
from t2x.parallel import sharding

_NEVER = -1e30


LossConfig = fused_cross_entropy.LossConfig
MeanLoss = fused_cross_entropy.MeanLoss


class TokenLoss(NamedTuple):
  """The loss of each token, float32.

  Attributes:
    objective_BT: minimised loss, with label smoothing and z-loss.
    nll_BT: minus the log-probability of the target, in nats.
    correct_BT: 1.0 where the target has the largest logit.
  """

  objective_BT: jax.Array
  nll_BT: jax.Array
  correct_BT: jax.Array


class _Sums(NamedTuple):
  """Running reductions over the vocabulary, each (B, T).

  Attributes:
    largest: largest logit.
    exp_sum: sum of exp(logit - largest).
    picked: logit of the target.
    logit_sum: sum of the logits.
  """

  largest: jax.Array
  exp_sum: jax.Array
  picked: jax.Array
  logit_sum: jax.Array


def token_loss(
  x_BTD: jax.Array,
  head: embed.Head,
  targets_BT: jax.Array,
  config: LossConfig = LossConfig(),
) -> TokenLoss:
  """Returns the loss of every token.

  Args:
    x_BTD: features.
    head: output head; padded rows of its table are ignored.
    targets_BT: target ids.
    config: label smoothing, z-loss and number of chunks.

  Raises:
    ValueError: if the chunks do not divide the rows of the head's table.
  """
  rows = head.table_VD.shape[0]
  num = config.vocab_chunks
  if rows % num:
    raise ValueError(
      f'train.loss.vocab_chunks={num} does not divide the {rows} rows of the '
      'vocabulary table. Choose a divisor, or set model.vocab_multiple to a '
      f'multiple of {num}.'
    )
  if num == 1:
    sums = _reduce(x_BTD, head, head.table_VD, head.bias_V, targets_BT, 0, 1)
  else:
    sums = _reduce_chunks(x_BTD, head, targets_BT, num)
  log_sum = sums.largest + jnp.log(sums.exp_sum)
  nll = log_sum - sums.picked
  mean_logit = sums.logit_sum / head.vocab_size
  objective = fused_cross_entropy.objective(nll, log_sum, mean_logit, config)
  correct = (sums.picked >= sums.largest).astype(jnp.float32)
  return TokenLoss(objective, nll, correct)


def _reduce(
  x_BTD: jax.Array,
  head: embed.Head,
  table_CD: jax.Array,
  bias_C: jax.Array | None,
  targets_BT: jax.Array,
  chunk: int | jax.Array,
  num: int,
) -> _Sums:
  """Returns the reductions over one chunk of the vocabulary.

  Args:
    x_BTD: features.
    head: output head.
    table_CD: rows chunk, chunk + num, chunk + 2 num, ... of the head's table.
    bias_C: biases of these rows; None without bias.
    targets_BT: target ids.
    chunk: number of the chunk.
    num: number of chunks.
  """
  logits_BTC = head.logits(x_BTD, table_CD, bias_C)
  ids_C = jnp.arange(table_CD.shape[0]) * num + chunk
  is_token = (ids_C < head.vocab_size)[None, None]
  logits_BTC = jnp.where(is_token, logits_BTC, _NEVER)
  largest = jax.lax.stop_gradient(logits_BTC.max(-1))
  is_target = ids_C[None, None] == targets_BT[..., None]
  return _Sums(
    largest=largest,
    exp_sum=jnp.exp(logits_BTC - largest[..., None]).sum(-1),
    # A masked sum fuses with its neighbours; a gather would not, and its
    # gradient would be a scatter into a (B, T, V) array.
    picked=jnp.where(is_target, logits_BTC, 0.0).sum(-1),
    logit_sum=jnp.where(is_token, logits_BTC, 0.0).sum(-1),
  )


def _reduce_chunks(
  x_BTD: jax.Array, head: embed.Head, targets_BT: jax.Array, num: int
) -> _Sums:
  # Chunk c has every num-th row, so a table that is sharded by rows is not
  # moved. Its other dimension is gathered here, once, and not in each step of
  # the loop and of the backward pass. The gradient of each row is computed in
  # one chunk, so it is reduced once.
  split = lambda a: jnp.moveaxis(a.reshape(-1, num, *a.shape[1:]), 1, 0)
  table_VD = head.table_VD
  if not sharding.reduces_in_float32():  # Its gradient has the table's dtype.
    table_VD = table_VD.astype(x_BTD.dtype)
  tables = split(sharding.constrain(table_VD, 'vocab', 'act_embed'))
  biases = None if head.bias_V is None else split(head.bias_V)

  @jax.checkpoint
  def body(
    sums: _Sums, part: tuple[jax.Array, jax.Array, jax.Array | None]
  ) -> tuple[_Sums, None]:
    chunk, table_CD, bias_C = part
    new = _reduce(x_BTD, head, table_CD, bias_C, targets_BT, chunk, num)
    largest = jnp.maximum(sums.largest, new.largest)
    rescale = lambda s: s.exp_sum * jnp.exp(s.largest - largest)
    return _Sums(
      largest=largest,
      exp_sum=rescale(sums) + rescale(new),
      picked=sums.picked + new.picked,
      logit_sum=sums.logit_sum + new.logit_sum,
    ), None

  zeros = jnp.zeros(targets_BT.shape, jnp.float32)
  start = _Sums(zeros + _NEVER, zeros, zeros, zeros)
  return jax.lax.scan(body, start, (jnp.arange(num), tables, biases))[0]


def of_terms(
  terms: loss_terms.Terms,
  config: LossConfig = LossConfig(),
  *,
  batch: dict[str, jax.Array] | None = None,
  by_token: bool = False,
  num_tasks: int = 0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
  """Returns the loss of a model's terms, and metrics, float32 scalars.

  Args:
    terms: terms of the loss, by name; small ones are not cut into chunks.
    config: label smoothing, z-loss and number of chunks.
    batch: the batch of the terms, needed for the weights of tasks; None without
      tasks.
    by_token: whether to measure the main term for each token of the vocabulary,
      see `loss_based_masking`.
    num_tasks: number of tasks K for which to measure each term: weighted sums
      of nll and accuracy, and the share of the weights, (3, K), as
      NAME_by_task; 0 for no tasks.

  Returns:
    The sum of the terms' weighted losses times their factors, and a dict of
    metrics: `nll` (nats) and `accuracy`, weighted sums of the main term, and
    NAME_nll and NAME_accuracy for the other terms.
  """
  loss, sums, batch = jnp.float32(0.0), {}, batch or {}
  factors_B = batch.get(task_weighting.FACTORS)
  for name, term in terms.items():
    weights_BT = term.weights_BT
    scaled_BT = weights_BT
    if factors_B is not None:
      scaled_BT = weights_BT * factors_B[:, None]
    parts = term.x_BTD, term.head, term.targets_BT, scaled_BT
    # A few classes are no vocabulary: no mesh axis splits them.
    mean = (
      _small_loss(*parts, config)
      if term.is_small
      else mean_loss(*parts, config)
    )
    loss = loss + term.factor * mean.objective
    prefix = f'{name}_' if name else ''
    sums[f'{prefix}nll'] = (mean.nll_BT * weights_BT).sum()
    sums[f'{prefix}accuracy'] = (mean.correct_BT * weights_BT).sum()
    if num_tasks:
      parts = mean.nll_BT * weights_BT, mean.correct_BT * weights_BT, weights_BT
      sums[f'{prefix}{task_weighting.BY_TASK}'] = task_weighting.by_task(
        [part.sum(1) for part in parts], batch, num_tasks
      )
    if by_token and name == loss_terms.MAIN:
      sums[loss_based_masking.NAME] = loss_based_masking.sums_by_token(
        mean.nll_BT, term.targets_BT, weights_BT, len(term.head.table_VD)
      )
  return loss, sums


@jax.named_scope('head')
def _small_loss(
  x_BTD: jax.Array,
  head: embed.Head,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  config: LossConfig,
) -> MeanLoss:
  """Returns the `mean_loss` of a head of a few classes, without chunks."""
  whole = dataclasses.replace(config, vocab_chunks=1, token_chunks=1)
  return _of_tokens(token_loss(x_BTD, head, targets_BT, whole), weights_BT)


def _of_tokens(losses: TokenLoss, weights_BT: jax.Array) -> MeanLoss:
  total = (losses.objective_BT * weights_BT).sum()
  return MeanLoss(total, losses.nll_BT, losses.correct_BT)


@jax.named_scope('head')
def mean_loss(
  x_BTD: jax.Array,
  head: embed.Head,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  config: LossConfig = LossConfig(),
) -> MeanLoss:
  """Returns the weighted sum of the tokens' losses.

  Args:
    x_BTD: features.
    head: output head.
    targets_BT: target ids.
    weights_BT: weight of each token, divided by the weight of the whole batch.
    config: label smoothing, z-loss and number of chunks.

  Raises:
    ValueError: if the chunks do not divide the vocabulary or the sequence.
  """
  if config.vocab_chunks > 1:
    return _of_tokens(token_loss(x_BTD, head, targets_BT, config), weights_BT)
  if x_BTD.shape[1] % config.token_chunks:
    raise ValueError(
      f'train.loss.token_chunks={config.token_chunks} does not divide the '
      f'{x_BTD.shape[1]} tokens of a row. Choose a divisor.'
    )
  return fused_cross_entropy.mean_loss(
    x_BTD, head, targets_BT, weights_BT, config
  )
