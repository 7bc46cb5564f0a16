"""A lower bound on the time of a compiled step: a model, not a measurement.

Matrix products at the chip's published FLOP/s, memory traffic at its bandwidth,
and collectives at the speed of the links (`links`) each take some time alone. A
step takes the longer of the first two and, on top, the collectives that nothing
hides; or the time of all collectives, if that is longer (Williams et al., 2009,
"Roofline").
"""

from collections.abc import Iterable
import dataclasses

import jax

from t2x.cost_model import links
from t2x.hardware import machines
from t2x.hlo import collectives


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """Times of one step on one device, in seconds.

  Attributes:
    compute: time of the matrix products.
    memory: time of reading and writing the device's memory.
    network: time of all collectives.
    exposed: time of the collectives beside which no product is scheduled.
    idle: share of the step that the busiest stage waits for the others.
  """

  compute: float
  memory: float
  network: float
  exposed: float
  idle: float = 0.0

  @property
  def seconds(self) -> float:
    """The lower bound on the time of a step."""
    busy = max(self.compute, self.memory) / (1.0 - self.idle)
    return max(busy + self.exposed, self.network)

  @property
  def bound(self) -> str:
    """The resource that takes longest: 'compute', 'memory' or 'network'."""
    times = {
      'compute': self.compute,
      'memory': self.memory,
      'network': self.network,
    }
    return max(times, key=lambda name: times[name])


def idle(most: float, mean: float, bubble: float) -> float:
  """Returns the share of a step that the busiest stage waits for the others.

  A stage with the mean amount of work waits for the whole bubble; one with more
  work waits less.

  Args:
    most: FLOPs of the busiest stage.
    mean: mean FLOPs of the stages.
    bubble: share of the step that stages wait if all have equal work.
  """
  return max(0.0, 1.0 - most / mean * (1.0 - bubble)) if mean else 0.0


def exchange_seconds(
  listed: Iterable[collectives.Collective],
  mesh: jax.sharding.Mesh,
  chip: machines.Chip,
) -> list[float]:
  """Returns a lower bound on the seconds of each collective in a step.

  Args:
    listed: the collectives, each of which counts as often as it runs.
    mesh: the mesh that the program was compiled for.
    chip: the chip, which has the bandwidth of the links.
  """
  axes = links.axes_of(mesh)
  times = []
  for c in listed:
    parts = [links.reached(axes[name], c.between) for name in c.axes]
    times.append(float(c.times) * links.seconds(c.kind, c.bytes, parts, chip))
  return times
