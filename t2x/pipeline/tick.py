"""One tick of one device: its instructions, and loops that follow them."""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from t2x.parallel import sharding
from t2x.pipeline import buffers
from t2x.pipeline import instructions
from t2x.pipeline import pieces as pieces_lib
from t2x.pipeline import plan as plan_lib

# Loops of this name run as the instructions of a device say.
LOOP = 'pipeline_loop_'


@dataclasses.dataclass(frozen=True)
class Values:
  """What the loop reads of parameters; see `cut.Cut.fixed_slot`.

  Attributes:
    enter: for each tower, values of the model's parameters.
    layers: for each tower and layer of a unit, values (N, ...) of its own
      parameters, and values of the model's.
    leave: values of the model's parameters.
  """

  enter: Any
  layers: Any
  leave: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Carry:
  """What ticks hand on.

  Attributes:
    inbox: for each tower's activation, (slots + 1, ...).
    stored: for each tower and layer, what F keeps until B and until W, each
      (slots x units, ...).
    crossing: the same between B and W.
    grads: for each tower and layer, sums for leaves of its own parameters,
      (N, ...), None where there is no gradient.
    shared: sums for leaves of the model's parameters.
    sums: of what is measured.
    loads: for each tower and layer, what its router did, (N, ...).
  """

  inbox: Any
  stored: Any
  crossing: Any
  grads: Any
  shared: Any
  sums: Any
  loads: Any


class Tick:
  """What a device has at hand in a tick.

  Args:
    pieces: the programs of a microbatch.
    plan: what is run.
    values: of parameters.
    rows: the microbatches, (M, B, ...) each.
    key: of dropout, or None.
    table_SC: the instructions of all stages.
  """

  def __init__(self, pieces, plan, values, rows, key, table_SC):
    self.pieces: pieces_lib.Pieces = pieces
    self.plan: plan_lib.Plan = plan
    self.values = values
    self.rows, self.key = rows, key
    self.all = dict(zip(instructions.COLUMNS, table_SC.T))
    own_C = table_SC[jax.lax.axis_index(sharding.PIPE)]
    self.own: dict[str, Any] = dict(zip(instructions.COLUMNS, own_C))

  def loop(self, name: str, t: int, body, carry):
    """body(i, active, carry) as often as the instructions say.

    A loop of one trip is a condition. Its counter is 0, which the compiler
    does not know: what depends on the counter stays within the loop.
    """
    trips = functools.partial(instructions.trips, name, t)
    tower = self.plan.place.towers[t].name
    return self.repeat(f'{name}_{tower}', trips, body, carry)

  def repeat(self, name: str, trips: Callable[[Any], Any], body, carry):
    own, most = trips(self.own), trips(self.all).max()
    with jax.named_scope(LOOP + name):
      if not self.plan.config.uniform:
        return jax.lax.fori_loop(0, own, lambda i, c: body(i, True, c), carry)
      return jax.lax.fori_loop(0, most, lambda i, c: body(i, i < own, c), carry)

  def rest(self, number: Any, zero: Any) -> pieces_lib.Rest:
    m = self.own['microbatch'] + zero
    rows = jax.tree.map(lambda a: buffers.at(a, m), self.rows)
    return pieces_lib.Rest(rows, self.key, jnp.asarray(number, jnp.int32))

  def units(
    self, name: str, t: int, body, carry, *, reverse: bool = False
  ) -> Any:
    """Runs body(i, unit, number, active, carry) for each layer of a part.

    Args:
      name: of the loop over units; see `loop`.
      t: the tower.
      body: takes the layer's place in its unit, the unit's in its part, the
        layer's in its tower, and whether this device runs it.
      carry: what it changes.
      reverse: the last layer comes first.
    """
    members = list(range(len(self.pieces.layers[t])))
    num, group = self.plan.place.towers[t].num_layers, len(members)
    full = num % group or group  # Layers that the last unit has, too.

    def unit(trip, active, carry):
      unit_of = lambda c: c['units'] - 1 - trip if reverse else trip
      number_of = lambda c, i: (c['unit'] + unit_of(c)) * group + i
      there = lambda i: lambda c: (number_of(c, i) < num).astype(jnp.int32)
      for i in reversed(members) if reverse else members:

        def layer(zero, held, carry, i=i):
          own, both = self.own, buffers.both(active, held)
          return body(i, unit_of(own) + zero, number_of(own, i), both, carry)

        if i < full:
          carry = layer(0, True, carry)
        else:
          carry = self.repeat(f'last_{i}', there(i), layer, carry)
      return carry

    return self.loop(name, t, unit, carry)

  def fixed(self, t: int, i: int, unit: Any):
    slot = self.own['slot'] + unit
    own, shared = self.values.layers[t][i]
    return [buffers.at(a, slot) for a in own], shared

  def rows_of(self, t: int, unit: Any):
    """Where a unit's activations are, until B and until W."""
    slots = (self.own['until_backward'], self.own['until_weight'])
    return [slot * self.plan.place.most_units[t] + unit for slot in slots]
