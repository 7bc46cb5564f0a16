"""The forward pass of any model, in the steps at which a pipeline cuts it.

A model has the names of its towers (stacks of layers) in `towers`, in order of
depth, and four methods:

  context(tower, batch, keys_B, zigzag)  returns the `block.Context` that the
                                         layers of a tower share, without
                                         `encoded_BSD`;
  enter(tower, batch, context, x)        returns the input of a tower's first
                                         layer, from the output x of the tower
                                         before (None for the first), and the
                                         `encoded_BSD` to which its layers
                                         attend, or None;
  leave(x, batch)                        returns the features that reach the
                                         head, from the last tower's output;
  terms(x, batch, keys_B, zigzag)        returns the terms of the loss.

Shape suffixes: B batch, T position, D embed.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax

from t2x.layers import moe
from t2x.layers import stack
from t2x.models import segment_memory


def run(
  model: Any,
  batch: dict[str, Any],
  towers: Sequence[str] | None = None,
  *,
  keys_B: jax.Array | None = None,
  execution: stack.Execution = stack.Execution(),
) -> tuple[jax.Array, dict[str, moe.Stats]]:
  """Runs towers one after another.

  Args:
    model: a model of any architecture.
    batch: inputs by name; an array that is None counts as missing.
    towers: names of the first towers to run; None for all.
    keys_B: dropout keys of the rows; None for no dropout.
    execution: scan or unroll, tensors to recompute, and order of the tokens of
      a row.

  Returns:
    The last tower's output (B, T, D), before its final norm, and the statistics
    of the routers of mixtures of experts, by their paths in the model.

  Raises:
    ValueError: if there are more tokens than the model has positions.
  """
  x_BTD, all_stats = None, {}
  for name in towers or model.towers:
    context = model.context(name, batch, keys_B, execution.zigzag)
    x_BTD, encoded_BSD = model.enter(name, batch, context, x_BTD)
    context = dataclasses.replace(context, encoded_BSD=encoded_BSD)
    tower = getattr(model, name)
    with jax.named_scope(name):
      x_BTD, _, stats = tower(x_BTD, context, execution=execution)
    all_stats |= {f'{name}.{path}': value for path, value in stats.items()}
  assert x_BTD is not None, 'a model has a tower'
  return x_BTD, all_stats


def recall(
  model: Any,
  batch: dict[str, Any],
  memory: dict[str, Any],
  *,
  keys_B: jax.Array | None = None,
  execution: stack.Execution = stack.Execution(),
) -> tuple[jax.Array, dict[str, moe.Stats], dict[str, Any]]:
  """Runs a model of one tower with a memory of earlier rows.

  Args:
    model: a model with `config.memory`.
    batch: inputs by name.
    memory: memory of the rows before; see `t2x.models.segment_memory`.
    keys_B: dropout keys of the rows; None for no dropout.
    execution: scan or unroll, tensors to recompute, and order of the tokens of
      a row.

  Returns:
    The two results of `run`, and the memory for the next rows.
  """
  batch, (name,) = segment_memory.seen(batch, memory), model.towers
  context = model.context(name, batch, keys_B, execution.zigzag)
  x_BTD, _ = model.enter(name, batch, context, None)
  tower = getattr(model, name)
  with jax.named_scope(name):
    x_BTD, layers, stats = tower(
      x_BTD, context, caches=memory['layers'], execution=execution
    )
  stats = {f'{name}.{path}': value for path, value in stats.items()}
  return x_BTD, stats, segment_memory.kept(batch, layers)


def features(
  model: Any, batch: dict[str, Any], **kwargs: Any
) -> tuple[jax.Array, dict[str, moe.Stats]]:
  """Returns the features (B, T, D) that the head reads, and as `run` stats."""
  x_BTD, stats = run(model, batch, **kwargs)
  return model.leave(x_BTD, batch), stats
