"""The least time that a compiled step could take: a model, no measurement.

Products at the chip's published FLOP/s, memory traffic at its bandwidth, and
exchanges at the speed of the links (`links`) each take some time alone. A step
takes the longest of the first two, and the exchanges that nothing hides, or all
exchanges if those take longer (Williams et al., 2009, "Roofline").
"""

from collections.abc import Iterable
import dataclasses
from typing import Any

from t2x.cost_model import links
from t2x.hardware import machines
from t2x.hlo import collectives


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
  """Seconds of one step, on one device.

  Attributes:
    compute: of products.
    memory: of reading and writing the device's memory.
    network: of all exchanges.
    exposed: of those beside which no product is scheduled.
    idle: share of the time that the stage with the most to do waits for others.
  """

  compute: float
  memory: float
  network: float
  exposed: float
  idle: float = 0.0

  @property
  def seconds(self) -> float:
    """The least time of a step."""
    busy = max(self.compute, self.memory) / (1.0 - self.idle)
    return max(busy + self.exposed, self.network)

  @property
  def bound(self) -> str:
    """What takes longest: compute, memory or network."""
    times = {
      'compute': self.compute,
      'memory': self.memory,
      'network': self.network,
    }
    return max(times, key=lambda name: times[name])


def idle(most: float, mean: float, bubble: float) -> float:
  """Returns the share of a step that the stage with the most to do waits.

  The mean of the stages takes a step less its bubble: of that this one waits
  less.

  Args:
    most: FLOPs of that stage.
    mean: FLOPs of all stages, their mean.
    bubble: share of the time that stages of equal work wait.
  """
  return max(0.0, 1.0 - most / mean * (1.0 - bubble)) if mean else 0.0


def exchange_seconds(
  found: Iterable[collectives.Collective], mesh: Any, chip: machines.Chip
) -> list[float]:
  """Returns the least time of each exchange, of all times that it runs."""
  axes = links.axes_of(mesh)
  times = []
  for c in found:
    own = [links.reached(axes[name], c.between) for name in c.axes]
    times.append(float(c.times) * links.seconds(c.kind, c.bytes, own, chip))
  return times
