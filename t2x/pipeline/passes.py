"""What the operations of a schedule do, each a loop within a tick.

A pass takes what ticks hand on (`Carry`) and returns it. `state` has an
activation for each tower, `grad` a gradient for each; see `pieces`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from t2x.pipeline import buffers
from t2x.pipeline import tick as tick_lib


def enter(tick: tick_lib.Tick, carry: tick_lib.Carry, state):
  """Makes the input of a tower's first part."""
  for t, piece in enumerate(tick.pieces.enter):

    def body(zero, active, state, t=t, piece=piece):
      (x, side), *_ = piece.forward_only(*_entering(tick, carry.inbox, t, zero))
      new = list(state)
      new[t] = x
      if t:
        new[t - 1] = side
      return buffers.select(active, tuple(new), state)

    state = tick.loop('enter', t, body, state)
  return state


def _entering(tick: tick_lib.Tick, inbox, t: int, zero):
  """Returns the arguments of what stands before a tower's first part."""
  before = buffers.read(inbox, tick.own['input'] + zero)
  fixed = ([], tick.values.enter[t])
  return fixed, before[t - 1] if t else None, None, tick.rest(0, zero)


def forward(tick: tick_lib.Tick, carry: tick_lib.Carry, state):
  """Runs the layers of a part, or runs them again to keep what B needs."""
  for t in range(len(tick.pieces.layers)):
    state, carry = _forward_of(tick, 'forward', t, carry, state)
    if tick.plan.table.recompute:
      state, carry = _forward_of(tick, 'recompute', t, carry, state)
  return state, carry


def _forward_of(tick: tick_lib.Tick, name: str, t: int, carry, state):
  table, again = tick.plan.table, name == 'recompute'
  keeps = table.training and table.recompute == again
  side = state[:t]

  def layer(i, j, number, mine, loop):
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
        buffers.write(buffer, row, part, mine)
        for buffer, row, part in zip(stored[i], tick.rows_of(t, j), kept)
      ]
      stored = buffers.replaced(stored, i, new)
    if aux_of is not None:
      losses, load = aux_of
      losses = losses | {'loss': sum(losses.values())}
      sums = buffers.add_some(sums, losses, mine)
      slot = tick.own['slot'] + j
      loads = buffers.replaced(
        loads, i, buffers.add_at(loads[i], slot, load, mine)
      )
    return buffers.select(mine, y, x), stored, loads, sums

  loop = (state[t], carry.stored[t], carry.loads[t], carry.sums)
  x, stored, loads, sums = tick.units(name, t, layer, loop)
  carry = dataclasses.replace(
    carry,
    stored=buffers.replaced(carry.stored, t, stored),
    loads=buffers.replaced(carry.loads, t, loads),
    sums=sums,
  )
  return buffers.replaced(state, t, x), carry


def measure(tick: tick_lib.Tick, carry: tick_lib.Carry, x):
  """What is measured of the last output, on the last part."""
  piece = tick.pieces.leave

  def body(zero, active, loop):
    x, sums = loop
    fixed, rest = ([], tick.values.leave), tick.rest(0, zero)
    _, _, other = piece.forward_only(fixed, x, None, rest)
    # Changed, so that nothing made of `x` can be moved out of the loop.
    return jnp.zeros_like(x), buffers.add_some(sums, other, active)

  _, sums = tick.loop('measure', -1, body, (x, carry.sums))
  return dataclasses.replace(carry, sums=sums)


def leave(tick: tick_lib.Tick, carry: tick_lib.Carry):
  """The loss, and its gradient by the last output, on the last part."""
  piece = tick.pieces.leave
  grad = buffers.read(carry.inbox, tick.own['gradient'])

  def body(zero, active, loop):
    grad, shared, sums = loop
    fixed = ([], tick.values.leave)
    rest = tick.rest(0, zero)
    x = buffers.read(carry.inbox, tick.own['gradient'] + zero)[-1]
    one = jax.tree.map(jnp.ones_like, piece.aux)
    got = piece.at_once(fixed, x, None, rest, None, one)
    _, _, other, d_x, _, grads = got
    shared = buffers.add_leaves(shared, piece.early + piece.late, grads, active)
    new = (*(jnp.zeros_like(g) for g in grad[:-1]), d_x)
    sums = buffers.add_some(sums, other, active)
    return buffers.select(active, new, grad), shared, sums

  loop = (grad, carry.shared, carry.sums)
  grad, shared, sums = tick.loop('leave', -1, body, loop)
  return grad, dataclasses.replace(carry, shared=shared, sums=sums)


def backward(tick: tick_lib.Tick, carry: tick_lib.Carry, state, grad):
  """Leads the gradient through the layers of a part, the last one first."""
  for t in range(len(tick.pieces.layers)):
    grad, carry = _backward_of(tick, t, carry, state[:t], grad)
  return grad, carry


def _backward_of(tick: tick_lib.Tick, t: int, carry, side, grad):
  own, units = tick.own, tick.plan.place.most_units[t]

  def layer(i, j, number, mine, loop):
    d_x, d_side, crossing, grads, shared = loop
    piece = tick.pieces.layers[t][i]
    kept = [
      buffers.read(buffer, row)
      for buffer, row in zip(carry.stored[t][i], tick.rows_of(t, j))
    ]
    one = jax.tree.map(jnp.ones_like, piece.aux)
    fixed, rest = tick.fixed(t, i, j), tick.rest(number, 0)
    new, add, early, left = piece.backward(fixed, kept, side, rest, d_x, one)
    row = own['crossing'] * units + j
    crossing = buffers.replaced(
      crossing, i, buffers.write(crossing[i], row, left, mine)
    )
    mine_i, shared = buffers.accumulate(
      piece.early, early, grads[i], shared, own['slot'] + j, mine
    )
    d_side = buffers.add(d_side, add, mine)
    grads = buffers.replaced(grads, i, mine_i)
    return buffers.select(mine, new, d_x), d_side, crossing, grads, shared

  loop = (grad[t], grad[:t], carry.crossing[t], carry.grads[t], carry.shared)
  loop = tick.units('backward', t, layer, loop, reverse=True)
  d_x, d_side, crossing, grads, shared = loop
  carry = dataclasses.replace(
    carry,
    crossing=buffers.replaced(carry.crossing, t, crossing),
    grads=buffers.replaced(carry.grads, t, grads),
    shared=shared,
  )
  return (*d_side, d_x, *grad[t + 1 :]), carry


def enter_backward(tick: tick_lib.Tick, carry: tick_lib.Carry, grad):
  """The gradients of what stands before a tower's first part."""
  inbox = carry.inbox
  for t, piece in enumerate(tick.pieces.enter):

    def body(zero, active, loop, t=t, piece=piece):
      grad, shared = loop
      args = _entering(tick, inbox, t, zero)
      # Else exchanges of what comes from above the loop are drawn above it.
      came, _ = jax.lax.optimization_barrier((grad, zero))
      d_y = came[t], (came[t - 1] if t else None)
      got = piece.at_once(*args, d_y, None)
      d_before, grads = got[3], got[5]
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


def weight(tick: tick_lib.Tick, carry: tick_lib.Carry, state):
  """The weights' gradients of the layers of a part."""
  for t in range(len(tick.pieces.layers)):
    carry = _weight_of(tick, t, carry, state[:t])
  return carry


def _weight_of(tick: tick_lib.Tick, t: int, carry, side):
  own, units = tick.own, tick.plan.place.most_units[t]

  def layer(i, j, number, mine, loop):
    grads, shared = loop
    piece = tick.pieces.layers[t][i]
    kept = buffers.read(carry.stored[t][i][1], tick.rows_of(t, j)[1])
    left = buffers.read(carry.crossing[t][i], own['crossing'] * units + j)
    fixed, rest = tick.fixed(t, i, j), tick.rest(number, 0)
    late = piece.weight(fixed, kept, side, rest, left)
    mine_i, shared = buffers.accumulate(
      piece.late, late, grads[i], shared, own['slot'] + j, mine
    )
    return buffers.replaced(grads, i, mine_i), shared

  loop = (carry.grads[t], carry.shared)
  grads, shared = tick.units('weight', t, layer, loop)
  carry = dataclasses.replace(carry, shared=shared)
  return dataclasses.replace(
    carry, grads=buffers.replaced(carry.grads, t, grads)
  )
