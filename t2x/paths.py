"""Paths of a run, local or gs://, and files that appear whole or not at all."""

import os

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
