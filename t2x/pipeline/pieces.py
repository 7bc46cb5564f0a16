"""A model's forward and backward pass, cut into the programs of a pipeline.

A message between parts has an activation for each tower. In a part of tower t
entry t is the activation that the part's layers change; the entries before it
are the outputs of earlier towers, for cross-attention.

Shape suffixes: B rows of a microbatch, E experts.
"""

from collections.abc import Callable
import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t2x.layers import block
from t2x.layers import dropout
from t2x.losses import load_balancing
from t2x.models import loss_terms
from t2x.models import model as model_lib
from t2x.pipeline import cut

# The arrays of a microbatch by name, (B, ...) each.
Rows = dict[str, jax.Array]
# An activation for each tower, or its gradient.
Activations = tuple[jax.Array, ...]
# `cross_entropy.of_terms` with its settings.
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
# (trained parameters, other parameters) -> a model or a layer with all of them.
Combine = Callable[[Any, Any], Any]


class OtherInputs(NamedTuple):
  """Inputs of a piece that have no gradient.

  Attributes:
    rows: arrays of the microbatch by name. They include `rows`, the numbers of
      the rows in the global batch, and `weights`, which are divided by those of
      the whole batch.
    key: dropout key of the step, or None without dropout.
    number: number of the layer in its tower, an int32 scalar.
  """

  rows: Rows
  key: jax.Array | None
  number: jax.Array | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class MicrobatchPrograms:
  """The programs of one microbatch.

  Attributes:
    enter: program of each tower that makes its input of the output of the tower
      before.
    layers: programs of each tower, one for each layer of a unit.
    leave: program that makes the loss of the last output.
    state: shapes of a message between parts.
  """

  enter: tuple[cut.Cut, ...]
  layers: tuple[tuple[cut.Cut, ...], ...]
  leave: cut.Cut
  state: tuple[jax.ShapeDtypeStruct, ...]


def make(
  shared: model_lib.Transformer,
  shared_frozen: model_lib.Transformer,
  units: dict[str, list[tuple[Any, Any]]],
  rows: Rows,
  key: jax.Array | None,
  *,
  combine: Combine,
  loss: Loss,
  zigzag: int,
  remat: str,
) -> MicrobatchPrograms:
  """Traces the pieces for given shapes.

  Args:
    shared: model with its trained parameters outside the layers alone.
    shared_frozen: model with its other parameters outside the layers alone.
    units: shapes of each tower's (trained, other) parameters, a pair for each
      layer of a unit.
    rows: shapes of the arrays of a microbatch.
    key: dropout key of the step, or None without dropout.
    combine: function that joins trained and other parameters.
    loss: function from the terms of the loss and their batch to the loss and
      its metrics.
    zigzag: number of devices over which the tokens of a row are in zigzag
      order; see `stack.Execution`.
    remat: activations that the backward pass computes again; see
      `stack.Execution`.
  """
  params = cut.Params(shared=shared, shared_frozen=shared_frozen)
  towers = combine(shared, shared_frozen).towers
  rest = OtherInputs(rows, key, jax.ShapeDtypeStruct((), jnp.int32))
  enters, layers, state = [], [], []
  for name in towers:
    before = state[-1] if state else None
    fn = _enter(name, combine, zigzag)
    piece = cut.Cut(fn, params, before, None, rest)
    x, encoded = piece.y
    if state:
      state[-1] = encoded
    side = tuple(state)
    enters.append(piece)
    layers.append(
      tuple(
        cut.Cut(
          _layer(name, combine, zigzag),
          dataclasses.replace(params, slot=slot, slot_frozen=frozen),
          x,
          side,
          rest,
          remat=remat,
        )
        for slot, frozen in units[name]
      )
    )
    state.append(x)
  leave = _leave(combine, loss, zigzag)
  leave = cut.Cut(leave, params, state[-1], None, rest)
  return MicrobatchPrograms(tuple(enters), tuple(layers), leave, tuple(state))


def _enter(name: str, combine: Combine, zigzag: int) -> cut.Function:
  def fn(
    params: cut.Params, x: jax.Array | None, side: None, rest: OtherInputs
  ) -> tuple[tuple[jax.Array, jax.Array | None], None, None]:
    del side
    model = combine(params.shared, params.shared_frozen)
    context = _context(model, name, rest, zigzag)
    x_BTD, encoded_BSD = model.enter(name, rest.rows, context, x)
    x_BTD = getattr(model, name).begin(x_BTD, context)
    return (x_BTD, encoded_BSD), None, None

  return fn


def _layer(name: str, combine: Combine, zigzag: int) -> cut.Function:
  def fn(
    params: cut.Params, x_BTD: jax.Array, side: Activations, rest: OtherInputs
  ) -> tuple[jax.Array, Any, Any]:
    model = combine(params.shared, params.shared_frozen)
    context = _context(model, name, rest, zigzag)
    if side:
      context = dataclasses.replace(context, encoded_BSD=side[-1])
    layer = combine(params.slot, params.slot_frozen)
    tower = getattr(model, name)
    x_BTD, _, stats = tower.layer(layer, x_BTD, context, rest.number)
    if stats is None:
      return x_BTD, None, None
    stats = {'': jax.tree.map(lambda a: a[None], stats)}
    losses = load_balancing.losses(stats, rest.rows[loss_terms.ROW_SHARES])
    load = jax.tree.map(lambda a: a[0], load_balancing.loads(stats)[''])
    return x_BTD, sum(losses.values()), (losses, load)

  return fn


def _leave(combine: Combine, loss: Loss, zigzag: int) -> cut.Function:
  def fn(
    params: cut.Params, x_BTD: jax.Array, side: None, rest: OtherInputs
  ) -> tuple[None, jax.Array, dict[str, jax.Array]]:
    del side
    model = combine(params.shared, params.shared_frozen)
    terms = model.terms(x_BTD, rest.rows, _keys(rest), zigzag)
    total, sums = loss(terms, batch=rest.rows)
    return None, total, {'loss': total, **sums}

  return fn


def _context(
  model: model_lib.Transformer, name: str, rest: OtherInputs, zigzag: int
) -> block.Context:
  return model.context(name, rest.rows, _keys(rest), zigzag)


def _keys(rest: OtherInputs) -> jax.Array | None:
  """Returns the dropout key of each row."""
  if rest.key is None:
    return None
  return dropout.row_keys(rest.key, rest.rows['rows'])
