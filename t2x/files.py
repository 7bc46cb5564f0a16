"""Paths of a run, local or gs://, and files that appear whole or not at all."""

from collections.abc import Iterator
from collections.abc import Sequence
import contextlib
import fcntl
import functools
import os
import pathlib
import shutil
import tempfile

from etils import epath


def path(name: epath.PathLike) -> epath.Path:
  """Returns a path, local or gs://, with ~ expanded."""
  if is_remote(name):
    _keep_no_listings()
  return epath.Path(name).expanduser()


@functools.cache
def _keep_no_listings() -> None:
  """Lets the client look each time: others write to the store as well."""
  try:
    from fsspec import config
  except ImportError:  # epath says what to install.
    return
  for protocol in ('gcs', 's3'):
    known = config.conf.setdefault(protocol, {})
    known.setdefault('use_listings_cache', False)


def cache_directory() -> pathlib.Path:
  """Returns the local directory of what can be made again: T2X_DATA_DIR."""
  root = os.environ.get('T2X_DATA_DIR') or '~/.cache/t2x'
  return pathlib.Path(root).expanduser()


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
      # Its own, where the answer to a first attempt was lost on the way.
      return file.read_bytes() == data
    return True
  # Of its own: others may be trying.
  descriptor, temporary = tempfile.mkstemp(
    prefix=f'.{file.name}.', dir=file.parent
  )
  try:
    os.fchmod(descriptor, 0o666 & ~_umask())  # Others of a team read it too.
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


def children(directory: epath.Path) -> list[epath.Path]:
  """Returns the files and directories in a directory, none if it is missing.

  In an object store an empty directory is missing.
  """
  try:
    return sorted(directory.iterdir())
  except FileNotFoundError:
    return []


@functools.cache
def _umask() -> int:
  """Returns the permissions that files of this process lack."""
  own = os.umask(0o077)
  os.umask(own)
  return own


def read_all(paths: Sequence[epath.Path]) -> list[str]:
  """Returns the texts of files; of an object store, many are read at a time."""
  if not paths or not is_remote(paths[0]):
    return [path.read_text() for path in paths]
  import fsspec

  system, _ = fsspec.core.url_to_fs(os.fspath(paths[0]))
  names = [system._strip_protocol(os.fspath(path)) for path in paths]
  found = system.cat(names)
  return [found[name].decode() for name in names]


def copy_directory(
  source: epath.Path, to: epath.Path, without: Sequence[str] = ()
) -> None:
  """Copies a directory with what is in it; `to` appears whole if local.

  Args:
    source: the directory.
    to: the copy, which does not exist yet.
    without: names in the directory that are left out.
  """
  if is_remote(to):
    to.mkdir(parents=True, exist_ok=True)
    for path in children(source):
      if path.name in without:
        continue
      if path.is_dir():
        copy_directory(path, to / path.name)
      else:
        path.copy(to / path.name, overwrite=True)
    return
  with new_directory(pathlib.Path(to)) as directory:
    shutil.copytree(
      source,
      directory,
      ignore=lambda at, names: without if at == os.fspath(source) else (),
      dirs_exist_ok=True,
    )


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
