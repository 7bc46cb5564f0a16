"""Which worker does what, where several share a study.

A worker is a process that starts trials. It claims a trial by creating a file
that nobody else can create too, and rewrites a file of its own every few
seconds. A worker whose file stands still is dead: another may take its claims
over. Times of machines are not compared; each watches by its own clock.
"""

from collections.abc import Iterator
import contextlib
import functools
import json
import os
import pathlib
import re
import socket
import threading
import time
from typing import Any
import uuid

from etils import epath

from t2x import files
from t2x import reading

_CLAIM = re.compile(r'(?P<name>.+)\.(?P<number>\d{3})\.json')
_REMEDY = 'Remove it: whose it was, is then unknown.'


class Workers:
  """The workers of a study, and the claims that they hold.

  Attributes:
    own: name of this worker.
  """

  def __init__(
    self,
    directory: epath.Path,
    *,
    beat_seconds: float = 10.0,
    dead_seconds: float = 60.0,
  ):
    """Looks at a study; `at_work` makes this process a worker of it.

    Args:
      directory: directory of the study.
      beat_seconds: seconds between two signs of life of this worker.
      dead_seconds: seconds without a sign of life after which another is dead.
    """
    host = re.sub(r'[^A-Za-z0-9-]', '-', socket.gethostname())
    self.own = f'{host}-{os.getpid()}-{uuid.uuid4().hex[:6]}'
    self._workers = directory / 'workers'
    self._claims = directory / 'claims'
    self._beat_seconds = beat_seconds
    self._dead_seconds = dead_seconds
    self._seen: dict[str, tuple[int, float]] = {}
    self._held: dict[str, int] = {}
    self._beats = 0
    for folder in (self._workers, self._claims):
      folder.mkdir(parents=True, exist_ok=True)

  @contextlib.contextmanager
  def at_work(self) -> Iterator[None]:
    """Gives signs of life inside the block; at its end the worker ends."""
    stop = threading.Event()
    self._beat()

    def beat() -> None:
      while not stop.wait(self._beat_seconds):
        try:
          self._beat()
        except OSError:  # A full disk, say: the next one may succeed.
          continue

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
      yield
    finally:
      stop.set()
      thread.join()
      self._beat(ended=True)

  def _beat(self, ended: bool = False) -> None:
    self._beats += 1
    facts = {
      'machine': _machine(),
      'process': os.getpid(),
      'started': start_of(os.getpid()),
      'beats': self._beats,
      'ended': ended,
    }
    text = json.dumps(facts) + '\n'
    files.write_whole(self._workers / f'{self.own}.json', text)

  def others(self) -> list[str]:
    """Returns the names of the other workers that may be alive."""
    names = [
      p.stem for p in files.children(self._workers) if p.suffix == '.json'
    ]
    return sorted(n for n in names if n != self.own and not self.is_dead(n))

  def is_dead(self, name: str) -> bool:
    """Whether a worker has ended, or has given no sign of life for too long.

    A process of this machine is looked up. Of another machine's, the file must
    have stood still for as long as this process watched it.

    Args:
      name: name of the worker.
    """
    if name == self.own:
      return False
    file = self._workers / f'{name}.json'
    if not file.exists():
      return True
    facts = _read(file, 'ended', 'machine', 'process', 'started', 'beats')
    if facts['ended']:
      return True
    if facts['machine'] == _machine():
      start = start_of(facts['process'])
      return start is None or start != facts['started']
    now = time.monotonic()
    beats, since = self._seen.get(name, (-1, now))
    if beats != facts['beats']:
      beats, since = facts['beats'], now
    self._seen[name] = beats, since
    return now - since > self._dead_seconds

  def claimed(self) -> dict[str, int]:
    """Returns name -> number of the newest claim of whatever is claimed."""
    newest: dict[str, int] = {}
    for path in files.children(self._claims):
      match = _CLAIM.fullmatch(path.name)
      if match:
        number = int(match['number'])
        newest[match['name']] = max(number, newest.get(match['name'], 0))
    return newest

  def claim(self, name: str) -> bool:
    """Claims what nobody has claimed; returns whether it is now this one's."""
    return self._create(name, 0)

  def owner_of(self, name: str, number: int | None = None) -> str | None:
    """Returns the worker of the newest claim, or of a numbered one."""
    if number is None:
      number = self.claimed().get(name)
    if number is None:
      return None
    return _read(self._file(name, number), 'worker')['worker']

  def take_over(self, name: str) -> bool:
    """Claims what a dead worker holds; returns whether it is now this one's.

    What nobody holds is claimed, too.
    """
    number = self.claimed().get(name)
    if number is None:
      return self.claim(name)
    owner = self.owner_of(name, number)
    if owner == self.own:
      self._held[name] = number
      return True
    assert owner is not None
    return self.is_dead(owner) and self._create(name, number + 1)

  def holds(self, name: str) -> bool:
    """Whether this worker's claim is the newest one."""
    number = self._held.get(name)
    return number is not None and not self._file(name, number + 1).exists()

  def _create(self, name: str, number: int) -> bool:
    text = json.dumps({'worker': self.own}) + '\n'
    if not files.create_whole(self._file(name, number), text):
      return False
    self._held[name] = number
    return True

  def _file(self, name: str, number: int) -> epath.Path:
    return self._claims / f'{name}.{number:03}.json'


def _read(file: epath.Path, *names: str) -> dict[str, Any]:
  facts = reading.json_object(file, _REMEDY)
  for name in names:
    if name not in facts:
      raise ValueError(f'{file} has no {name!r}. {_REMEDY}')
  return facts


@functools.cache
def _machine() -> str:
  """Returns an id that processes share which see each other's numbers.

  Containers may share a host's name, and not its processes.
  """
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.stat("/proc/self/ns/pid").st_ino}'
  except OSError:  # No Linux.
    return socket.gethostname()


def start_of(process: int) -> str | None:
  """Returns when a process of this machine started; None if there is none.

  The number of a process comes again, its start does not. A process that has
  ended and that nobody has waited for has no start.
  """
  try:
    with open(f'/proc/{process}/stat', encoding='utf-8') as f:
      after = f.read().rpartition(')')[2].split()
  except FileNotFoundError:
    if os.path.isdir('/proc/self'):
      return None
    try:  # No Linux: whether it is there is all that is known.
      os.kill(process, 0)
    except ProcessLookupError:
      return None
    except PermissionError:
      pass
    return ''
  return None if after[0] in 'ZX' else after[19]
