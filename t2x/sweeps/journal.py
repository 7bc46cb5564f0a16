"""Where Optuna keeps a study: a journal in its directory, or a database.

A local journal is a file of lines, with a snapshot beside it so that a large
study opens at once. On an object store, which takes no appending, each entry is
an object of its own, and the number in its name decides the order.
"""

from collections.abc import Generator
from collections.abc import Iterator
import fcntl
import hashlib
import itertools
import json
import os
import pathlib
import tempfile
from typing import Any
from typing import BinaryIO
from typing import TextIO

from etils import epath
import optuna
from optuna.storages import journal
from optuna.storages.journal import _base as journal_base
from optuna.storages.journal import _file as journal_file

from t2x import files
from t2x import reading

_BLOCK = 1 << 12
_TOGETHER = 1000  # Objects that are put together in one.


def storage(directory: epath.Path, url: str | None = None) -> Any:
  """Returns the Optuna storage of a study.

  Args:
    directory: directory of the study, local or gs://.
    url: address of a database, such as postgresql://HOST/NAME; None for the
      journal in the directory.
  """
  if url is not None:
    return optuna.storages.RDBStorage(url)
  if files.is_remote(directory):
    return optuna.storages.JournalStorage(Objects(directory / 'journal'))
  return optuna.storages.JournalStorage(
    File(os.fspath(directory / 'journal.log'))
  )


def check_url(url: str | None) -> None:
  """Checks that a database can be opened; None passes.

  Args:
    url: its address.

  Raises:
    ValueError: it is no address, its driver is missing, or nobody answers.
  """
  if url is None:
    return
  import sqlalchemy

  shown = url  # What is no address has no password in it either.
  try:
    address = sqlalchemy.make_url(url)
    shown = address.render_as_string(hide_password=True)
    if address.get_backend_name() == 'sqlite' and address.database:
      folder = pathlib.Path(address.database).absolute().parent
      if not folder.is_dir():
        raise OSError(f'there is no directory {folder}')
    else:
      sqlalchemy.create_engine(address).connect().close()
  except Exception as error:  # Whatever a database's driver raises.
    raise ValueError(
      f'--storage={shown}: the database cannot be opened ({error}). It is an '
      "address of SQLAlchemy's, such as postgresql://HOST/NAME, whose "
      'driver is installed.'
    ) from error


class _Lock(journal.JournalFileOpenLock):
  """A lock among processes of one machine and of others.

  Between machines it is a file that only one can create, which every file
  system knows, and for which a process looks again and again. Those of one
  machine queue before it, so that of many each has its turn.
  """

  def __init__(self, path: str):
    super().__init__(path)
    name = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:16]
    folder = tempfile.gettempdir()
    self._queue_path = os.path.join(folder, f't2x-{os.getuid()}-{name}.lock')
    self._queue: TextIO | None = None

  def acquire(self) -> bool:
    """Waits for the lock."""
    queue = open(self._queue_path, 'w')
    fcntl.flock(queue, fcntl.LOCK_EX)
    self._queue = queue
    try:
      return super().acquire()
    except BaseException:
      self._leave()
      raise

  def release(self) -> None:
    """Gives the lock to the next."""
    try:
      super().release()
    finally:
      self._leave()

  def _leave(self) -> None:
    if self._queue is not None:
      self._queue.close()
      self._queue = None


class File(journal.JournalFileBackend, journal_base.BaseJournalSnapshot):
  """A journal in a local file, which may be shared over NFS.

  The snapshot is Optuna's pickle of what the lines say. It is read only where
  its owner is this user, since whoever writes a pickle runs what he likes.
  """

  def __init__(self, path: str):
    super().__init__(path, _Lock(path))
    self._path = path
    self._snapshot = pathlib.Path(f'{path}.snapshot')

  def append_logs(self, logs: list[dict[str, Any]]) -> None:
    """Adds entries as whole lines, or none of them.

    Raises:
      OSError: the disk is full, say.
    """
    lines = ''.join(
      json.dumps(log, separators=(',', ':')) + '\n' for log in logs
    )
    with journal_file.get_lock_file(self._lock), open(self._path, 'r+b') as f:
      end = _end_of_lines(f)
      try:
        f.seek(end)
        f.write(lines.encode())
        f.truncate()  # What follows is the rest of a line that was cut off.
        f.flush()
        os.fsync(f.fileno())
      except OSError:
        os.ftruncate(f.fileno(), end)
        raise

  def read_logs(
    self, log_number_from: int
  ) -> Generator[dict[str, Any], None, None]:
    """Yields the entries from a number on.

    Raises:
      ValueError: a line is no entry.
    """
    try:
      yield from super().read_logs(log_number_from)
    except json.JSONDecodeError as error:
      raise ValueError(
        f'{self._path} has a line that is no entry ({error}). Restore the '
        'file, or use another --study.'
      ) from error

  def save_snapshot(self, snapshot: bytes) -> None:
    """Keeps what the lines so far say."""
    files.write_whole(epath.Path(self._snapshot), snapshot)

  def load_snapshot(self) -> bytes | None:
    """Returns the snapshot, if there is one."""
    try:
      if self._snapshot.stat().st_uid != os.getuid():
        return None
      return self._snapshot.read_bytes()
    except FileNotFoundError:
      return None


def _end_of_lines(file: BinaryIO) -> int:
  """Returns the number of bytes up to the end of the last whole line."""
  end = file.seek(0, os.SEEK_END)
  while end:
    start = max(end - _BLOCK, 0)
    file.seek(start)
    found = file.read(end - start).rfind(b'\n')
    if found >= 0:
      return start + found + 1
    end = start
  return 0


class Objects(journal.BaseJournalBackend):
  """A journal of objects in an object store, one for each call of Optuna.

  Whoever writes the last of 1,000 puts them together in one more object, so
  that a large study opens with few reads.
  """

  def __init__(self, directory: epath.Path):
    directory.mkdir(parents=True, exist_ok=True)
    self._directory = directory
    # Entries by object, as far as they were read; none is ever changed.
    self._entries: list[dict[str, Any]] = []
    self._num_objects = 0

  def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
    """Yields the entries from a number on."""
    self._read()
    yield from self._entries[log_number_from:]

  def append_logs(self, logs: list[dict[str, Any]]) -> None:
    """Adds entries after all that are there."""
    text = '\n'.join(json.dumps(log) for log in logs)
    self._read()
    while not files.create_whole(self._path(self._num_objects), text):
      self._read()  # Another process was faster.
    if (self._num_objects + 1) % _TOGETHER == 0:
      self._put_together(self._num_objects + 1)

  def _read(self) -> None:
    """Reads the objects that are new."""
    if not self._path(self._num_objects).exists():
      return
    names = {path.name for path in files.children(self._directory)}
    # Only where a thousand begins is there one of that name.
    while (name := _together(self._num_objects + _TOGETHER)) in names:
      for text in reading.json_object(
        self._directory / name, 'Remove it: it is made of others.'
      )['objects']:
        self._add(text, name)
    new = itertools.takewhile(
      names.__contains__, map(_name, itertools.count(self._num_objects))
    )
    texts = files.read_all([self._directory / name for name in [*new]])
    for text in texts:
      self._add(text, _name(self._num_objects))

  def _add(self, text: str, name: str) -> None:
    """Adds the entries of an object."""
    for number, line in enumerate(text.splitlines(), 1):
      place = f'{self._directory / name}, line {number}'
      self._entries.append(reading.parse_json(line, place, 'Restore it.'))
    self._num_objects += 1

  def _put_together(self, end: int) -> None:
    names = [_name(number) for number in range(end - _TOGETHER, end)]
    texts = files.read_all([self._directory / name for name in names])
    content = json.dumps({'objects': texts})
    files.create_whole(self._directory / _together(end), content)

  def _path(self, number: int) -> epath.Path:
    return self._directory / _name(number)


def _name(number: int) -> str:
  return f'{number:08}.jsonl'


def _together(end: int) -> str:
  return f'up_to_{end:08}.json'
