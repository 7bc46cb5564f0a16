"""One tick of one device: its instructions, and loops that follow them.

Shape suffixes: S stages, C columns of the instructions, N slots of a device.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import TypeVar

import jax
import jax.numpy as jnp

from t2x.losses import load_balancing
from t2x.parallel import sharding
from t2x.pipeline import buffers
from t2x.pipeline import instructions
from t2x.pipeline import pieces as pieces_lib
from t2x.pipeline import plan as plan_lib

# Prefix of the names of loops whose trips the instructions of a device give.
LOOP = 'pipeline_loop_'

_Carry = TypeVar('_Carry')  # A tree of arrays that a loop carries.
# body(counter, active, carry) -> carry.
_Body = Callable[[jax.Array, buffers.Active, _Carry], _Carry]
# body(layer of the unit, unit of the part, layer of the tower, active, carry)
# -> carry.
_LayerBody = Callable[
  [int, jax.Array, jax.Array, buffers.Active, _Carry], _Carry
]


@dataclasses.dataclass(frozen=True)
class Values:
  """Values that depend on the parameters alone; see `cut.Cut.fixed_slot`.

  Attributes:
    enter: values of the model's parameters, for each tower.
    layers: (values of the layer's own parameters, (N, ...) each; values of the
      model's parameters), for each tower and layer of a unit.
    leave: values of the model's parameters.
  """

  enter: list[list[jax.Array]]
  layers: list[list[tuple[list[jax.Array], list[jax.Array]]]]
  leave: list[jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Carry:
  """Buffers and sums that one tick hands to the next.

  Attributes:
    inbox: messages, (inbox slots + 1, ...) for each tower's activation.
    stored: activations that F keeps, for each tower and layer of a unit: those
      until B, then those until W, (slots x units, ...) each.
    crossing: values that B keeps until W, for each tower and layer of a unit,
      (slots x units, ...) each.
    grads: sums of gradients, for each tower and layer of a unit and each leaf
      of the layer's own parameters, (N, ...); None for a leaf without a
      gradient.
    shared: sums of gradients for each leaf of the model's parameters; None for
      a leaf without a gradient.
    sums: sums of metrics by name.
    loads: loads of the routers, for each tower and layer of a unit, (N, ...);
      None for a layer without experts.
  """

  inbox: pieces_lib.Activations
  stored: list[list[list[list[jax.Array]]]]
  crossing: list[list[list[jax.Array]]]
  grads: list[list[buffers.Sums]]
  shared: buffers.Sums
  sums: dict[str, jax.Array]
  loads: list[list[load_balancing.LayerLoad | None]]


class Tick:
  """The inputs and instructions of a device in one tick.

  Args:
    pieces: programs of a microbatch.
    plan: schedule, and the layers of its parts.
    values: values that depend on the parameters alone.
    rows: microbatches by name, (M, B, ...) each.
    key: dropout key of the step, or None without dropout.
    table_SC: instructions of all stages in this tick.

  Attributes:
    instruction: instruction of this device, a scalar for each column.
  """

  def __init__(
    self,
    pieces: pieces_lib.MicrobatchPrograms,
    plan: plan_lib.PipelinePlan,
    values: Values,
    rows: pieces_lib.Rows,
    key: jax.Array | None,
    table_SC: jax.Array,
  ):
    self.pieces, self.plan, self.values = pieces, plan, values
    self._rows, self._key = rows, key
    names = instructions.COLUMNS
    self._of_all_stages = dict(zip(names, table_SC.T))
    instruction_C = table_SC[jax.lax.axis_index(sharding.PIPE)]
    self.instruction: dict[str, jax.Array] = dict(zip(names, instruction_C))

  def loop(
    self, name: str, t: int, body: _Body[_Carry], carry: _Carry
  ) -> _Carry:
    """Runs a loop as often as the instructions say.

    A loop of at most one trip is a condition. Its counter is 0, which the
    compiler does not know: work that depends on the counter stays in the loop.

    Args:
      name: one of `instructions.LOOPS`.
      t: index of the tower.
      body: function of the counter, whether this device is active, and the
        carried values; returns the carried values.
      carry: carried values at the start.
    """
    trips = functools.partial(instructions.trips, name, t)
    tower = self.plan.placement.towers[t].name
    return self.repeat(f'{name}_{tower}', trips, body, carry)

  def repeat(
    self,
    name: str,
    trips: Callable[[dict[str, jax.Array]], jax.Array],
    body: _Body[_Carry],
    carry: _Carry,
  ) -> _Carry:
    """Runs a loop as often as a function of the instructions says.

    With `uniform` all devices take as many trips as the device with most of
    them, and are inactive in those that are not their own.

    Args:
      name: name of the loop in the compiled program, after `LOOP`.
      trips: function from instructions by column to a number of trips.
      body: body of the loop; see `loop`.
      carry: carried values at the start.
    """
    num, most = trips(self.instruction), trips(self._of_all_stages).max()
    with jax.named_scope(LOOP + name):
      if not self.plan.config.uniform:
        return jax.lax.fori_loop(0, num, lambda i, c: body(i, True, c), carry)
      return jax.lax.fori_loop(0, most, lambda i, c: body(i, i < num, c), carry)

  def rest(
    self, number: buffers.Index, zero: buffers.Index
  ) -> pieces_lib.OtherInputs:
    """Returns the inputs of a program that have no gradient.

    Args:
      number: number of the layer in its tower; 0 outside the layers.
      zero: counter of the loop, or 0, that is added to the microbatch.
    """
    m = self.instruction['microbatch'] + zero
    rows = jax.tree.map(lambda a: buffers.at(a, m), self._rows)
    return pieces_lib.OtherInputs(
      rows, self._key, jnp.asarray(number, jnp.int32)
    )

  def units(
    self,
    name: str,
    t: int,
    body: _LayerBody[_Carry],
    carry: _Carry,
    *,
    reverse: bool = False,
  ) -> _Carry:
    """Runs body(i, unit, number, active, carry) for each layer of a part.

    Args:
      name: name of the loop over units; see `loop`.
      t: index of the tower.
      body: function of the index of the layer in its unit, the index of the
        unit in its part, the number of the layer in its tower, whether this
        device is active, and the carried values; returns the carried values.
      carry: carried values at the start.
      reverse: whether the last layer comes first.
    """
    members = list(range(len(self.pieces.layers[t])))
    num, group = self.plan.placement.towers[t].num_layers, len(members)
    full = num % group or group  # Number of layers that every unit has.

    def unit(trip: jax.Array, active: buffers.Active, carry: _Carry) -> _Carry:
      unit_of = lambda c: c['units'] - 1 - trip if reverse else trip
      number_of = lambda c, i: (c['unit'] + unit_of(c)) * group + i
      there = lambda i: lambda c: (number_of(c, i) < num).astype(jnp.int32)
      for i in reversed(members) if reverse else members:

        def layer(
          zero: buffers.Index,
          exists: buffers.Active,
          carry: _Carry,
          i: int = i,
        ) -> _Carry:
          c, both = self.instruction, buffers.both(active, exists)
          return body(i, unit_of(c) + zero, number_of(c, i), both, carry)

        if i < full:
          carry = layer(0, True, carry)
        else:
          carry = self.repeat(f'last_{i}', there(i), layer, carry)
      return carry

    return self.loop(name, t, unit, carry)

  def fixed(
    self, t: int, i: int, unit: buffers.Index
  ) -> tuple[list[jax.Array], list[jax.Array]]:
    """Returns the values that depend on a layer's parameters alone.

    Args:
      t: index of the tower.
      i: index of the layer in its unit.
      unit: index of the unit in this device's part.

    Returns:
      Values of the layer's own parameters, and of the model's.
    """
    slot = self.instruction['slot'] + unit
    own, shared = self.values.layers[t][i]
    return [buffers.at(a, slot) for a in own], shared

  def rows_of(self, t: int, unit: buffers.Index) -> list[jax.Array]:
    """Returns the rows of a unit's stored activations: until B, and until W."""
    c, most = self.instruction, self.plan.placement.most_units[t]
    slots = (c['until_backward'], c['until_weight'])
    return [slot * most + unit for slot in slots]
