"""Token embeddings and the head that turns features into logits.

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
  """Returns the rows of a table: `vocab_size` rounded up to a multiple."""
  return -(-vocab_size // multiple) * multiple


class Embed(nnx.Module):
  """A table of token vectors.

  Its rows are padded so that mesh axes divide them; rows past the vocabulary
  are never looked up, and the head masks their logits.
  """

  def __init__(
    self, rows: int, embed: int, *, init: param.Initializer, rngs: nnx.Rngs
  ):
    self.table_VD = param.param(rngs, (rows, embed), ('vocab', 'embed'), init)

  def __call__(self, tokens_BT: jax.Array, dtype) -> jax.Array:
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
  table_VD: nnx.Param, tokens_BT: jax.Array, dtype
) -> jax.Array | None:
  """Looks up tokens where the columns are, and sends what was found.

  Where mesh axes split both the rows of a batch and the columns of the table,
  each device looks up its columns for the rows of all, and an all-to-all gives
  it all columns of its own. The gradient comes back by another, and is summed
  where it belongs. No device ever holds the table.

  Stages of a pipeline always do so: left to itself, the partitioner gathers
  whole gradients of all rows for each part of a table, and where the
  vocabulary is split as well it fails (libtpu 0.0.52).

  Returns:
    (B, T, D), or None where the table is the less to send.
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
  if {*vocab} & {*rows, *length}:  # They must look up the same tokens.
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
  # Two activations, or the table and its float32 gradient.
  if not staged and 2 * tokens * size >= V // parts(vocab) * (size + 4):
    return None

  def local(table_VD, tokens_BT) -> Any:
    if embed:
      tokens_BT = jax.lax.all_gather(tokens_BT, embed, axis=0, tiled=True)
    if vocab:
      num = table_VD.shape[0]
      tokens_BT = tokens_BT - jax.lax.axis_index(vocab) * num
      there_BT = (tokens_BT >= 0) & (tokens_BT < num)
      tokens_BT = jnp.where(there_BT, tokens_BT, 0)
    x_BTD = param.look_up(table_VD, tokens_BT).astype(dtype)
    if vocab:
      x_BTD = jnp.where(there_BT[..., None], x_BTD, 0)
    if embed:
      x_BTD = jax.lax.all_to_all(x_BTD, embed, 0, 2, tiled=True)
    return manual_sharding.sum_parts(x_BTD, vocab) if vocab else x_BTD

  return jax.shard_map(
    local,
    in_specs=(P(vocab, embed), P(rows, length)),
    out_specs=P(rows, length),
    # Else the gradient would be summed over axes of one device, too.
    axis_names={*embed, *rows, *length, *vocab},
    check_vma=False,
  )(table_VD[...], tokens_BT)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
  """The last product, as a value that a loss can cut into pieces.

  Attributes:
    table_VD: float32 weights.
    bias_V: added to the logits, or None.
    scale: factor of the features.
    soft_cap: bounds logits by cap * tanh(logit / cap); None does not.
    vocab_size: logits at and past it belong to padding.
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

  def logits(self, x_BTD, table_VD, bias_V):
    """Returns float32 logits for some rows of the table."""
    x_BTD = x_BTD if self.scale == 1.0 else x_BTD * self.scale
    logits_BTV = param.project(x_BTD, table_VD, LOGITS, jnp.float32)
    if bias_V is not None:
      logits_BTV = logits_BTV + bias_V[None, None]
    if self.soft_cap is not None:
      logits_BTV = self.soft_cap * jnp.tanh(logits_BTV / self.soft_cap)
    return logits_BTV

  def uncapped_gradient(self, grad_BTV, logits_BTV):
    """Returns the gradient of what `soft_cap` made `logits_BTV` of."""
    if self.soft_cap is None:
      return grad_BTV
    # The derivative of tanh(x) is 1 - tanh(x)^2.
    return grad_BTV * (1.0 - jnp.square(logits_BTV / self.soft_cap))
