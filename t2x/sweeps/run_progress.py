"""How far a run is, from the files of its workdir alone."""

from collections.abc import Mapping
import dataclasses
import json
import os
from typing import Any

from etils import epath

from t2x import files
from t2x.tracking import metrics
from t2x.trainer import workdir as workdir_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
  """What a run has reached.

  Attributes:
    step: step of its last row; 0 before the first.
    values: value of the metric by step, of rows that have it.
    finished: whether the run has taken all its steps.
    diverged: names of the values of its last row that are not finite; '' if
      all are.
    num_skipped: updates in a row that were skipped up to that row.
    stopped_at: step after which the run was told to stop, once it has saved
      that; None before.
    seconds: time in training steps after the first step.
    names: metrics of its rows.
  """

  step: int = 0
  values: Mapping[int, float] = dataclasses.field(default_factory=dict)
  finished: bool = False
  diverged: str = ''
  num_skipped: int = 0
  stopped_at: int | None = None
  seconds: float = 0.0
  names: tuple[str, ...] = ()


class RunProgress:
  """Reads what a run has written since it was last asked.

  Args:
    workdir: directory of the run, local or gs://; it may not exist yet.
    metric: name of the metric in the run's rows.
    first_step: step up to which its rows came along from another run.
  """

  def __init__(self, workdir: epath.PathLike, metric: str, first_step: int = 0):
    self._workdir = files.path(workdir)
    self._file = self._workdir / metrics.FILE
    self._metric = metric
    self._first_step = first_step
    self._identity: Any = None
    self._offset = 0
    self._forget()

  def _forget(self) -> None:
    self._rows: dict[str, Any] = {
      'step': 0,
      'values': {},
      'diverged': '',
      'num_skipped': 0,
      'seconds': 0.0,
      'names': {},
    }
    self._offset = 0

  def read(self) -> Snapshot:
    """Returns the progress by now."""
    for row in self._new_rows():
      self._add(row)
    seen = self._rows
    return Snapshot(
      step=seen['step'],
      values=dict(seen['values']),
      finished=workdir_lib.finished_step(self._workdir) == seen['step'] > 0,
      diverged=seen['diverged'],
      num_skipped=seen['num_skipped'],
      stopped_at=workdir_lib.stopped_step(self._workdir),
      seconds=seen['seconds'],
      names=(*seen['names'],),
    )

  def _add(self, row: Mapping[str, Any]) -> None:
    seen, step = self._rows, row['step']
    if row.get('step_seconds') is not None and step > self._first_step:
      seen['seconds'] += row['step_seconds'] * (step - seen['step'])
    seen['step'] = step
    seen['diverged'] = ', '.join(row.get('non_finite', ()))
    seen['num_skipped'] = int(row.get('num_skipped') or 0)
    seen['names'].update(dict.fromkeys(row))
    value = row.get(self._metric)
    if value is not None:
      seen['values'][step] = float(value)

  def _new_rows(self) -> list[dict[str, Any]]:
    """Returns the rows added since; all, where the file is another one."""
    if files.is_remote(self._file):
      self._forget()
      return metrics.read_rows(self._workdir)
    try:
      file = open(self._file, 'rb')
    except FileNotFoundError:
      return []
    with file:
      status = os.fstat(file.fileno())
      # A run that goes on writes the file anew, without later rows.
      if self._identity != status.st_ino or status.st_size < self._offset:
        self._identity = status.st_ino
        self._forget()
      file.seek(self._offset)
      data = file.read()
    whole = data[: data.rfind(b'\n') + 1]
    self._offset += len(whole)
    return [json.loads(line) for line in whole.splitlines()]
