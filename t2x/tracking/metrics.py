"""Writes the metrics of a run to metrics.jsonl, TensorBoard and a progress bar.

`metrics.jsonl` holds one JSON object a line and one line a step. Values of
the training step stand under plain names, those of an evaluation after it in
the same row under `eval/NAME/METRIC`. JSON has no NaN or infinity: such a
value is null, and the row's `non_finite` lists the names.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import importlib
import json
import logging
import math
import os
import tempfile
import time
from typing import Any

from etils import epath

from t2x import files
from t2x.tracking import progress_bar
from t2x.tracking import trackers as trackers_lib

_log = logging.getLogger(__name__)

FILE = 'metrics.jsonl'


class MetricsWriter:
  """Writes the rows of a run and shows its progress.

  Where a run resumes after `start_step` steps, the rows of later steps, which
  an interrupted run left behind, are dropped. At 0 all rows are dropped.

  >>> with tempfile.TemporaryDirectory() as workdir:
  ...   options = {'start_step': 0, 'num_steps': 2, 'show': False}
  ...   with MetricsWriter(workdir, **options) as writer:
  ...     writer.write({'step': 1, 'loss': 5.5, 'eval/held_out/loss': 5.25})
  ...   read_rows(workdir)
  [{'step': 1, 'loss': 5.5, 'eval/held_out/loss': 5.25}]

  Args:
    workdir: directory of the run. gs:// and other remote paths are uploaded
      to by `flush` alone.
    start_step: number of steps that the restored state has taken.
    num_steps: number of steps that the run takes in all.
    primary: whether this process writes; exactly one process of a run does.
    show: whether to show a progress bar, or lines where stdout is no terminal.
    header: text printed once at the start, such as the formula of the MFU.
    trackers: experiment trackers, which get each row; see `trackers.open_all`.
  """

  def __init__(
    self,
    workdir: epath.PathLike,
    *,
    start_step: int,
    num_steps: int,
    primary: bool = True,
    show: bool = True,
    header: str = '',
    trackers: Sequence[trackers_lib.Background] = (),
  ):
    self._last_step = start_step if start_step else -1
    self._parts = []
    self._failed = False
    if not primary:
      return
    workdir = files.path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._parts = [
      _open_rows(workdir / FILE, start_step),
      _Later(lambda: _Events(workdir / 'tensorboard', start_step)),
      *trackers,
    ]
    if show:
      self._parts.append(progress_bar.Progress(num_steps, start_step, header))

  def write(self, row: Mapping[str, Any]) -> None:
    """Writes the complete row of one step.

    Args:
      row: the key `step` and the values of metrics by name: numbers or arrays
        of one number, None where unknown. `step` must exceed that of the row
        before.
    """
    row = _plain_row(row)
    assert row['step'] > self._last_step, (row['step'], self._last_step)
    self._last_step = row['step']
    for part in self._parts:
      self._guarded(part.write, row)

  def flush(self) -> bool:
    """Puts every row written so far on disk, or uploads it.

    Returns:
      Whether it succeeded. On a full disk, say, it does not: the rows stay in
      memory, the error is logged once, and each further `write` and `flush`
      tries again.
    """
    # The rows come first; a list, so that the others are flushed all the same.
    done = [self._guarded(part.flush) for part in self._parts]
    if all(done):
      self._failed = False
    return not done or done[0]

  def _guarded(self, action: Callable[..., None], *args: object) -> bool:
    """Runs `action` and returns whether it raised no OSError."""
    try:
      action(*args)
    except OSError as error:
      if not self._failed:
        _log.error(
          'Metrics cannot be written (%s). Training goes on and the rows are '
          'kept in memory until they can be; free space.',
          error,
        )
      self._failed = True
      return False
    return True

  def close(self) -> None:
    """Flushes and closes all outputs; a second call does nothing."""
    parts, self._parts = self._parts, []
    # All are closed, the bar first, even where a disk is full.
    with contextlib.ExitStack() as stack:
      for part in parts:
        stack.callback(part.close)

  def __enter__(self) -> 'MetricsWriter':
    return self

  def __exit__(self, *exc_info: object) -> None:
    self.close()


def read_rows(workdir: epath.PathLike) -> list[dict[str, Any]]:
  """Returns the rows of a run, in order of step.

  A line that is not valid JSON, such as a last line that a crash cut off, is
  logged and left out. A run without metrics.jsonl has no rows.
  """
  path = files.path(workdir) / FILE
  return _parse(path.read_bytes(), path) if path.exists() else []


def _parse(data: bytes, path: epath.Path) -> list[dict[str, Any]]:
  rows = []
  for number, line in enumerate(data.split(b'\n'), 1):
    try:
      rows += [json.loads(line)] if line else []
    except (ValueError, RecursionError):
      _log.warning('%s: line %d is torn and left out.', path, number)
  return rows


def _plain_row(row: Mapping[str, Any]) -> dict[str, Any]:
  """Turns arrays into numbers, and NaN and infinity into None."""
  plain = {
    name: value.item() if hasattr(value, 'item') else value
    for name, value in row.items()
  }
  non_finite = [
    name
    for name, value in plain.items()
    if isinstance(value, float) and not math.isfinite(value)
  ]
  plain.update(dict.fromkeys(non_finite))
  return {**plain, 'non_finite': non_finite} if non_finite else plain


def _dump(row: Mapping[str, Any]) -> str:
  return json.dumps(row, allow_nan=False) + '\n'


def _open_rows(
  path: epath.Path, start_step: int
) -> '_LocalRows | _UploadedRows':
  """Opens the file of rows after dropping those past `start_step`."""
  data = path.read_bytes() if path.exists() else b''
  rows = _parse(data, path) if start_step else []
  kept = ''.join(_dump(row) for row in rows if row['step'] <= start_step)
  if files.is_remote(path):
    return _UploadedRows(path, kept)
  if kept.encode() != data:
    files.write_whole(path, kept)
  return _LocalRows(path)


class _LocalRows:
  """Appends rows to a local file.

  A written line survives the end of the process at once, and a crash of the
  machine after `flush`.
  """

  def __init__(self, path: epath.Path):
    # Unbuffered, so that `write` tells how much of a line a full disk took.
    self._file = open(path, 'ab', buffering=0)
    self._pending = b''

  def write(self, row: Mapping[str, Any]) -> None:
    self._pending += _dump(row).encode()
    self._drain()

  def flush(self) -> None:
    self._drain()
    os.fsync(self._file.fileno())

  def _drain(self) -> None:
    while self._pending:
      self._pending = self._pending[self._file.write(self._pending) :]

  def close(self) -> None:
    with self._file:
      self.flush()


class _UploadedRows:
  """Uploads all rows at each flush: a remote object cannot be appended to."""

  def __init__(self, path: epath.Path, text: str):
    self._path = path
    self._lines = [text]

  def write(self, row: Mapping[str, Any]) -> None:
    self._lines.append(_dump(row))

  def flush(self) -> None:
    self._lines = [''.join(self._lines)]
    self._path.write_text(self._lines[0])

  close = flush


class _Later:
  """A part that is made at the first row, while the devices are at work.

  What it imports takes seconds, for which the first step would wait.
  """

  def __init__(self, make: Callable[[], '_Events']):
    self._make = make
    self._part: _Events | None = None

  def write(self, row: Mapping[str, Any]) -> None:
    if self._part is None:
      self._part = self._make()
    self._part.write(row)

  def flush(self) -> None:
    if self._part is not None:
      self._part.flush()

  def close(self) -> None:
    if self._part is not None:
      self._part.close()


class _Events:
  """Writes TensorBoard events, one for each row.

  Events of a remote folder are written to a local one and uploaded. They are
  written in this thread: tensorboardX's SummaryWriter hands them to another
  thread, and its `flush` does not wait for that thread's queue.
  """

  def __init__(self, folder: epath.Path, start_step: int):
    # It imports torch where that is installed.
    from tensorboardX import event_file_writer

    # Imported by name: type checkers see no classes in generated modules.
    event_pb2 = importlib.import_module('tensorboardX.proto.event_pb2')
    summary_pb2 = importlib.import_module('tensorboardX.proto.summary_pb2')
    self._event = event_pb2.Event
    self._summary = summary_pb2.Summary
    self._remote = folder if files.is_remote(folder) else None
    self._folder = epath.Path(tempfile.mkdtemp() if self._remote else folder)
    self._folder.mkdir(parents=True, exist_ok=True)
    # File names count whole seconds; two runs within one must not collide.
    self._writer = event_file_writer.EventsWriter(
      os.fspath(self._folder / 'events'), f'.{time.time_ns()}'
    )
    # TensorBoard then hides what an interrupted run wrote past this step.
    log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(start_step + 1 if start_step else 0, session_log=log)

  def write(self, row: Mapping[str, Any]) -> None:
    values = [
      self._summary.Value(tag=tag, simple_value=value)
      for tag, value in trackers_lib.scalars(row).items()
    ]
    self._add(row['step'], summary=self._summary(value=values))

  def _add(self, step: int, **fields: object) -> None:
    event = self._event(wall_time=time.time(), step=step, **fields)
    self._writer.write_event(event)

  def flush(self) -> None:
    self._writer.flush()
    self._upload()

  def close(self) -> None:
    self._writer.close()
    self._upload()
    if self._remote is not None:
      self._folder.rmtree()

  def _upload(self) -> None:
    if self._remote is not None:
      self._remote.mkdir(parents=True, exist_ok=True)
      for path in self._folder.iterdir():
        (self._remote / path.name).write_bytes(path.read_bytes())
