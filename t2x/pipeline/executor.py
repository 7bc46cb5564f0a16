"""Runs the table of any pipeline schedule, tick by tick.

All devices run one program. In each tick a device does the one operation that
its instructions name. Every kind of operation is a loop: one that the device
does not do in this tick has no trips, and a part with fewer layers has fewer
trips. So no work is masked away. (They are loops because XLA updates in place
the values that a loop carries; a conditional copies its buffers.) Between ticks
activations and gradients move to neighbouring stages.

Only collectives that name their groups of devices may run within an operation:
any other would wait for devices that do something else. On machines whose
devices must not diverge, `uniform` has all devices compute every kind of
operation that any of them does, and masks the results of the others.

Shape suffixes: S stages, C columns of the instructions, N slots.
"""

from collections.abc import Sequence
import dataclasses

import jax
import jax.numpy as jnp

from t2x.parallel import sharding
from t2x.pipeline import buffers
from t2x.pipeline import operations
from t2x.pipeline import passes
from t2x.pipeline import pieces as pieces_lib
from t2x.pipeline import plan as plan_lib
from t2x.pipeline import tick as tick_lib

# Name of the collective-permutes that send messages, on all devices at once.
EXCHANGE = 'pipeline_exchange'


def run(
  pieces: pieces_lib.MicrobatchPrograms,
  plan: plan_lib.PipelinePlan,
  values: tick_lib.Values,
  rows: pieces_lib.Rows,
  key: jax.Array | None,
  start: tick_lib.Carry,
) -> tick_lib.Carry:
  """Runs all ticks of a table.

  To be traced inside a `shard_map` over `pipe`.

  Args:
    pieces: programs of a microbatch.
    plan: schedule, and the layers of its parts.
    values: values that depend on the parameters alone.
    rows: microbatches by name, (M, B, ...) each.
    key: dropout key of the step, or None without dropout.
    start: buffers and sums, zeros or those of an earlier run.

  Returns:
    The buffers and sums after the last tick.
  """
  instructions = plan.instructions

  def step(
    carry: tick_lib.Carry, xs: tuple[jax.Array, ...]
  ) -> tuple[tick_lib.Carry, None]:
    table_SC, *sends = xs
    tick = tick_lib.Tick(pieces, plan, values, rows, key, table_SC)
    carry, out = _operate(tick, carry)
    return _exchange(tick, carry, out, sends), None

  xs = (
    instructions.rows_TSC,
    instructions.sends_down_T,
    instructions.sends_up_T,
  )
  return jax.lax.scan(step, start, tuple(map(jnp.asarray, xs)))[0]


def _operate(
  tick: tick_lib.Tick, carry: tick_lib.Carry
) -> tuple[tick_lib.Carry, pieces_lib.Activations]:
  """Does the tick's operation; returns its message to another part, too."""
  state = buffers.read(carry.inbox, tick.instruction['input'])
  state = passes.enter(tick, carry, state)
  state, carry = passes.forward(tick, carry, state)
  if not tick.plan.table.training:
    return passes.measure(tick, carry, state[-1]), state
  grad, carry = passes.leave(tick, carry)
  grad, carry = passes.backward(tick, carry, state, grad)
  grad, carry = passes.enter_backward(tick, carry, grad)
  carry = passes.weight(tick, carry, state)
  is_grad = tick.instruction['operation'] == operations.BACKWARD
  return carry, buffers.select(is_grad, grad, state)


def _exchange(
  tick: tick_lib.Tick,
  carry: tick_lib.Carry,
  out: pieces_lib.Activations,
  sends: Sequence[jax.Array],
) -> tick_lib.Carry:
  """Sends the messages of a tick to the stages that need them.

  Args:
    tick: the tick.
    carry: buffers.
    out: message of this device.
    sends: whether any stage sends to the next one, and to the one before.
  """
  # Plans of memory show this name.
  put = jax.named_scope('messages')(buffers.write)
  inbox = put(carry.inbox, tick.instruction['from_self'], out, True)
  num = tick.plan.table.num_stages
  ways = zip(sends, (1, -1), ('from_previous', 'from_next'))
  for sent, step, slot in ways if num > 1 else ():
    pairs = [(s, (s + step) % num) for s in range(num)]

    move = lambda pairs=pairs: jax.lax.ppermute(out, sharding.PIPE, pairs)
    # All devices agree on whether any of them sends.
    with jax.named_scope(f'{EXCHANGE}_{slot}'):
      arrived = jax.lax.cond(sent, move, lambda: out)
    inbox = put(inbox, tick.instruction[slot], arrived, True)
  return dataclasses.replace(carry, inbox=inbox)
