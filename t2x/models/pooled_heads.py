"""Heads on the first token of an encoder's output.

Shape suffixes: B batch, T position, P places of targets, D embed, E classes.
"""

from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp

from t2x.layers import embed
from t2x.layers import param
from t2x.models import loss_terms


def terms(model: Any, x_BTD: jax.Array, batch) -> loss_terms.Terms:
  """Returns the terms of the heads for which a batch has targets.

  Args:
    model: an encoder; `next_sentence` makes the term `sentence`, head i of
      `classes` the term `class<i>`.
    x_BTD: its last layer's output.
    batch: with `<term>_targets` and `<term>_weights`, one of a row.
  """
  heads = {'sentence': model.next_sentence}
  heads |= {f'class{i}': head for i, head in enumerate(model.classes)}
  asked = {n: h for n, h in heads.items() if f'{n}_targets' in batch}
  if not asked:
    return {}
  x_B1D = model.pool(model.tower.end(x_BTD))[:, None]
  found = {}
  for name, head in asked.items():
    targets_BP = batch[f'{name}_targets']
    assert head is not None, f'the model has no head for {name}'
    # Where a mesh splits rows there is padding after the one target.
    shape = (*targets_BP.shape, x_BTD.shape[-1])
    found[name] = loss_terms.Term(
      x_BTD=jnp.broadcast_to(x_B1D, shape),
      head=head.head,
      targets_BT=targets_BP,
      weights_BT=batch[f'{name}_weights'],
      is_small=True,
    )
  return found


class Dense(nnx.Module):
  """x W + b, for heads."""

  def __init__(
    self, into: int, out: int, init: param.Initializer, *, rngs: nnx.Rngs
  ):
    # Heads are small: the output stays whole, the input follows `embed`.
    self.kernel_DE = param.param(rngs, (into, out), ('embed', None), init)
    self.bias_E = param.param(rngs, (out,), (None,), param.zeros)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    y_BTE = param.project(x_BTD, self.kernel_DE, 'BTD,DE->BTE')
    return param.add_bias(y_BTE, self.bias_E)

  @property
  def head(self) -> embed.Head:
    """The same product, for a loss."""
    table_ED = self.kernel_DE[...].T
    return embed.Head(
      table_VD=table_ED, bias_V=self.bias_E[...], vocab_size=len(table_ED)
    )
