"""The forward pass of any model, in the steps at which a pipeline cuts it.

Shape suffixes: B batch, T position, S position of an encoder's sequence, D
embed.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any
from typing import Protocol

import jax

from t2x.layers import block
from t2x.layers import embed
from t2x.layers import moe
from t2x.layers import stack
from t2x.models import loss_terms
from t2x.models import segment_memory

Batch = dict[str, Any]


class Model(Protocol):
  """What a training step and a pipeline ask of a model.

  A model is an `nnx.Module` whose layers lie in towers (stacks), each an
  attribute by its name. A forward pass enters each tower in order of depth and
  leaves the last one; `run` is that pass.

  """

  @property
  def config(self) -> Any:
    """The settings of the model; its `depths` are the layers of each tower."""
    ...

  @property
  def towers(self) -> tuple[str, ...]:
    """The names of the towers, in order of depth."""
    ...

  def context(
    self, tower: str, batch: Batch, keys_B: jax.Array | None, zigzag: int
  ) -> block.Context:
    """Returns the masks and positions that the layers of a tower share.

    Without `encoded_BSD`, which `enter` returns.

    Args:
      tower: the name of the tower.
      batch: arrays by name, see `t2x.objectives.batch_keys`; one that is
        missing or None has its default.
      keys_B: dropout keys of the rows; None means no dropout.
      zigzag: number of devices over which the tokens of a causal row lie in
        zigzag order; 1 is the order of the sequence.

    Raises:
      ValueError: more tokens than the model has positions.
    """
    ...

  def enter(
    self,
    tower: str,
    batch: Batch,
    context: block.Context,
    x_BTD: jax.Array | None,
  ) -> tuple[jax.Array, jax.Array | None]:
    """Returns a tower's first input, and the sequence that it also attends to.

    Args:
      tower: the name of the tower.
      batch: arrays by name.
      context: the result of `context`.
      x_BTD: output of the tower before; None at the first.

    Returns:
      The input (B, T, D), and `encoded_BSD` of cross-attention or None.
    """
    ...

  def leave(self, x_BTD: jax.Array, batch: Batch) -> jax.Array:
    """Returns the features (B, T, D) of the last tower's output."""
    ...

  def terms(
    self,
    x_BTD: jax.Array,
    batch: Batch,
    keys_B: jax.Array | None,
    zigzag: int,
  ) -> loss_terms.Terms:
    """Returns the terms of the loss, by name, of the last tower's output.

    Args:
      x_BTD: output of the last tower.
      batch: arrays by name, targets and their weights among them.
      keys_B: dropout keys of the rows, or None.
      zigzag: see `context`.
    """
    ...

  @property
  def head(self) -> embed.Head:
    """The head that turns features into logits of the vocabulary."""
    ...


def run(
  model: Model,
  batch: Batch,
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
  model: Model,
  batch: Batch,
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
  batch, (name,) = segment_memory.with_memory(batch, memory), model.towers
  context = model.context(name, batch, keys_B, execution.zigzag)
  x_BTD, _ = model.enter(name, batch, context, None)
  tower = getattr(model, name)
  with jax.named_scope(name):
    x_BTD, layers, stats = tower(
      x_BTD, context, caches=memory['layers'], execution=execution
    )
  stats = {f'{name}.{path}': value for path, value in stats.items()}
  return x_BTD, stats, segment_memory.next_memory(batch, layers)


def features(
  model: Model, batch: Batch, **kwargs: Any
) -> tuple[jax.Array, dict[str, moe.Stats]]:
  """Returns the features (B, T, D) that the head reads, and as `run` stats."""
  x_BTD, stats = run(model, batch, **kwargs)
  return model.leave(x_BTD, batch), stats
