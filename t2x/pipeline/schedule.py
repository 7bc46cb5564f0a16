"""A pipeline schedule: a table that is checked, simulated, drawn and saved.

  schedule = schedules.make('zb_h1', num_stages=4, num_microbatches=8)
  print(schedule.text())
  print(schedule.simulate().bubble)

`table` says what a tick is.
"""

import dataclasses
import functools

import numpy as np

from t2x import files
from t2x import reading
from t2x.pipeline import drawing
from t2x.pipeline import operations as ops
from t2x.pipeline import simulation
from t2x.pipeline import table as table_lib
from t2x.pipeline import table_text
from t2x.pipeline import validation


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Schedule(table_lib.Table):
  """A table that has been checked: it can run, or it raises when it is made.

  Attributes:
    tick_OMP: tick of each kind of operation, microbatch and part, computed from
      the table; -1 for kinds that are not used.

  Raises:
    ValueError: an operation is missing, is done twice, or comes before one that
      it depends on; or a value is out of range. The message gives the tick,
      stage and microbatch.
  """

  tick_OMP: np.ndarray = dataclasses.field(init=False, repr=False)

  def __post_init__(self) -> None:
    validation.check_fields(self)
    used_TS = np.asarray(self.operation_TS) != ops.IDLE
    for name in ('operation_TS', 'microbatch_TS', 'chunk_TS'):
      array_TS = np.where(used_TS, getattr(self, name), 0).astype(np.int32)
      self._keep(name, array_TS)
    self._keep('tick_OMP', validation.check_table(self))

  def _keep(self, name: str, array: np.ndarray) -> None:
    array.setflags(write=False)
    object.__setattr__(self, name, array)

  def simulate(
    self,
    costs: simulation.Costs | None = None,
    memory: simulation.MicrobatchMemory | None = None,
  ) -> simulation.Simulation:
    """Returns times, bubbles and memory; see `simulation.simulate`.

    Args:
      costs: durations of the operations; None for 1 each.
      memory: memory of a microbatch of a part; None for 1.
    """
    return simulation.simulate(
      self, costs or simulation.Costs(), memory or simulation.MicrobatchMemory()
    )

  def draw(self, path: str, costs: simulation.Costs | None = None) -> None:
    """Draws a Gantt chart; see `drawing.draw`.

    Args:
      path: name of an .svg or .png file.
      costs: durations of the operations; None for 1 each.
    """
    drawing.draw(self.simulate(costs), path)

  def _repr_html_(self) -> str:
    """Returns the Gantt chart that a notebook shows."""
    return drawing.svg(self.simulate())

  def text(self) -> str:
    """Returns the table with a line for each stage; see `table_text.text`."""
    return table_text.text(self)

  def to_csv(self) -> str:
    """Returns the table as CSV, a line for each tick; see `table_text`."""
    return table_text.to_csv(self)


def from_csv(text: str) -> Schedule:
  """Returns the schedule of a CSV table in the form of `Schedule.to_csv`.

  Raises:
    ValueError: a line has another form, and the message gives it; or the table
      cannot run.
  """
  return Schedule(**table_text.parse_csv(text))


def read(path: str) -> Schedule:
  """Reads a schedule from a CSV file, local or remote.

  Raises:
    ValueError: there is no such file, or it has no table that can run.
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
  """As `from_csv`, cached: a search for layouts reads one file many times."""
  return from_csv(text)
