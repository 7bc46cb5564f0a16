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

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from t2x.parallel import sharding
from t2x.pipeline import buffers
from t2x.pipeline import operations
from t2x.pipeline import passes
from t2x.pipeline import pieces as pieces_lib
from t2x.pipeline import plan as plan_lib
from t2x.pipeline import tick as tick_lib

# Collective-permutes of this name move messages, on all devices at once.
EXCHANGE = 'pipeline_exchange'


def run(
  pieces: pieces_lib.Pieces,
  plan: plan_lib.Plan,
  values: tick_lib.Values,
  rows: Any,
  key: Any,
  start: tick_lib.Carry,
) -> tick_lib.Carry:
  """Runs all ticks; to be traced inside a `shard_map` over `pipe`.

  Args:
    pieces: the programs of a microbatch.
    plan: what is run.
    values: of parameters.
    rows: the microbatches, (M, B, ...) each.
    key: of dropout, or None.
    start: buffers and sums, of zeros or of an earlier run.
  """
  told = plan.told

  def step(carry, told_now):
    table_SC, *sends = told_now
    tick = tick_lib.Tick(pieces, plan, values, rows, key, table_SC)
    carry, out = _operate(tick, carry)
    return _exchange(tick, carry, out, sends), None

  xs = (told.rows_TSC, told.sends_down_T, told.sends_up_T)
  return jax.lax.scan(step, start, tuple(map(jnp.asarray, xs)))[0]


def _operate(tick: tick_lib.Tick, carry: tick_lib.Carry):
  """Does the tick's operation; returns what it makes for another part."""
  state = buffers.read(carry.inbox, tick.own['input'])
  state = passes.enter(tick, carry, state)
  state, carry = passes.forward(tick, carry, state)
  if not tick.plan.table.training:
    return passes.measure(tick, carry, state[-1]), state
  grad, carry = passes.leave(tick, carry)
  grad, carry = passes.backward(tick, carry, state, grad)
  grad, carry = passes.enter_backward(tick, carry, grad)
  carry = passes.weight(tick, carry, state)
  is_grad = tick.own['operation'] == operations.BACKWARD
  return carry, buffers.select(is_grad, grad, state)


def _exchange(
  tick: tick_lib.Tick, carry: tick_lib.Carry, out, sends
) -> tick_lib.Carry:
  """Sends what a tick has made to where it is needed."""
  put = jax.named_scope('messages')(buffers.write)  # As plans name them.
  inbox = put(carry.inbox, tick.own['from_self'], out, True)
  num = tick.plan.table.num_stages
  ways = zip(sends, (1, -1), ('from_previous', 'from_next'))
  for sent, step, slot in ways if num > 1 else ():
    pairs = [(s, (s + step) % num) for s in range(num)]

    move = lambda pairs=pairs: jax.lax.ppermute(out, sharding.PIPE, pairs)
    # All devices know whether any sends.
    with jax.named_scope(f'{EXCHANGE}_{slot}'):
      arrived = jax.lax.cond(sent, move, lambda: out)
    inbox = put(inbox, tick.own[slot], arrived, True)
  return dataclasses.replace(carry, inbox=inbox)
