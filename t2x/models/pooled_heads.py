"""Heads on an encoder's pooled output, such as those of classification.

Shape suffixes: B batch, T position, P places of targets, D embed, E classes.
"""

from collections.abc import Iterable
from typing import Protocol

from flax import nnx
import jax
import jax.numpy as jnp

from t2x.layers import embed
from t2x.layers import param
from t2x.models import loss_terms
from t2x.models import tower as tower_lib


class PooledEncoder(Protocol):
  """The parts of an encoder that its pooled heads need."""

  @property
  def tower(self) -> tower_lib.Tower:
    """The stack whose output is pooled."""
    ...

  @property
  def next_sentence(self) -> 'DenseLayer | None':
    """The head of next-sentence prediction."""
    ...

  @property
  def classes(self) -> Iterable['DenseLayer']:
    """The heads of classification."""
    ...

  def pool(self, encoded_BTD: jax.Array) -> jax.Array:
    """Returns the pooled output of the first token, (B, D)."""
    ...


def terms(
  model: PooledEncoder, x_BTD: jax.Array, batch: dict[str, jax.Array]
) -> loss_terms.Terms:
  """Returns the terms of the heads for which a batch has targets.

  Args:
    model: the encoder; its `next_sentence` head makes the term `sentence`, and
      head i of `classes` the term `class<i>`.
    x_BTD: output of its last layer.
    batch: batch with `<term>_targets` and `<term>_weights`, one for each row.
  """
  heads = {'sentence': model.next_sentence}
  heads |= {f'class{i}': head for i, head in enumerate(model.classes)}
  trained = {n: h for n, h in heads.items() if f'{n}_targets' in batch}
  if not trained:
    return {}
  x_B1D = model.pool(model.tower.end(x_BTD))[:, None]
  terms = {}
  for name, head in trained.items():
    targets_BP = batch[f'{name}_targets']
    assert head is not None, f'the model has no head for {name}'
    # If a mesh splits rows, padding follows the one target.
    shape = (*targets_BP.shape, x_BTD.shape[-1])
    terms[name] = loss_terms.Term(
      x_BTD=jnp.broadcast_to(x_B1D, shape),
      head=head.head,
      targets_BT=targets_BP,
      weights_BT=batch[f'{name}_weights'],
      is_small=True,
    )
  return terms


class DenseLayer(nnx.Module):
  """A dense layer x W + b of a head.

  Args:
    into: width of the input.
    out: width of the output.
    init: initialiser of the weights.
    rngs: random keys of the initialisation.
  """

  def __init__(
    self, into: int, out: int, init: param.Initializer, *, rngs: nnx.Rngs
  ):
    # Heads are small: only the input dimension is sharded, as `embed`.
    self.kernel_DE = param.param(rngs, (into, out), ('embed', None), init)
    self.bias_E = param.param(rngs, (out,), (None,), param.zeros)

  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    y_BTE = param.project(x_BTD, self.kernel_DE, 'BTD,DE->BTE')
    return param.add_bias(y_BTE, self.bias_E)

  @property
  def head(self) -> embed.Head:
    """The layer as an output head, for the loss."""
    table_ED = self.kernel_DE[...].T
    return embed.Head(
      table_VD=table_ED, bias_V=self.bias_E[...], vocab_size=len(table_ED)
    )
