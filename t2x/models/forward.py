"""A forward pass in order of depth, in the steps that a pipeline cuts.

A model names its towers (stacks of layers) in order of depth, and for each

  context(tower, batch, keys_B, zigzag)  what its layers share, a
                                         `block.Context` without `encoded_BSD`;
  enter(tower, batch, context, x)        its first input, of the output x of the
                                         tower before (None at the first), and
                                         what its layers look at besides
                                         (`encoded_BSD`) or None;

and leave(x, batch), the features that reach the head, of the output of the
last, and terms(x, batch, keys_B, zigzag), what the loss is made of.

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
    model: of any architecture.
    batch: its inputs by name; None is as good as missing.
    towers: names of the first towers; default all.
    keys_B: dropout keys of the rows; None means no dropout.
    execution: scan or unroll, what to recompute, and in which order the tokens
      of a row come.

  Returns:
    The last tower's output (B, T, D), not yet normalised, and what the routers
    of mixtures of experts did, by their paths in the model.

  Raises:
    ValueError: more tokens than the model has positions.
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
  """Runs a model of one tower that remembers the rows before.

  Args:
    model: with `config.memory`.
    batch: its inputs by name.
    memory: of the rows before; see `t2x.models.segment_memory`.
    keys_B: as for `run`.
    execution: as for `run`.

  Returns:
    What `run` does, and the memory for the next rows.
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
  model: Any, batch: dict[str, Any], **kwargs
) -> tuple[jax.Array, dict[str, moe.Stats]]:
  """Returns the features (B, T, D) that the head reads; otherwise as `run`."""
  x_BTD, stats = run(model, batch, **kwargs)
  return model.leave(x_BTD, batch), stats
