"""The parts of which a model's loss is made.

Shape suffixes: B batch, T position, D embed.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from t2x.layers import embed

MAIN = ''  # The name of the term that every model has.
ROW_SHARES = 'row_shares'  # In a batch; see `with_row_shares`.


class Term(NamedTuple):
  """Features, the head that turns them into logits, and what these should be.

  Attributes:
    x_BTD: features.
    head: makes logits of them.
    targets_BT: ids, of tokens or of classes.
    weights_BT: weight of each, over those of the whole batch.
    factor: of the term in the loss.
    is_small: of a few classes, not of the vocabulary.
  """

  x_BTD: jax.Array
  head: embed.Head
  targets_BT: jax.Array
  weights_BT: jax.Array
  factor: float = 1.0
  is_small: bool = False


Terms = dict[str, Term]


def weight_names(batch) -> list[str]:
  """Returns the names of the weights in a batch, those of each term."""
  return [name for name in batch if f'_{name}'.endswith('_weights')]


def with_row_shares(batch):
  """Adds `row_shares` (B,): what a row is of the weights of the whole batch.

  Each term that has any counts alike.

  Args:
    batch: the whole of it, its weights over their sum.
  """
  each = [batch[name].sum(1) for name in weight_names(batch)]
  there = sum((share_B.sum() > 0).astype(jnp.float32) for share_B in each)
  return {**batch, ROW_SHARES: sum(each) / jnp.maximum(there, 1.0)}


def of_tokens(x_BTD: jax.Array, head: embed.Head, batch) -> Terms:
  """Returns the main term, of a batch's `targets`."""
  return {MAIN: Term(x_BTD, head, batch['targets'], batch['weights'])}
