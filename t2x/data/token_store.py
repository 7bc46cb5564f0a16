"""Token streams on disk: a flat array of ids, and the starts of documents.

Ids are stored in as few bytes as the vocabulary allows and are memory-mapped.
Opening a corpus therefore costs nothing, and only the rows in use are read.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import functools
import json
import pathlib

import numpy as np


class TokenStream:
  """The tokens of all documents of one split, one after the other.

  It is pickled as its path, so that worker processes map the file themselves.

  Args:
    directory: directory of the files.
    name: name of the stream in the directory.
  """

  def __init__(self, directory: pathlib.Path, name: str):
    self._directory = pathlib.Path(directory)
    self._name = name

  def __reduce__(self) -> tuple[type['TokenStream'], tuple[pathlib.Path, str]]:
    return TokenStream, (self._directory, self._name)

  @functools.cached_property
  def _facts(self) -> dict:
    return json.loads((self._directory / f'{self._name}.json').read_text())

  @functools.cached_property
  def tokens(self) -> np.ndarray:
    """(num_tokens,) token ids."""
    path = self._directory / f'{self._name}.bin'
    return np.memmap(path, dtype=self._facts['dtype'], mode='r')

  @functools.cached_property
  def offsets(self) -> np.ndarray:
    """(num_documents + 1,) int64, start of each document, and the end."""
    path = self._directory / f'{self._name}_offsets.npy'
    return np.load(path, mmap_mode='r')

  @property
  def num_tokens(self) -> int:
    """Number of tokens, the starts and ends of documents included."""
    return self._facts['num_tokens']

  @property
  def num_bytes(self) -> int:
    """Number of UTF-8 bytes of the text of all documents."""
    return self._facts['num_bytes']

  @property
  def num_documents(self) -> int:
    """Number of documents."""
    return len(self.offsets) - 1


def write(
  directory: pathlib.Path,
  name: str,
  chunks: Iterable[tuple[Sequence[np.ndarray], int]],
  vocab_size: int,
) -> None:
  """Writes a token stream.

  Args:
    directory: an existing directory.
    name: name of the stream, unique in the directory.
    chunks: ids of some documents at a time, with the number of UTF-8 bytes of
      their text.
    vocab_size: upper bound of the ids, which are all smaller.
  """
  dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
  lengths = [0]
  num_bytes = 0
  with open(directory / f'{name}.bin', 'wb') as file:
    for documents, chunk_bytes in chunks:
      file.write(np.concatenate(documents).astype(dtype).tobytes())
      lengths.extend(len(d) for d in documents)
      num_bytes += chunk_bytes
  offsets = np.cumsum(np.array(lengths, np.int64))
  np.save(directory / f'{name}_offsets.npy', offsets)
  facts = {
    'dtype': np.dtype(dtype).name,
    'num_tokens': int(offsets[-1]),
    'num_bytes': num_bytes,
  }
  (directory / f'{name}.json').write_text(json.dumps(facts))
