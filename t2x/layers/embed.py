"""Token embeddings, and the head that computes logits.

Shape suffixes: B batch, T position, D embed, V vocabulary (padded).
"""

import dataclasses
import math
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from t2x.layers import param
from t2x.parallel import manual_sharding
from t2x.parallel import sharding

LOGITS = 'BTD,VD->BTV'  # The head's product.


def padded(vocab_size: int, multiple: int) -> int:
  """Returns the number of rows of a table: `vocab_size`, rounded up."""
  return -(-vocab_size // multiple) * multiple


class Embed(nnx.Module):
  """A table of token vectors.

  The number of rows is padded so that mesh axes divide it. Rows past the
  vocabulary are never looked up, and the head removes their logits.
  """

  def __init__(
    self, rows: int, embed: int, *, init: param.Initializer, rngs: nnx.Rngs
  ):
    self.table_VD = param.param(rngs, (rows, embed), ('vocab', 'embed'), init)

  def __call__(
    self, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike
  ) -> jax.Array:
    """Returns the vectors of tokens, (B, T, D), in `dtype`."""
    x_BTD = _exchanged(self.table_VD, tokens_BT, dtype)
    if x_BTD is not None:
      return sharding.constrain(x_BTD, 'batch', 'norm_length', 'act_embed')
    # Gathering the embed dimension first keeps XLA from rematerialising the
    # whole table for every device.
    table_VD = self.table_VD[...].astype(dtype)
    table_VD = sharding.constrain(table_VD, 'vocab', 'act_embed')
    x_BTD = param.look_up(table_VD, tokens_BT)
    # Devices that split a sequence between layers alone may each have rows of
    # the table: they must look up the same tokens, else it is gathered whole.
    x_BTD = sharding.constrain(x_BTD, 'batch', 'length', 'act_embed')
    return sharding.constrain(x_BTD, 'batch', 'norm_length', 'act_embed')


def _exchanged(
  table_VD: nnx.Param, tokens_BT: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array | None:
  """Looks up tokens on the devices that hold the columns, and exchanges them.

  Where mesh axes split both the rows of a batch and the columns of the table,
  each device looks up its columns for the rows of all devices, and an
  all-to-all exchange gives it all columns of its own rows. The gradient comes
  back by another exchange and is summed on the device that holds the columns.
  No device ever holds the whole table.

  The stages of a pipeline always do this. The partitioner by itself would
  gather the whole gradients of all rows for each part of a table, and where
  the vocabulary is split as well it fails (libtpu 0.0.52).

  Args:
    table_VD: the table.
    tokens_BT: tokens to look up.
    dtype: dtype of the result.

  Returns:
    (B, T, D), or None where sending the table is cheaper.
  """
  mesh = jax.sharding.get_abstract_mesh()
  embed, rows = (
    manual_sharding.auto_axes('embed'),
    manual_sharding.auto_axes('batch'),
  )
  length, vocab = (
    manual_sharding.auto_axes('length'),
    manual_sharding.auto_axes('vocab'),
  )
  # Devices that split the vocabulary must look up the same tokens.
  if {*vocab} & {*rows, *length}:
    return None
  if not {*embed} <= {*rows}:
    return None
  staged = manual_sharding.in_stage()
  if not (embed or staged and vocab):
    return None
  (B, T), (V, D) = tokens_BT.shape, table_VD.shape
  parts = lambda axes: math.prod(mesh.shape[a] for a in axes)
  if B % parts(rows) or T % parts(length) or D % parts(embed):
    return None
  tokens = B // parts(rows) * T // parts(length)
  size = jnp.dtype(dtype).itemsize
  # Compares two activations with the table and its float32 gradient.
  if not staged and 2 * tokens * size >= V // parts(vocab) * (size + 4):
    return None

  def local(table_VD: jax.Array, tokens_BT: jax.Array) -> Any:
    there_BT = None
    if embed:
      tokens_BT = jax.lax.all_gather(tokens_BT, embed, axis=0, tiled=True)
    if vocab:
      num = table_VD.shape[0]
      tokens_BT = tokens_BT - jax.lax.axis_index(vocab) * num
      there_BT = (tokens_BT >= 0) & (tokens_BT < num)
      tokens_BT = jnp.where(there_BT, tokens_BT, 0)
    x_BTD = param.look_up(table_VD, tokens_BT).astype(dtype)
    if there_BT is not None:
      x_BTD = jnp.where(there_BT[..., None], x_BTD, 0)
    if embed:
      x_BTD = jax.lax.all_to_all(x_BTD, embed, 0, 2, tiled=True)
    return manual_sharding.sum_parts(x_BTD, vocab) if vocab else x_BTD

  return jax.shard_map(
    local,
    in_specs=(P(vocab, embed), P(rows, length)),
    out_specs=P(rows, length),
    # With all axes the gradient would also be summed over those of one device.
    axis_names={*embed, *rows, *length, *vocab},
    check_vma=False,
  )(table_VD[...], tokens_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
  """The weights of the last product, which a loss may apply piece by piece.

  Attributes:
    table_VD: float32 weights.
    bias_V: bias of the logits, or None.
    scale: factor of the features.
    soft_cap: bound of the logits, which become cap * tanh(logit / cap); None is
      no bound.
    vocab_size: number of tokens; logits past it belong to padding.
  """

  table_VD: jax.Array
  bias_V: jax.Array | None = None
  scale: float = dataclasses.field(default=1.0, metadata={'static': True})
  soft_cap: float | None = dataclasses.field(
    default=None, metadata={'static': True}
  )
  vocab_size: int = dataclasses.field(default=0, metadata={'static': True})

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Returns float32 logits (B, T, vocab_size), without the padding."""
    with jax.named_scope('head'):
      logits_BTV = self.logits(x_BTD, self.table_VD, self.bias_V)
    return logits_BTV[..., : self.vocab_size]

  def logits(
    self, x_BTD: jax.Array, table_VD: jax.Array, bias_V: jax.Array | None
  ) -> jax.Array:
    """Returns float32 logits for some rows of the table.

    Args:
      x_BTD: features.
      table_VD: rows of the table.
      bias_V: bias of these rows, or None.
    """
    x_BTD = x_BTD if self.scale == 1.0 else x_BTD * self.scale
    logits_BTV = param.project(x_BTD, table_VD, LOGITS, jnp.float32)
    if bias_V is not None:
      logits_BTV = logits_BTV + bias_V[None, None]
    if self.soft_cap is not None:
      logits_BTV = self.soft_cap * jnp.tanh(logits_BTV / self.soft_cap)
    return logits_BTV

  def uncapped_gradient(
    self, grad_BTV: jax.Array, logits_BTV: jax.Array
  ) -> jax.Array:
    """Returns the gradient of the logits before the soft cap.

    Args:
      grad_BTV: gradient of the logits.
      logits_BTV: the logits, after the soft cap.
    """
    if self.soft_cap is None:
      return grad_BTV
    # The derivative of tanh(x) is 1 - tanh(x)^2.
    return grad_BTV * (1.0 - jnp.square(logits_BTV / self.soft_cap))
