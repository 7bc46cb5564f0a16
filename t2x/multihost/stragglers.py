"""Naming the process that the others wait for.

In a step of several processes all take the time of the slowest, and none sees
which that is. What differs between them is what each does alone, before it
hands its step to the devices: it waits for its input.
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

_TIMES = 1.5  # Slower than the median of the others.
_SHARE = 0.1  # Of a step that it must lose; less is not worth a word.
_STEPS = 5  # Of a comparison, at least.
_IN_A_ROW = 2  # Comparisons before the first warning.
_AGAIN = 20  # Comparisons before it is repeated.


class Stragglers:
  """Compares the processes, every few steps and without waiting for them.

  Their seconds are gathered on the devices, behind the step under way, and
  read when the next are gathered.

  Args:
    mesh: of the run.
    every: steps between comparisons; at least five.
  """

  def __init__(self, mesh: Mesh, every: int):
    self._every = max(every, _STEPS)
    self._split = NamedSharding(mesh, P(mesh.axis_names))
    self._gather = jax.jit(
      lambda seconds: seconds, out_shardings=NamedSharding(mesh, P())
    )
    # One device speaks for each process.
    owners = [device.process_index for device in mesh.devices.flat]
    self._first = {p: owners.index(p) for p in sorted(set(owners))}
    self._sum, self._num, self._since = 0.0, 0, time.perf_counter()
    self._last: jax.Array | None = None
    self._slow, self._in_a_row = -1, 0

  def add(self, step: int, seconds: float) -> None:
    """Counts the seconds of a step in which this process worked alone."""
    if len(self._first) == 1:
      return
    self._sum, self._num = self._sum + seconds, self._num + 1
    if step % self._every:
      return
    now = time.perf_counter()
    step_seconds = (now - self._since) / self._num
    own = np.float32(self._sum / self._num)
    self._sum, self._num, self._since = 0.0, 0, now
    gathered = self._gather(processes.per_device(own, self._split))
    last, self._last = self._last, gathered
    if last is not None and jax.process_index() == 0:
      all_seconds = jax.device_get(last)
      by_process = {p: float(all_seconds[i]) for p, i in self._first.items()}
      self.compare(step, by_process, step_seconds)

  def compare(
    self, step: int, seconds: dict[int, float], step_seconds: float
  ) -> None:
    """Warns of a process that has been the slow one for a while."""
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
