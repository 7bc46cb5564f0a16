"""Runs a schedule's table, whatever the schedule.

In each tick a device does the one operation that its instructions name, and
others, in the same program, do theirs. What is not a tick's operation is a loop
of no trips, and a part with fewer layers a loop of fewer trips: no work is
masked away. (Loops, since XLA updates what they carry in place; a conditional
copies the buffers that it passes on.) Between ticks, activations and gradients
move to neighbours.

Only collectives that name their groups may run within an operation: others wait
for devices that do something else. Where a machine cannot have devices diverge,
`uniform` has all of them do whatever one of them does, masked.

Shape suffixes: S stages, C columns of the instructions, N slots.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from t2x import sharding
from t2x.pipeline import instructions as instructions_lib
from t2x.pipeline import pieces as pieces_lib
from t2x.pipeline import schedule as schedule_lib

PIPE = sharding.PIPE
# Collective-permutes of this name move messages, on all devices at once.
EXCHANGE = 'pipeline_exchange'

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


class Executor:
  """The loop over ticks, to be traced inside a `shard_map` over `pipe`.

  Args:
    pieces: the programs of a microbatch.
    told: the instructions.
    towers: names, in order of depth.
    num_layers: for each tower, the number of its layers.
    units: for each tower, the most units of a part.
    recompute: forwards keep nothing, and are run again.
    training: with backward passes.
    uniform: every device does whatever one of them does.
  """

  def __init__(
    self,
    pieces: pieces_lib.Pieces,
    told: instructions_lib.Instructions,
    *,
    towers: tuple[str, ...],
    num_layers: tuple[int, ...],
    units: tuple[int, ...],
    recompute: bool,
    training: bool,
    uniform: bool = False,
  ):
    self.pieces = pieces
    self.told = told
    self.towers = towers
    self.num_layers = num_layers
    self.units = units
    self.recompute = recompute
    self.training = training
    self.uniform = uniform

  def run(self, values: Values, rows: Any, key: Any, start: Carry) -> Carry:
    """Runs all ticks.

    Args:
      values: of parameters.
      rows: the microbatches, (M, B, ...) each.
      key: of dropout, or None.
      start: of buffers and sums, zeros.
    """
    told = self.told
    xs = tuple(
      jnp.asarray(a)
      for a in (told.rows_TSC, told.sends_down_T, told.sends_up_T)
    )
    step = lambda carry, x: (
      _Tick(self, values, rows, key, *x).run(carry),
      None,
    )
    return jax.lax.scan(step, start, xs)[0]


class _Tick:
  """One tick of one device."""

  def __init__(self, executor, values, rows, key, table_SC, down, up):
    self._of = executor
    self._values = values
    self._rows, self._key = rows, key
    self._all = dict(zip(instructions_lib.COLUMNS, table_SC.T))
    own_C = table_SC[jax.lax.axis_index(PIPE)]
    self._own: dict[str, Any] = dict(zip(instructions_lib.COLUMNS, own_C))
    self._down, self._up = down, up
    self._pieces: pieces_lib.Pieces = executor.pieces

  def run(self, carry: Carry) -> Carry:
    own = self._own
    state = self._enter(carry, _read(carry.inbox, own['input']))
    state, carry = self._forward(carry, state)
    if self._of.training:
      grad, carry = self._leave(carry)
      grad, carry = self._backward(carry, state, grad)
      grad, carry = self._enter_backward(carry, grad)
      carry = self._weight(carry, state)
      is_grad = own['operation'] == schedule_lib.BACKWARD
      state = _select(is_grad, grad, state)
    else:
      carry = self._measure(carry, state[-1])
    return self._exchange(carry, state)

  def _loop(self, name: str, t: int, body, carry):
    """body(i, active, carry) as often as the instructions say.

    A loop of one trip is a condition. Its counter is 0, which the compiler
    does not know: what depends on the counter stays within the loop.
    """
    trips = functools.partial(instructions_lib.trips, name, t)
    tower = self._of.towers[t]
    return self._repeat(f'{name}_{tower}', trips, body, carry)

  def _repeat(self, name: str, trips: Callable[[Any], Any], body, carry):
    own, most = trips(self._own), trips(self._all).max()
    with jax.named_scope(LOOP + name):
      if not self._of.uniform:
        return jax.lax.fori_loop(0, own, lambda i, c: body(i, True, c), carry)
      return jax.lax.fori_loop(0, most, lambda i, c: body(i, i < own, c), carry)

  def _rest(self, number: Any, zero: Any) -> pieces_lib.Rest:
    m = self._own['microbatch'] + zero
    rows = jax.tree.map(lambda a: _at(a, m), self._rows)
    return pieces_lib.Rest(rows, self._key, jnp.asarray(number, jnp.int32))

  def _enter(self, carry, state):
    """Makes the input of a tower's first part."""
    for t, piece in enumerate(self._pieces.enter):

      def body(zero, active, state, t=t, piece=piece):
        before = _read(carry.inbox, self._own['input'] + zero)
        before = before[t - 1] if t else None
        fixed = ([], self._values.enter[t])
        rest = self._rest(0, zero)
        (x, side), *_ = piece.forward_only(fixed, before, None, rest)
        new = list(state)
        new[t] = x
        if t:
          new[t - 1] = side
        return _select(active, tuple(new), state)

      state = self._loop('enter', t, body, state)
    return state

  def _members(self, t: int, unit: Any, body, carry, *, reverse: bool = False):
    """Runs body(i, number, active, carry) for each layer i of a unit."""
    members = list(range(len(self._pieces.layers[t])))
    num, group = self._of.num_layers[t], len(members)
    for i in reversed(members) if reverse else members:
      number = (self._own['unit'] + unit) * group + i
      if i < num % group or num % group == 0:
        carry = body(i, number, True, carry)
      else:  # The last unit has fewer.
        there = lambda c, i=i: (c['unit'] + unit) * group + i < num
        carry = self._repeat(
          f'last_{i}',
          lambda c, there=there: there(c).astype(jnp.int32),
          lambda zero, active, carry, i=i, number=number: body(
            i, number + zero, active, carry
          ),
          carry,
        )
    return carry

  def _fixed(self, t: int, i: int, unit: Any):
    slot = self._own['slot'] + unit
    own, shared = self._values.layers[t][i]
    return [_at(a, slot) for a in own], shared

  def _rows_of(self, t: int, unit: Any):
    """Where a unit's activations are, until B and until W."""
    slots = (self._own['until_backward'], self._own['until_weight'])
    return [slot * self._of.units[t] + unit for slot in slots]

  def _forward(self, carry, state):
    for t in range(len(self._pieces.layers)):
      state, carry = self._forward_of('forward', t, carry, state)
      if self._of.recompute and self._of.training:
        state, carry = self._forward_of('recompute', t, carry, state)
    return state, carry

  def _forward_of(self, name: str, t: int, carry, state):
    again = name == 'recompute'
    keeps = self._of.training and self._of.recompute == again
    side = state[:t]

    def unit(j, active, loop):
      def layer(i, number, there, loop):
        x, stored, loads, sums = loop
        mine = _both(active, there)
        piece = self._pieces.layers[t][i]
        args = self._fixed(t, i, j), x, side, self._rest(number, 0)
        kept, aux_of = [], None
        if again:
          y, kept = piece.recompute(*args)
        elif keeps:
          y, _, aux_of, kept = piece.forward(*args)
        else:
          y, _, aux_of = piece.forward_only(*args)
        if keeps:
          new = [
            _write(buffer, row, part, mine)
            for buffer, row, part in zip(stored[i], self._rows_of(t, j), kept)
          ]
          stored = _replace(stored, i, new)
        if aux_of is not None:
          losses, load = aux_of
          losses = losses | {'loss': sum(losses.values())}
          sums = _add_some(sums, losses, mine)
          slot = self._own['slot'] + j
          loads = _replace(loads, i, _add_at(loads[i], slot, load, mine))
        return _select(mine, y, x), stored, loads, sums

      return self._members(t, j, layer, loop)

    loop = (state[t], carry.stored[t], carry.loads[t], carry.sums)
    x, stored, loads, sums = self._loop(name, t, unit, loop)
    carry = dataclasses.replace(
      carry,
      stored=_replace(carry.stored, t, stored),
      loads=_replace(carry.loads, t, loads),
      sums=sums,
    )
    return _replace(state, t, x), carry

  def _measure(self, carry, x):
    """What is measured of the last output, on the last part."""
    piece = self._pieces.leave

    def body(zero, active, loop):
      x, sums = loop
      fixed, rest = ([], self._values.leave), self._rest(0, zero)
      _, _, other = piece.forward_only(fixed, x, None, rest)
      # Changed, so that nothing made of `x` can be moved out of the loop.
      return jnp.zeros_like(x), _add_some(sums, other, active)

    _, sums = self._loop('measure', -1, body, (x, carry.sums))
    return dataclasses.replace(carry, sums=sums)

  def _leave(self, carry):
    """The loss, and its gradient by the last output, on the last part."""
    piece = self._pieces.leave
    grad = _read(carry.inbox, self._own['gradient'])

    def body(zero, active, loop):
      grad, shared, sums = loop
      fixed = ([], self._values.leave)
      rest = self._rest(0, zero)
      x = _read(carry.inbox, self._own['gradient'] + zero)[-1]
      one = jax.tree.map(jnp.ones_like, piece.aux)
      got = piece.at_once(fixed, x, None, rest, None, one)
      _, _, other, d_x, _, grads = got
      shared = _add_leaves(shared, piece.early + piece.late, grads, active)
      new = (*(jnp.zeros_like(g) for g in grad[:-1]), d_x)
      sums = _add_some(sums, other, active)
      return _select(active, new, grad), shared, sums

    loop = (grad, carry.shared, carry.sums)
    grad, shared, sums = self._loop('leave', -1, body, loop)
    return grad, dataclasses.replace(carry, shared=shared, sums=sums)

  def _backward(self, carry, state, grad):
    for t in range(len(self._pieces.layers)):
      grad, carry = self._backward_of(t, carry, state[:t], grad)
    return grad, carry

  def _backward_of(self, t: int, carry, side, grad):
    own, units = self._own, self._of.units[t]

    def unit(done, active, loop):
      j = own['units'] - 1 - done

      def layer(i, number, there, loop):
        d_x, d_side, crossing, grads, shared = loop
        mine = _both(active, there)
        piece = self._pieces.layers[t][i]
        kept = [
          _read(buffer, row)
          for buffer, row in zip(carry.stored[t][i], self._rows_of(t, j))
        ]
        one = jax.tree.map(jnp.ones_like, piece.aux)
        fixed, rest = self._fixed(t, i, j), self._rest(number, 0)
        new, add, early, left = piece.backward(
          fixed, kept, side, rest, d_x, one
        )
        row = own['crossing'] * units + j
        crossing = _replace(crossing, i, _write(crossing[i], row, left, mine))
        mine_i, shared = _accumulate(
          piece.early, early, grads[i], shared, own['slot'] + j, mine
        )
        d_side = _add(d_side, add, mine)
        grads = _replace(grads, i, mine_i)
        return _select(mine, new, d_x), d_side, crossing, grads, shared

      return self._members(t, j, layer, loop, reverse=True)

    loop = (grad[t], grad[:t], carry.crossing[t], carry.grads[t], carry.shared)
    loop = self._loop('backward', t, unit, loop)
    d_x, d_side, crossing, grads, shared = loop
    carry = dataclasses.replace(
      carry,
      crossing=_replace(carry.crossing, t, crossing),
      grads=_replace(carry.grads, t, grads),
      shared=shared,
    )
    return (*d_side, d_x, *grad[t + 1 :]), carry

  def _enter_backward(self, carry, grad):
    inbox = carry.inbox
    for t, piece in enumerate(self._pieces.enter):

      def body(zero, active, loop, t=t, piece=piece):
        grad, shared = loop
        before = _read(inbox, self._own['input'] + zero)
        before = before[t - 1] if t else None
        fixed = ([], self._values.enter[t])
        d_y = grad[t], (grad[t - 1] if t else None)
        rest = self._rest(0, zero)
        got = piece.at_once(fixed, before, None, rest, d_y, None)
        d_before, grads = got[3], got[5]
        shared = _add_leaves(shared, piece.early + piece.late, grads, active)
        new = list(grad)
        if t:
          new[t - 1] = d_before
        return _select(active, tuple(new), grad), shared

      loop = (grad, carry.shared)
      grad, shared = self._loop('enter_backward', t, body, loop)
      carry = dataclasses.replace(carry, shared=shared)
    return grad, carry

  def _weight(self, carry, state):
    for t in range(len(self._pieces.layers)):
      carry = self._weight_of(t, carry, state[:t])
    return carry

  def _weight_of(self, t: int, carry, side):
    own, units = self._own, self._of.units[t]

    def unit(j, active, loop):
      def layer(i, number, there, loop):
        grads, shared = loop
        mine = _both(active, there)
        piece = self._pieces.layers[t][i]
        # `number` holds a zero that the compiler does not know.
        zero = number - ((own['unit'] + j) * len(self._pieces.layers[t]) + i)
        kept = _read(carry.stored[t][i][1], self._rows_of(t, j + zero)[1])
        left = _read(carry.crossing[t][i], own['crossing'] * units + j + zero)
        fixed, rest = self._fixed(t, i, j), self._rest(number, 0)
        late = piece.weight(fixed, kept, side, rest, left)
        mine_i, shared = _accumulate(
          piece.late, late, grads[i], shared, own['slot'] + j, mine
        )
        return _replace(grads, i, mine_i), shared

      return self._members(t, j, layer, loop)

    loop = (carry.grads[t], carry.shared)
    grads, shared = self._loop('weight', t, unit, loop)
    carry = dataclasses.replace(carry, shared=shared)
    return dataclasses.replace(carry, grads=_replace(carry.grads, t, grads))

  def _exchange(self, carry, out):
    """Sends what this tick made to where it is needed."""
    own = self._own
    inbox = _write(carry.inbox, own['from_self'], out, True)
    num = self._all['operation'].shape[0]
    for sends, step, name in (
      (self._down, 1, 'from_previous'),
      (self._up, -1, 'from_next'),
    ):
      pairs = [(s, (s + step) % num) for s in range(num)]

      def move(pairs=pairs):
        with jax.named_scope(EXCHANGE):
          return jax.lax.ppermute(out, PIPE, pairs)

      if num > 1:
        arrived = jax.lax.cond(sends, move, lambda: out)
        inbox = _write(inbox, own[name], arrived, True)
    return dataclasses.replace(carry, inbox=inbox)


def _at(a, index):
  return jax.lax.dynamic_index_in_dim(a, index, 0, keepdims=False)


def _read(tree, index):
  return jax.tree.map(lambda a: _at(a, index), tree)


def _write(tree, index, values, active):
  """Overwrites a row, or leaves it as it is where not `active`."""

  def one(a, value):
    value = _select(active, value, None if active is True else _at(a, index))
    return jax.lax.dynamic_update_index_in_dim(
      a, value.astype(a.dtype), index, 0
    )

  return jax.tree.map(one, tree, values)


def _add_at(tree, index, values, active):
  def one(a, value):
    value = _masked(active, value.astype(a.dtype))
    return jax.lax.dynamic_update_index_in_dim(
      a, _at(a, index) + value, index, 0
    )

  return jax.tree.map(one, tree, values)


def _add(tree, values, active):
  one = lambda a, value: a + _masked(active, value.astype(a.dtype))
  return jax.tree.map(one, tree, values)


def _add_some(sums, values, active):
  """Adds to some of the sums, by name."""
  return sums | _add({name: sums[name] for name in values}, values, active)


def _add_leaves(leaves, indices, values, active):
  """Adds gradients to sums, by the place of each leaf."""
  leaves = list(leaves)
  # Else the compiler sums what devices have each, and reduces the sum after the
  # loop: in every tick, whether anything came or not.
  values = jax.lax.optimization_barrier(list(values))
  for index, value in zip(indices, values):
    leaves[index] = _add(leaves[index], value, active)
  return leaves


def _accumulate(indices, values, own, shared, slot, active):
  """Adds gradients, by place: a layer's own leaves, then the model's."""
  own, shared = list(own), list(shared)
  for index, value in zip(indices, values):
    if index < len(own):
      own[index] = _add_at(own[index], slot, value, active)
    else:
      index -= len(own)
      shared[index] = _add(shared[index], value, active)
  return own, shared


def _masked(active, value):
  return value if active is True else jnp.where(active, value, 0)


def _both(a, b):
  return b if a is True else a if b is True else a & b


def _select(active, new, old):
  if active is True:
    return new
  return jax.tree.map(lambda a, b: jnp.where(active, a, b), new, old)


def _replace(values, index, value):
  return type(values)((*values[:index], value, *values[index + 1 :]))


def zeros(shapes: Any, num: int) -> Any:
  """Returns zeros (num, ...) for each shape."""
  one = lambda s: jnp.zeros((num, *s.shape), s.dtype)
  return jax.tree.map(one, shapes)
