"""Token embeddings and the head that turns features into logits.

Shape suffixes: B batch, T position, D embed, V vocabulary (padded).
"""

import dataclasses

from flax import nnx
import jax
import jax.numpy as jnp

from t2x import sharding
from t2x.layers import param

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
    # Gathering the embed dimension first keeps XLA from rematerialising the
    # whole table for every device.
    table_VD = self.table_VD[...].astype(dtype)
    table_VD = sharding.constrain(table_VD, 'vocab', 'act_embed')
    x_BTD = param.look_up(table_VD, tokens_BT)
    # Devices that split a sequence between layers alone may each have rows of
    # the table: they must look up the same tokens, else it is gathered whole.
    x_BTD = sharding.constrain(x_BTD, 'batch', 'length', 'act_embed')
    return sharding.constrain(x_BTD, 'batch', 'norm_length', 'act_embed')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
  """The last product, as a value that a loss can cut into pieces.

  Attributes:
    table_VD: float32 weights.
    bias_V: added to the logits, or None.
    scale: factor of the features.
    vocab_size: logits at and past it belong to padding.
  """

  table_VD: jax.Array
  bias_V: jax.Array | None = None
  scale: float = dataclasses.field(default=1.0, metadata={'static': True})
  vocab_size: int = dataclasses.field(default=0, metadata={'static': True})

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Returns float32 logits (B, T, vocab_size), without the padding."""
    logits_BTV = self.logits(x_BTD, self.table_VD, self.bias_V)
    return logits_BTV[..., : self.vocab_size]

  def logits(self, x_BTD, table_VD, bias_V):
    """Returns float32 logits for some rows of the table."""
    x_BTD = x_BTD if self.scale == 1.0 else x_BTD * self.scale
    logits_BTV = param.project(x_BTD, table_VD, LOGITS, jnp.float32)
    if bias_V is not None:
      logits_BTV = logits_BTV + bias_V[None, None]
    return logits_BTV
