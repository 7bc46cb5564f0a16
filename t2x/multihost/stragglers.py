"""Finds the process that the others wait for.

All processes take the time of the slowest for a step, and none sees which that
is. They differ in the time that each works alone before it hands its step to
the devices: it waits for its input.
"""

import logging
import time

import jax
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t2x.multihost import processes

_log = logging.getLogger(__name__)

_TIMES = 1.5  # Time of a straggler over the median of the others, at least.
_SHARE = 0.1  # Share of a step that a straggler costs, at least.
_STEPS = 5  # Steps between comparisons, at least.
_IN_A_ROW = 2  # Comparisons before the first warning.
_AGAIN = 20  # Comparisons before the warning is repeated.


class Stragglers:
  """Compares the times of processes every few steps, without waiting for them.

  The times are gathered on the devices after the current step, and read at the
  next comparison.

  Args:
    mesh: the mesh of the run.
    every: number of steps between comparisons; five if it is smaller.
  """

  def __init__(self, mesh: Mesh, every: int):
    self._every = max(every, _STEPS)
    self._split = NamedSharding(mesh, P(mesh.axis_names))
    self._gather = jax.jit(
      lambda seconds: seconds, out_shardings=NamedSharding(mesh, P())
    )
    # The first device of each process has its time.
    owners = [device.process_index for device in mesh.devices.flat]
    self._first = {p: owners.index(p) for p in sorted(set(owners))}
    self._sum, self._num, self._since = 0.0, 0, time.perf_counter()
    self._last: jax.Array | None = None
    self._slow, self._in_a_row = -1, 0

  def add(self, step: int, seconds: float) -> None:
    """Counts a step, and compares the processes if it is time.

    Args:
      step: number of the step.
      seconds: time in the step that this process worked alone, in seconds.
    """
    if len(self._first) == 1:
      return
    self._sum, self._num = self._sum + seconds, self._num + 1
    if step % self._every:
      return
    now = time.perf_counter()
    step_seconds = (now - self._since) / self._num
    mean = np.float32(self._sum / self._num)
    self._sum, self._num, self._since = 0.0, 0, now
    gathered = self._gather(processes.per_device(mean, self._split))
    last, self._last = self._last, gathered
    if last is not None and jax.process_index() == 0:
      all_seconds = jax.device_get(last)
      by_process = {p: float(all_seconds[i]) for p, i in self._first.items()}
      self.compare(step, by_process, step_seconds)

  def compare(
    self, step: int, seconds: dict[int, float], step_seconds: float
  ) -> None:
    """Warns of a process that was the slowest in several comparisons.

    Args:
      step: number of the step.
      seconds: mean time that each process worked alone in a step, in seconds.
      step_seconds: mean time of a step, in seconds.
    """
    slow = max(seconds, key=lambda p: seconds[p])
    median = float(np.median([s for p, s in seconds.items() if p != slow]))
    lost = seconds[slow] - median
    if seconds[slow] <= _TIMES * median or lost < _SHARE * step_seconds:
      self._slow, self._in_a_row = -1, 0
      return
    self._in_a_row = self._in_a_row + 1 if slow == self._slow else 1
    self._slow = slow
    if self._in_a_row % _AGAIN == _IN_A_ROW:
      _log.warning(
        'Process %d keeps the others waiting: up to step %d its input took '
        '%.3f s a step, and the median of the others is %.3f s. See what '
        'else its machine does, and where its data lies.',
        slow,
        step,
        seconds[slow],
        median,
      )
