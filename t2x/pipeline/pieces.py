"""A model's forward and backward pass, cut into the pieces of a pipeline.

The state that travels between parts has an activation for each tower: in part
of tower t entry t is the running one, and those before it are the outputs of
earlier towers, to be looked at.

Shape suffixes: B rows of a microbatch, E experts.
"""

from collections.abc import Callable
import dataclasses
from typing import Any
from typing import NamedTuple

import jax
import jax.numpy as jnp

from t2x.layers import dropout
from t2x.losses import load_balancing
from t2x.models import loss_terms
from t2x.pipeline import cut

# What parts are run with, of one microbatch.
Rows = dict[str, jax.Array]


# `cross_entropy.of_terms` with its settings.
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]


class Rest(NamedTuple):
  """Inputs of a piece that have no gradient.

  Attributes:
    rows: the microbatch by name, `rows` (numbers in the global batch) and
      `weights` over those of the whole batch included.
    key: of this step's dropout.
    number: of the layer in its tower.
  """

  rows: Rows
  key: jax.Array
  number: Any


@dataclasses.dataclass(frozen=True)
class Pieces:
  """The programs of one microbatch.

  Attributes:
    enter: for each tower, from the output of the one before to its input.
    layers: for each tower, the layers of a unit.
    leave: from the last output to the loss.
    state: shapes of what travels.
  """

  enter: tuple[cut.Cut, ...]
  layers: tuple[tuple[cut.Cut, ...], ...]
  leave: cut.Cut
  state: tuple[jax.ShapeDtypeStruct, ...]


def make(
  shared: Any,
  shared_frozen: Any,
  units: dict[str, list[tuple[Any, Any]]],
  rows: Rows,
  key: jax.Array,
  *,
  combine: Callable[[Any, Any], Any],
  loss: Loss,
  zigzag: int,
  remat: str,
) -> Pieces:
  """Traces the pieces for given shapes.

  Args:
    shared: the trained parameters outside of layers, in the model's structure.
    shared_frozen: the others.
    units: for each tower, (trained, other) parameters of each layer of a unit.
    rows: shapes of a microbatch.
    key: shape of the step's dropout key.
    combine: puts a trained and another part together.
    loss: of terms and their batch, what they make and measure.
    zigzag: order of the tokens of a row.
    remat: what the backward pass recomputes.
  """
  params = cut.Params(shared=shared, shared_frozen=shared_frozen)
  towers = combine(shared, shared_frozen).towers
  rest = Rest(rows, key, jax.ShapeDtypeStruct((), jnp.int32))
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
  return Pieces(tuple(enters), tuple(layers), leave, tuple(state))


def _enter(name: str, combine, zigzag: int) -> cut.Function:
  def fn(params, x, side, rest):
    del side
    model = combine(params.shared, params.shared_frozen)
    context = _context(model, name, rest, zigzag)
    x_BTD, encoded_BSD = model.enter(name, rest.rows, context, x)
    x_BTD = getattr(model, name).begin(x_BTD, context)
    return (x_BTD, encoded_BSD), None, None

  return fn


def _layer(name: str, combine, zigzag: int) -> cut.Function:
  def fn(params, x_BTD, side, rest):
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


def _leave(combine, loss: Loss, zigzag: int) -> cut.Function:
  def fn(params, x_BTD, side, rest):
    del side
    model = combine(params.shared, params.shared_frozen)
    terms = model.terms(x_BTD, rest.rows, _keys(rest), zigzag)
    total, sums = loss(terms, batch=rest.rows)
    return None, total, {'loss': total, **sums}

  return fn


def _context(model, name, rest: Rest, zigzag: int):
  return model.context(name, rest.rows, _keys(rest), zigzag)


def _keys(rest: Rest) -> jax.Array | None:
  """Returns the dropout key of each row."""
  if rest.key is None:
    return None
  return dropout.row_keys(rest.key, rest.rows['rows'])
