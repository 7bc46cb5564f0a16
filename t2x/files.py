"""Paths of a run, local or gs://, and files that appear whole or not at all."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile

from etils import epath


def path(name: epath.PathLike) -> epath.Path:
  """Returns a path, local or gs://, with ~ expanded."""
  return epath.Path(name).expanduser()


def is_remote(name: epath.PathLike) -> bool:
  """Whether a path is that of an object store, such as gs://."""
  return '://' in os.fspath(name)


def write_whole(file: epath.Path, content: str | bytes) -> None:
  """Writes a file of which a crash leaves the old or the new, never a part."""
  data = content.encode() if isinstance(content, str) else content
  if is_remote(file):  # An object is whole or not there.
    file.write_bytes(data)
    return
  temporary = file.with_name(f'{file.name}.tmp')
  with open(temporary, 'wb') as f:
    f.write(data)
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, file)


def create_whole(file: epath.Path, content: str | bytes) -> bool:
  """Writes a file unless there is one, and returns whether it did.

  Of several processes that try, on whatever machines, one succeeds. The file
  appears whole.
  """
  data = content.encode() if isinstance(content, str) else content
  if is_remote(file):
    import fsspec

    system, path = fsspec.core.url_to_fs(os.fspath(file))
    try:
      system.pipe_file(path, data, mode='create')
    except FileExistsError:
      return False
    return True
  # Of its own: others may be trying.
  descriptor, temporary = tempfile.mkstemp(
    prefix=f'.{file.name}.', dir=file.parent
  )
  try:
    with open(descriptor, 'wb') as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    os.link(temporary, file)
  except FileExistsError:
    return False
  finally:
    os.unlink(temporary)
  return True


def copy_directory(source: epath.Path, to: epath.Path) -> None:
  """Copies a directory with all that is in it; `to` appears whole if local."""
  if is_remote(to):
    for path in source.rglob('*'):
      if not path.is_dir():
        copied = to / path.relative_to(source)
        copied.parent.mkdir(parents=True, exist_ok=True)
        path.copy(copied, overwrite=True)
    return
  with new_directory(pathlib.Path(to)) as directory:
    shutil.copytree(source, directory, dirs_exist_ok=True)


@contextlib.contextmanager
def new_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a directory to fill, which becomes `path` if the block succeeds."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = pathlib.Path(
    tempfile.mkdtemp(prefix=f'.{path.name}.', dir=path.parent)
  )
  try:
    yield temporary
    os.rename(temporary, path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def lock(directory: str) -> Iterator[None]:
  """Lets one process at a time prepare data in `directory`.

  Raises:
    ValueError: if nothing can be written there.
  """
  if '://' in directory:
    raise ValueError(
      f'data_dir={directory!r} must be a local directory, because prepared '
      'data is memory-mapped. Set data.data_dir or T2X_DATA_DIR to one.'
    )
  try:
    os.makedirs(directory, exist_ok=True)
    file = open(os.path.join(directory, '.lock'), 'w')
  except OSError as error:
    raise ValueError(
      f'data_dir={directory!r} cannot be written ({error}). Set '
      'data.data_dir or T2X_DATA_DIR to a directory that can.'
    ) from error
  with file:
    fcntl.flock(file, fcntl.LOCK_EX)  # Released when the file is closed.
    yield
