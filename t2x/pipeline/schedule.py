"""A pipeline schedule: what each stage does in each tick.

  schedule = schedules.make('zb_h1', num_stages=4, num_microbatches=8)
  print(schedule.text())
  print(schedule.simulate().bubble)

Its table and what a tick is stand in `table`.
"""

import dataclasses
import functools

from t2x import files
from t2x import reading
from t2x.pipeline import drawing
from t2x.pipeline import simulation
from t2x.pipeline import table as table_lib
from t2x.pipeline import table_text

Placement = table_lib.Placement


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Schedule(table_lib.Table):
  """A checked table that can be simulated, drawn and written."""

  def simulate(
    self,
    costs: simulation.Costs | None = None,
    memory: simulation.Memory | None = None,
  ) -> simulation.Simulation:
    """Returns times, bubbles and memory; see `simulation.simulate`."""
    return simulation.simulate(
      self, costs or simulation.Costs(), memory or simulation.Memory()
    )

  def draw(self, path: str, costs: simulation.Costs | None = None) -> None:
    """Draws a Gantt chart to an .svg or .png file; see `drawing.draw`."""
    drawing.draw(self.simulate(costs), path)

  def _repr_html_(self) -> str:
    """Returns the Gantt chart that a notebook shows."""
    return drawing.svg(self.simulate())

  def text(self) -> str:
    """Returns the table, a line a stage; see `table_text.text`."""
    return table_text.text(self)

  def to_csv(self) -> str:
    """Returns the table as CSV, a line a tick; see `table_text.to_csv`."""
    return table_text.to_csv(self)


def from_csv(text: str) -> Schedule:
  """Reads a schedule that `Schedule.to_csv` wrote, perhaps changed by hand.

  Raises:
    ValueError: a line is not of that form, which is named; or whatever `Table`
      refuses.
  """
  return Schedule(**table_text.parse_csv(text))


def read(path: str) -> Schedule:
  """Reads a schedule from a file, local or remote.

  Raises:
    ValueError: there is no such file, or it holds no table; it is named.
  """
  file = files.path(path)
  if not file.exists():
    raise ValueError(
      f'{path}: there is no such file. A run keeps a copy of its table, '
      'WORKDIR/schedule.csv; scripts/show_schedule.py --csv=FILE writes one.'
    )
  text = reading.text(file)
  try:
    return _parsed(text)
  except ValueError as error:
    raise ValueError(f'{path}: {error}') from error


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> Schedule:
  """As `from_csv`, once for a text: a search for layouts reads it often."""
  return from_csv(text)
