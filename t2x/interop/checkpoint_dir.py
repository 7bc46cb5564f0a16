"""Reads and writes checkpoint directories: safetensors and a config.json.

Weights are read lazily, one at a time. Files that can run code when they are
loaded (pickles: .bin, .pt, .ckpt) are never opened.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import json
import pathlib
from typing import Any

import numpy as np
import numpy.typing as npt

from t2x import reading

CONFIG = 'config.json'
_SINGLE = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_WITH_CODE = ('*.bin', '*.pt', '*.pth', '*.ckpt', '*.pkl')
_SHARD_BYTES = 5_000_000_000
_FLOATS = ('F64', 'F32', 'F16', 'BF16')


def is_checkpoint(directory: str) -> bool:
  """Whether a directory holds a checkpoint of Hugging Face."""
  file = pathlib.Path(directory) / CONFIG
  try:
    return 'model_type' in reading.json_object(file, '')
  except (OSError, ValueError):
    return False


def read_config(directory: str) -> dict[str, Any]:
  """Returns the parsed config.json of a directory.

  Raises:
    ValueError: the directory is remote or does not exist, or its config.json is
      missing or not a JSON object with a `model_type`.
  """
  if '://' in str(directory):
    raise ValueError(
      f'{directory} is remote, and safetensors are read from disks alone. Copy '
      'the directory here first.'
    )
  root = pathlib.Path(directory)
  if not root.is_dir():
    raise ValueError(f'{directory}: there is no such directory.')
  config = _json(root / CONFIG)
  if 'model_type' not in config:
    raise ValueError(
      f'{root / CONFIG} names no model_type, so it is not of a Hugging Face '
      'checkpoint.'
    )
  return config


def read_optional(directory: str, name: str) -> dict[str, Any] | None:
  """Returns a parsed JSON file of a directory; None if it does not exist.

  Raises:
    ValueError: the file is not a JSON object.
  """
  file = pathlib.Path(directory) / name
  return _json(file) if file.exists() else None


def read_tensors(directory: str) -> 'Tensors':
  """Returns the weights of a directory, by name.

  Raises:
    ValueError: there are no safetensors, a shard is missing, damaged or outside
      the directory, or a shard lacks a name that the index lists.
  """
  root = pathlib.Path(directory)
  if (root / _INDEX).exists():
    return Tensors(_indexed(root))
  files = [root / _SINGLE]
  if not files[0].exists():
    files = sorted(root.glob('*.safetensors'))
  if len(files) == 1:
    return Tensors(dict.fromkeys(_names(files[0]), files[0]))
  if files:
    raise ValueError(
      f'{root} has {len(files)} safetensors and no {_INDEX}, which says what '
      'each of them holds. Copy the index too.'
    )
  pickles = sorted(p.name for kind in _WITH_CODE for p in root.glob(kind))
  if pickles:
    raise ValueError(
      f'{root} has its weights in {", ".join(pickles[:3])} alone. Such a file '
      'can run any code when it is loaded, so t2x does not open it. Take the '
      "checkpoint's safetensors, or write them where you trust the file: "
      'model.save_pretrained(DIR).'
    )
  raise ValueError(f'{root} has no weights: neither {_SINGLE} nor {_INDEX}.')


class Tensor:
  """A weight that is read when it is converted to an array.

  Attributes:
    shape: shape of the array.
  """

  def __init__(self, file: pathlib.Path, name: str):
    """Reads the shape and dtype of a weight.

    Args:
      file: a safetensors file.
      name: name of the weight in the file.

    Raises:
      ValueError: the file is damaged, or safetensors is not installed.
    """
    with _open(file) as f:
      part = f.get_slice(name)
      self.shape, self._dtype = tuple(part.get_shape()), part.get_dtype()
    self._file, self._name = file, name

  def __array__(
    self, dtype: npt.DTypeLike | None = None, copy: bool | None = None
  ) -> np.ndarray:
    del copy
    # Checked here, since files may also hold integer buffers that are not read.
    if self._dtype not in _FLOATS:
      raise ValueError(
        f'{self._name} in {self._file} is of type {self._dtype}; t2x reads '
        f'{", ".join(_FLOATS)}. Take a checkpoint that is not quantised.'
      )
    with _open(self._file) as f:
      array = f.get_tensor(self._name)
    return array if dtype is None else array.astype(dtype)


class Tensors(Mapping[str, Tensor]):
  """Weights by name; see `read_tensors`."""

  def __init__(self, files: Mapping[str, pathlib.Path]):
    """Takes the safetensors file of each name."""
    self._files = files

  def __getitem__(self, name: str) -> Tensor:
    return Tensor(self._files[name], name)

  def __iter__(self) -> Iterator[str]:
    return iter(self._files)

  def __len__(self) -> int:
    return len(self._files)


def write(
  directory: str,
  config: Mapping[str, Any],
  tensors: Mapping[str, np.ndarray],
  *,
  shard_bytes: int = _SHARD_BYTES,
  beside: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
  """Writes a config.json and weights, in several files if they are large.

  Args:
    directory: directory to write, new or empty.
    config: contents of config.json.
    tensors: weights by name.
    shard_bytes: greatest size of a file of weights, unless one weight is
      larger.
    beside: contents of further JSON files, by file name.

  Raises:
    ValueError: the directory is not empty.
  """
  from safetensors import numpy as safetensors_numpy

  root = pathlib.Path(directory)
  check_new(directory)
  root.mkdir(parents=True, exist_ok=True)
  shards = _shards(tensors, shard_bytes)
  where = {}
  for number, shard in enumerate(shards, 1):
    name = f'model-{number:05}-of-{len(shards):05}.safetensors'
    name = _SINGLE if len(shards) == 1 else name
    arrays = {key: np.ascontiguousarray(tensors[key]) for key in shard}
    # transformers refuses files without the key `format`.
    safetensors_numpy.save_file(arrays, root / name, {'format': 'pt'})
    where |= dict.fromkeys(shard, name)
  if len(shards) > 1:
    total = sum(array.nbytes for array in tensors.values())
    index = {'metadata': {'total_size': total}, 'weight_map': where}
    (root / _INDEX).write_text(json.dumps(index, indent=2) + '\n')
  for name, data in (beside or {}).items():
    (root / name).write_text(json.dumps(data, indent=2) + '\n')
  # Written last, since with it the directory counts as a checkpoint.
  (root / CONFIG).write_text(json.dumps(config, indent=2) + '\n')


def check_new(directory: str) -> None:
  """Raises ValueError if a directory is not empty."""
  root = pathlib.Path(directory)
  if root.exists() and (not root.is_dir() or any(root.iterdir())):
    raise ValueError(
      f'{directory} is there already and nothing is written over. Name a new '
      'directory, or remove it.'
    )


def _shards(
  tensors: Mapping[str, np.ndarray], shard_bytes: int
) -> list[list[str]]:
  """Returns the names of the weights of each file."""
  shards: list[list[str]] = [[]]
  size = 0
  for name, array in tensors.items():
    if shards[-1] and size + array.nbytes > shard_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += array.nbytes
  return shards


def _indexed(root: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the file of each weight, as the index lists them."""
  index = _json(root / _INDEX).get('weight_map')
  if not isinstance(index, dict) or not index:
    raise ValueError(f'{root / _INDEX} has no weight_map of names to files.')
  for file in index.values():
    # The index is not trusted: it must not make us read another directory.
    is_name = isinstance(file, str) and pathlib.PurePath(file).name == file
    if not is_name or file in ('.', '..'):
      raise ValueError(
        f'{root / _INDEX} names the file {file!r}, which is not one of its own '
        'directory. Do not use this checkpoint unless you know why.'
      )
  files = sorted(set(index.values()))
  missing = [file for file in files if not (root / file).exists()]
  if missing:
    raise ValueError(
      f'{root} lacks {len(missing)} of its {len(files)} files: '
      f'{", ".join(missing[:4])}. Copy them too.'
    )
  names = {file: _names(root / file) for file in files}
  lacking = [name for name, file in index.items() if name not in names[file]]
  if lacking:
    raise ValueError(
      f'{root / _INDEX} promises weights that its files do not hold: '
      f'{", ".join(lacking[:4])}. Index and files are of different checkpoints.'
    )
  return {name: root / file for name, file in index.items()}


def _names(file: pathlib.Path) -> set[str]:
  with _open(file) as f:
    return set(f.keys())


def _open(file: pathlib.Path) -> Any:
  try:
    import safetensors
  except ImportError:
    raise ValueError(
      'Reading safetensors needs the package safetensors, which is not '
      "installed: pip install '.[huggingface]'."
    ) from None
  try:
    return safetensors.safe_open(file, 'numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(
      f'{file} is damaged, or no safetensors file ({error}). Copy it again.'
    ) from None


def _json(file: pathlib.Path) -> dict[str, Any]:
  try:
    return reading.json_object(file, 'Copy it again.')
  except FileNotFoundError:
    raise ValueError(
      f'{file.parent} has no {file.name}. Name the directory of a whole '
      'checkpoint.'
    ) from None
