"""The terms that make up a model's loss.

Shape suffixes: B batch, T position, D embed.
"""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t2x.layers import embed

MAIN = ''  # The name of the term that every model has.
ROW_SHARES = 'row_shares'  # Batch key; see `with_row_shares`.


class Term(NamedTuple):
  """One term of the loss: features, their head, and targets.

  Attributes:
    x_BTD: features.
    head: output head, which turns features into logits.
    targets_BT: ids of tokens or of classes.
    weights_BT: weight of each target, divided by those of the whole batch.
    factor: factor of the term in the loss.
    is_small: whether the targets are a few classes, and not the vocabulary.
  """

  x_BTD: jax.Array
  head: embed.Head
  targets_BT: jax.Array
  weights_BT: jax.Array
  factor: float = 1.0
  is_small: bool = False


Terms = dict[str, Term]


def weight_names(batch: Iterable[str]) -> list[str]:
  """Returns the names of a batch's arrays of weights, one for each term."""
  return [name for name in batch if f'_{name}'.endswith('_weights')]


def with_row_shares(batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Adds `row_shares` (B,): the share of each row in the weights of a batch.

  All terms with any weight count equally.

  Args:
    batch: a whole batch, whose weights are divided by their sum.
  """
  each = [batch[name].sum(1) for name in weight_names(batch)]
  num_terms = sum((share_B.sum() > 0).astype(jnp.float32) for share_B in each)
  return {**batch, ROW_SHARES: sum(each) / jnp.maximum(num_terms, 1.0)}


def of_tokens(
  x_BTD: jax.Array, head: embed.Head, batch: dict[str, jax.Array]
) -> Terms:
  """Returns the main term, of the tokens to predict.

  Args:
    x_BTD: features.
    head: output head.
    batch: batch with `targets` and `weights`.
  """
  return {MAIN: Term(x_BTD, head, batch['targets'], batch['weights'])}
