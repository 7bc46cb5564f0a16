"""Sends the rows of a run to experiment trackers, which never hold it up.

A tracker is one of `NAMES`. Its library is imported when it is chosen, and
what it writes lies in the workdir, unless the environment names a server.
`WORKDIR/trackers/NAME.json` keeps the id of the tracker's run, so that a run
which goes on after an interruption goes on there too, and its last step.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import difflib
import importlib
import importlib.util
import json
import logging
import os
import pathlib
import queue
import tempfile
import threading
from typing import Any
from typing import Protocol

from etils import epath

from t2x import files

_log = logging.getLogger(__name__)

# The libraries of each tracker: those that its extra installs.
_LIBRARIES = {
  'wandb': ('wandb',),
  'mlflow': ('mlflow', 'sqlalchemy', 'alembic'),
  'trackio': ('trackio',),
}
NAMES = (*_LIBRARIES,)
FOLDER = 'trackers'  # In the workdir: what is kept of each.
_MOST_WAITING = 100_000  # Rows in memory that a tracker has yet to take.
_CLOSE_SECONDS = 120.0  # For which the end of a run waits for a tracker.


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunInfo:
  """What a tracker is told of a run.

  Attributes:
    project: name under which runs are compared.
    name: name of the run.
    config: dotted name -> scalar of every setting.
    folder: local folder for the tracker's files.
    num_steps: number of steps that the run takes in all.
    identifier: id of the tracker's run to go on with; None begins one.
  """

  project: str
  name: str
  config: Mapping[str, Any]
  folder: pathlib.Path
  num_steps: int
  identifier: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Started:
  """What a tracker has begun, or goes on with.

  Attributes:
    identifier: id by which it can go on with the run.
    last_step: last step that it holds, as far as it can tell; 0 for none.
  """

  identifier: str
  last_step: int = 0


class Tracker(Protocol):
  """A library that shows runs. Any method may raise, and may take long."""

  def start(self, run: RunInfo) -> Started:
    """Begins a run, or goes on with `run.identifier`."""
    ...

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the values of one step, by tag."""
    ...

  def flush(self) -> None:
    """Hands on what it keeps in memory."""
    ...

  def close(self) -> None:
    """Ends the run; the last call."""
    ...


def check_names(names: Sequence[str], field: str) -> None:
  """Raises ValueError if a name is no tracker's, or is given twice.

  Args:
    names: the names.
    field: name of the setting that holds them, for the message.
  """
  for i, name in enumerate(names):
    if name not in NAMES:
      close = difflib.get_close_matches(name.lower(), NAMES, n=1, cutoff=0.5)
      hint = f' Did you mean {close[0]!r}?' if close else ''
      raise ValueError(
        f'{field}: there is no tracker {name!r}; they are {", ".join(NAMES)}. '
        f'metrics.jsonl and TensorBoard are always written.{hint}'
      )
    if name in names[:i]:
      raise ValueError(f'{field}: {name!r} stands there twice.')


def check_installed(names: Sequence[str]) -> None:
  """Raises ValueError if a library of the named trackers is missing."""
  for name in names:
    missing = [lib for lib in _LIBRARIES[name] if not _is_installed(lib)]
    if missing:
      raise ValueError(
        f'train.trackers={name} needs {", ".join(missing)}, which is not '
        f'installed: bash scripts/setup.sh {name}'
      )


def _is_installed(library: str) -> bool:
  # A folder of that name, as W&B leaves them, passes for a package without a
  # file of its own.
  spec = importlib.util.find_spec(library)
  return spec is not None and spec.origin is not None


def make(name: str) -> Tracker:
  """Returns a tracker by its name; nothing of its library is imported yet."""
  module = importlib.import_module(f't2x.tracking.{name}_tracker')
  return getattr(module, f'{name.capitalize()}Tracker')()


def open_all(
  names: Sequence[str],
  workdir: epath.PathLike,
  *,
  project: str,
  config: Mapping[str, Any],
  start_step: int,
  num_steps: int,
) -> list['Background']:
  """Returns the named trackers, as parts of a `metrics.MetricsWriter`.

  Args:
    names: names of trackers.
    workdir: directory of the run, local or gs://.
    project: name under which runs are compared.
    config: dotted name -> scalar of every setting.
    start_step: number of steps that the restored state has taken; at 0, a run
      of the tracker begins, and else the last one goes on.
    num_steps: number of steps that the run takes in all.
  """
  root = files.path(workdir)
  parts = []
  for name in names:
    kept = _Kept(root / FOLDER / f'{name}.json', project)
    run = RunInfo(
      project=project,
      name=root.name,
      config=config,
      folder=pathlib.Path(root),
      num_steps=num_steps,
    )
    parts.append(Background(name, make(name), run, kept, start_step))
  return parts


class _Kept:
  """What the workdir keeps of a tracker: the id of its run, and its last step.

  In a gs:// workdir the step is that of the last `save`: an upload for each
  row would take longer than the row.
  """

  def __init__(self, file: epath.Path, project: str):
    self._file = file
    self._project = project
    self._is_remote = files.is_remote(file)
    self._identifier = ''
    self._step = 0

  @property
  def is_remote(self) -> bool:
    return self._is_remote

  def read(self) -> Started | None:
    """Returns the id and the last step of a run in this project, if known."""
    try:
      data = json.loads(self._file.read_text())
      if data['project'] != self._project:
        return None
      return Started(identifier=data['id'], last_step=data['step'])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
      return None  # None yet, or torn by a crash of the machine.

  def begin(self, identifier: str, step: int) -> None:
    self._file.parent.mkdir(parents=True, exist_ok=True)
    self._identifier, self._step = identifier, step
    self.save()

  def add(self, step: int) -> None:
    self._step = step
    if not self._is_remote:
      self.save()

  def save(self) -> None:
    text = json.dumps(
      {'id': self._identifier, 'project': self._project, 'step': self._step}
    )
    if self._is_remote:
      self._file.write_text(text)
      return
    # Not synced, unlike `files.write_whole`: this is done for every row, and
    # survives the end of the process all the same.
    temporary = self._file.with_name(f'{self._file.name}.tmp')
    temporary.write_text(text)
    os.replace(temporary, self._file)


class Background:
  """A tracker in a thread of its own, whose failures are only logged.

  Its library is imported and its run begun at the first row, while the devices
  are at work. A row that it cannot take is left out of it; the first error is
  logged, and at the end how many rows are missing. Steps that are taken again
  after an interruption are left out as well: the tracker has them.

  Args:
    name: name of the tracker.
    tracker: the tracker.
    run: facts of the run.
    kept: file that remembers the tracker's run; None for none.
    start_step: number of steps that the restored state has taken.
    close_seconds: seconds for which `close` waits for it.
  """

  def __init__(
    self,
    name: str,
    tracker: Tracker,
    run: RunInfo,
    kept: _Kept | None = None,
    start_step: int = 0,
    close_seconds: float = _CLOSE_SECONDS,
  ):
    self._name = name
    self._tracker = tracker
    self._run = run
    self._kept = kept
    self._start_step = start_step
    self._close_seconds = close_seconds
    self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(
      _MOST_WAITING
    )
    self._thread: threading.Thread | None = None
    self._closing = threading.Event()
    self._is_off = False
    self._last_step = 0
    self._missing = 0
    self._has_failed = False

  def write(self, row: Mapping[str, Any]) -> None:
    """Hands over the row of a step, and returns at once."""
    if self._thread is None:
      self._thread = threading.Thread(
        target=self._work, name=f'tracker-{self._name}', daemon=True
      )
      self._thread.start()
    step, values = row['step'], scalars(row)
    if self._is_off or not self._put(lambda: self._write(step, values)):
      self._missing += 1

  def flush(self) -> None:
    """Lets the tracker hand on its rows, and returns at once."""
    if self._thread is not None and not self._is_off:
      self._put(self._flush)

  def close(self) -> None:
    """Ends the tracker's run; waits for it, but not for ever."""
    if self._thread is None:
      return
    self._closing.set()
    self._put(None)  # Where there is no room, the thread is awake anyhow.
    self._thread.join(self._close_seconds)
    if self._thread.is_alive():
      _log.error(
        '%s has not taken all rows after %.0f s; the run ends without it. '
        'metrics.jsonl has them.',
        self._name,
        self._close_seconds,
      )
    elif self._missing:
      _log.warning(
        '%s lacks %d rows of this run; metrics.jsonl has them.',
        self._name,
        self._missing,
      )
    self._thread, self._is_off = None, True

  def _put(self, action: Callable[[], None] | None) -> bool:
    try:
      self._queue.put_nowait(action)
    except queue.Full:
      return False
    return True

  # --- In the thread. ---

  def _work(self) -> None:
    if not self._guarded(self._start):
      self._is_off = True
    while not (self._closing.is_set() and self._queue.empty()):
      action = self._queue.get()
      if action is not None:
        self._missing += self._is_off or not self._guarded(action)
    if not self._is_off:
      self._guarded(self._close)

  def _guarded(self, action: Callable[[], None]) -> bool:
    """Runs `action` and returns whether it raised nothing."""
    try:
      action()
    except (Exception, SystemExit) as error:
      if not self._has_failed:
        _log.error(
          '%s failed (%s: %s). Training goes on, and metrics.jsonl has all '
          'rows.',
          self._name,
          type(error).__name__,
          error,
        )
      self._has_failed = True
      return False
    return True

  def _start(self) -> None:
    # A run at its first step is another one, as in metrics.jsonl.
    kept = self._kept.read() if self._kept and self._start_step else None
    run = self._run
    if self._kept is not None and self._kept.is_remote:
      run = dataclasses.replace(run, folder=_temporary(self._name))
    if kept is not None:
      run = dataclasses.replace(run, identifier=kept.identifier)
    started = self._tracker.start(run)
    self._last_step = started.last_step
    if kept is not None and kept.identifier == started.identifier:
      self._last_step = max(self._last_step, kept.last_step)
    if self._kept is not None:
      self._kept.begin(started.identifier, self._last_step)

  def _write(self, step: int, values: Mapping[str, float]) -> None:
    if step <= self._last_step:
      return
    self._tracker.write(step, values)
    self._last_step = step
    if self._kept is not None:
      self._kept.add(step)

  def _flush(self) -> None:
    self._tracker.flush()
    if self._kept is not None:
      self._kept.save()

  def _close(self) -> None:
    try:
      self._flush()
    finally:
      self._tracker.close()


def _temporary(name: str) -> pathlib.Path:
  folder = pathlib.Path(tempfile.mkdtemp(prefix=f't2x-{name}-'))
  _log.info(
    '%s keeps what it does not send to a server in %s: its files cannot lie in '
    'an object store.',
    name,
    folder,
  )
  return folder


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
  """Returns the numbers of a row by tag, those of the step under `train/`."""
  return {
    name if name.startswith('eval/') else f'train/{name}': value
    for name, value in row.items()
    if isinstance(value, (int, float)) and name != 'step'
  }
