"""The operations of a schedule: forward, loss, backward, weight gradients.

Each is a loop within a tick. It takes the buffers and sums of the run (`Carry`)
and returns them changed. `state` has an activation for each tower, and `grad`
the gradient of each; see `pieces`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from t2x.pipeline import buffers
from t2x.pipeline import cut
from t2x.pipeline import pieces as pieces_lib
from t2x.pipeline import tick as tick_lib

_Activations = pieces_lib.Activations


def enter(
  tick: tick_lib.Tick, carry: tick_lib.Carry, state: _Activations
) -> _Activations:
  """Makes the input of a tower's first part.

  Args:
    tick: the tick.
    carry: buffers and sums.
    state: message of the part before.

  Returns:
    The input of the part's layers, with the outputs of earlier towers. It is
    `state` itself if the part is not the first of its tower.
  """
  for t, piece in enumerate(tick.pieces.enter):

    def body(
      zero: jax.Array,
      active: buffers.Active,
      state: _Activations,
      t: int = t,
      piece: cut.Cut = piece,
    ) -> _Activations:
      (x, side), *_ = piece.forward_only(*_entering(tick, carry.inbox, t, zero))
      new = list(state)
      new[t] = x
      if t:
        new[t - 1] = side
      return buffers.select(active, tuple(new), state)

    state = tick.loop('enter', t, body, state)
  return state


def _entering(
  tick: tick_lib.Tick, inbox: _Activations, t: int, zero: jax.Array
) -> tuple[cut.Fixed, jax.Array | None, None, pieces_lib.OtherInputs]:
  """Returns the arguments of a tower's program `enter`."""
  before = buffers.read(inbox, tick.instruction['input'] + zero)
  fixed = ([], tick.values.enter[t])
  return fixed, before[t - 1] if t else None, None, tick.rest(0, zero)


def forward(
  tick: tick_lib.Tick, carry: tick_lib.Carry, state: _Activations
) -> tuple[_Activations, tick_lib.Carry]:
  """Runs the layers of a part.

  An F of a schedule with recomputation keeps nothing for B and W. An R runs the
  layers again and keeps what they need.
  """
  for t in range(len(tick.pieces.layers)):
    state, carry = _forward_of(tick, 'forward', t, carry, state)
    if tick.plan.table.recompute:
      state, carry = _forward_of(tick, 'recompute', t, carry, state)
  return state, carry


def _forward_of(
  tick: tick_lib.Tick,
  name: str,
  t: int,
  carry: tick_lib.Carry,
  state: _Activations,
) -> tuple[_Activations, tick_lib.Carry]:
  table, again = tick.plan.table, name == 'recompute'
  keeps = table.training and table.recompute == again
  side = state[:t]

  def layer(
    i: int,
    j: jax.Array,
    number: jax.Array,
    active: buffers.Active,
    loop: tuple[Any, ...],
  ) -> tuple[Any, ...]:
    x, stored, loads, sums = loop
    piece = tick.pieces.layers[t][i]
    args = tick.fixed(t, i, j), x, side, tick.rest(number, 0)
    kept, aux_of = [], None
    if again:
      y, kept = piece.recompute(*args)
    elif keeps:
      y, _, aux_of, kept = piece.forward(*args)
    else:
      y, _, aux_of = piece.forward_only(*args)
    if keeps:
      new = [
        buffers.write(buffer, row, part, active)
        for buffer, row, part in zip(stored[i], tick.rows_of(t, j), kept)
      ]
      stored = buffers.with_item(stored, i, new)
    if aux_of is not None:
      losses, load = aux_of
      losses = losses | {'loss': sum(losses.values())}
      sums = buffers.add_some(sums, losses, active)
      slot = tick.instruction['slot'] + j
      loads = buffers.with_item(
        loads, i, buffers.add_at(loads[i], slot, load, active)
      )
    return buffers.select(active, y, x), stored, loads, sums

  loop = (state[t], carry.stored[t], carry.loads[t], carry.sums)
  x, stored, loads, sums = tick.units(name, t, layer, loop)
  carry = dataclasses.replace(
    carry,
    stored=buffers.with_item(carry.stored, t, stored),
    loads=buffers.with_item(carry.loads, t, loads),
    sums=sums,
  )
  return buffers.with_item(state, t, x), carry


def measure(
  tick: tick_lib.Tick, carry: tick_lib.Carry, x: jax.Array
) -> tick_lib.Carry:
  """Adds the loss and metrics of the last part's output, without gradients.

  Args:
    tick: the tick.
    carry: buffers and sums.
    x: output of the part's layers; used on the last part alone.
  """
  piece = tick.pieces.leave

  def body(
    zero: jax.Array, active: buffers.Active, loop: tuple[Any, ...]
  ) -> tuple[Any, ...]:
    x, sums = loop
    fixed, rest = ([], tick.values.leave), tick.rest(0, zero)
    _, _, other = piece.forward_only(fixed, x, None, rest)
    # `x` changes, so that the compiler moves no use of it out of the loop.
    return jnp.zeros_like(x), buffers.add_some(sums, other, active)

  _, sums = tick.loop('measure', -1, body, (x, carry.sums))
  return dataclasses.replace(carry, sums=sums)


def leave(
  tick: tick_lib.Tick, carry: tick_lib.Carry
) -> tuple[_Activations, tick_lib.Carry]:
  """Computes the loss and its gradients, on the last part.

  Args:
    tick: the tick.
    carry: buffers and sums.

  Returns:
    The gradient of the loss with respect to the part's output, and the buffers
    and sums. On other parts it is the gradient that came from the part after.
  """
  piece = tick.pieces.leave
  grad = buffers.read(carry.inbox, tick.instruction['gradient'])

  def body(
    zero: jax.Array, active: buffers.Active, loop: tuple[Any, ...]
  ) -> tuple[Any, ...]:
    grad, shared, sums = loop
    fixed = ([], tick.values.leave)
    rest = tick.rest(0, zero)
    x = buffers.read(carry.inbox, tick.instruction['gradient'] + zero)[-1]
    one = jax.tree.map(jnp.ones_like, piece.aux)
    outputs = piece.compute_all(fixed, x, None, rest, None, one)
    _, _, other, d_x, _, grads = outputs
    shared = buffers.add_leaves(shared, piece.early + piece.late, grads, active)
    new = (*(jnp.zeros_like(g) for g in grad[:-1]), d_x)
    sums = buffers.add_some(sums, other, active)
    return buffers.select(active, new, grad), shared, sums

  loop = (grad, carry.shared, carry.sums)
  grad, shared, sums = tick.loop('leave', -1, body, loop)
  return grad, dataclasses.replace(carry, shared=shared, sums=sums)


def backward(
  tick: tick_lib.Tick,
  carry: tick_lib.Carry,
  state: _Activations,
  grad: _Activations,
) -> tuple[_Activations, tick_lib.Carry]:
  """Propagates the gradient back through the layers of a part.

  Args:
    tick: the tick.
    carry: buffers and sums.
    state: activations, of which the outputs of earlier towers are used.
    grad: gradient of the part's output.

  Returns:
    The gradient of the part's input, and the buffers and sums.
  """
  for t in range(len(tick.pieces.layers)):
    grad, carry = _backward_of(tick, t, carry, state[:t], grad)
  return grad, carry


def _backward_of(
  tick: tick_lib.Tick,
  t: int,
  carry: tick_lib.Carry,
  side: _Activations,
  grad: _Activations,
) -> tuple[_Activations, tick_lib.Carry]:
  c, units = tick.instruction, tick.plan.placement.most_units[t]

  def layer(
    i: int,
    j: jax.Array,
    number: jax.Array,
    active: buffers.Active,
    loop: tuple[Any, ...],
  ) -> tuple[Any, ...]:
    d_x, d_side, crossing, grads, shared = loop
    piece = tick.pieces.layers[t][i]
    kept = [
      buffers.read(buffer, row)
      for buffer, row in zip(carry.stored[t][i], tick.rows_of(t, j))
    ]
    one = jax.tree.map(jnp.ones_like, piece.aux)
    fixed, rest = tick.fixed(t, i, j), tick.rest(number, 0)
    new, add, early, left = piece.backward(fixed, kept, side, rest, d_x, one)
    row = c['crossing'] * units + j
    crossing = buffers.with_item(
      crossing, i, buffers.write(crossing[i], row, left, active)
    )
    sums_i, shared = buffers.accumulate(
      piece.early, early, grads[i], shared, c['slot'] + j, active
    )
    d_side = buffers.add(d_side, add, active)
    grads = buffers.with_item(grads, i, sums_i)
    return buffers.select(active, new, d_x), d_side, crossing, grads, shared

  loop = (grad[t], grad[:t], carry.crossing[t], carry.grads[t], carry.shared)
  loop = tick.units('backward', t, layer, loop, reverse=True)
  d_x, d_side, crossing, grads, shared = loop
  carry = dataclasses.replace(
    carry,
    crossing=buffers.with_item(carry.crossing, t, crossing),
    grads=buffers.with_item(carry.grads, t, grads),
    shared=shared,
  )
  return (*d_side, d_x, *grad[t + 1 :]), carry


def enter_backward(
  tick: tick_lib.Tick, carry: tick_lib.Carry, grad: _Activations
) -> tuple[_Activations, tick_lib.Carry]:
  """Propagates the gradient back through a tower's program `enter`."""
  inbox = carry.inbox
  for t, piece in enumerate(tick.pieces.enter):

    def body(
      zero: jax.Array,
      active: buffers.Active,
      loop: tuple[Any, ...],
      t: int = t,
      piece: cut.Cut = piece,
    ) -> tuple[Any, ...]:
      grad, shared = loop
      args = _entering(tick, inbox, t, zero)
      # Without the barrier the compiler moves the communication of values from
      # outside the loop out of it.
      held_back, _ = jax.lax.optimization_barrier((grad, zero))
      d_y = held_back[t], (held_back[t - 1] if t else None)
      outputs = piece.compute_all(*args, d_y, None)
      d_before, grads = outputs[3], outputs[5]
      shared = buffers.add_leaves(
        shared, piece.early + piece.late, grads, active
      )
      new = list(grad)
      if t:
        new[t - 1] = d_before
      return buffers.select(active, tuple(new), grad), shared

    loop = (grad, carry.shared)
    grad, shared = tick.loop('enter_backward', t, body, loop)
    carry = dataclasses.replace(carry, shared=shared)
  return grad, carry


def weight(
  tick: tick_lib.Tick, carry: tick_lib.Carry, state: _Activations
) -> tick_lib.Carry:
  """Adds the gradients of the weights of a part's layers.

  Args:
    tick: the tick.
    carry: buffers and sums.
    state: activations, of which the outputs of earlier towers are used.
  """
  for t in range(len(tick.pieces.layers)):
    carry = _weight_of(tick, t, carry, state[:t])
  return carry


def _weight_of(
  tick: tick_lib.Tick, t: int, carry: tick_lib.Carry, side: _Activations
) -> tick_lib.Carry:
  c, units = tick.instruction, tick.plan.placement.most_units[t]

  def layer(
    i: int,
    j: jax.Array,
    number: jax.Array,
    active: buffers.Active,
    loop: tuple[Any, ...],
  ) -> tuple[Any, ...]:
    grads, shared = loop
    piece = tick.pieces.layers[t][i]
    kept = buffers.read(carry.stored[t][i][1], tick.rows_of(t, j)[1])
    left = buffers.read(carry.crossing[t][i], c['crossing'] * units + j)
    fixed, rest = tick.fixed(t, i, j), tick.rest(number, 0)
    late = piece.weight(fixed, kept, side, rest, left)
    sums_i, shared = buffers.accumulate(
      piece.late, late, grads[i], shared, c['slot'] + j, active
    )
    return buffers.with_item(grads, i, sums_i), shared

  loop = (carry.grads[t], carry.shared)
  grads, shared = tick.units('weight', t, layer, loop)
  carry = dataclasses.replace(carry, shared=shared)
  return dataclasses.replace(
    carry, grads=buffers.with_item(carry.grads, t, grads)
  )
