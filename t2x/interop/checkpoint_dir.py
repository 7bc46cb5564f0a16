"""Directories of safetensors and a config.json, as Hugging Face keeps them.

Weights are read one at a time and only when they are asked for. Files that run
code when they are loaded (pickles: .bin, .pt, .ckpt) are never opened.
"""

from collections.abc import Iterator
from collections.abc import Mapping
import json
import pathlib
from typing import Any

import numpy as np

from t2x import reading

CONFIG = 'config.json'
_SINGLE = 'model.safetensors'
_INDEX = 'model.safetensors.index.json'
_WITH_CODE = ('*.bin', '*.pt', '*.pth', '*.ckpt', '*.pkl')
_SHARD_BYTES = 5_000_000_000
_FLOATS = ('F64', 'F32', 'F16', 'BF16')


def is_one(directory: str) -> bool:
  """Whether a directory holds a checkpoint of Hugging Face's form."""
  file = pathlib.Path(directory) / CONFIG
  try:
    return 'model_type' in reading.json_object(file, '')
  except (OSError, ValueError):
    return False


def read_config(directory: str) -> dict[str, Any]:
  """Returns the parsed config.json.

  Raises:
    ValueError: there is none, or it is no JSON object with a `model_type`.
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
  """Returns a parsed JSON file; None if there is none.

  Raises:
    ValueError: it is no JSON object.
  """
  file = pathlib.Path(directory) / name
  return _json(file) if file.exists() else None


def read_tensors(directory: str) -> 'Tensors':
  """Returns the weights of a directory, by name.

  Raises:
    ValueError: no safetensors, a shard that is missing, damaged or outside of
      the directory, a name that its shard does not hold, weights that are no
      floats.
  """
  root = pathlib.Path(directory)
  if (root / _INDEX).exists():
    return Tensors(_indexed(root))
  found = [root / _SINGLE]
  if not found[0].exists():
    found = sorted(root.glob('*.safetensors'))
  if len(found) == 1:
    return Tensors(dict.fromkeys(_names(found[0]), found[0]))
  if found:
    raise ValueError(
      f'{root} has {len(found)} safetensors and no {_INDEX}, which says what '
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
  """A weight that is read when it becomes an array."""

  def __init__(self, file: pathlib.Path, name: str):
    with _open(file) as f:
      part = f.get_slice(name)
      self.shape, self._kind = tuple(part.get_shape()), part.get_dtype()
    self._file, self._name = file, name

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    del copy
    # Not before it is asked for: files hold buffers of integers that nobody is.
    if self._kind not in _FLOATS:
      raise ValueError(
        f'{self._name} in {self._file} is of type {self._kind}; t2x reads '
        f'{", ".join(_FLOATS)}. Take a checkpoint that is not quantised.'
      )
    with _open(self._file) as f:
      array = f.get_tensor(self._name)
    return array if dtype is None else array.astype(dtype)


class Tensors(Mapping[str, Tensor]):
  """Weights by name; see `read_tensors`."""

  def __init__(self, files: Mapping[str, pathlib.Path]):
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
  """Writes config.json and safetensors, several files if they are large.

  Args:
    directory: new, or empty.
    config: what config.json shall hold.
    tensors: name -> array.
    shard_bytes: the most of a file; a weight is never cut.
    beside: further JSON files, by name.

  Raises:
    ValueError: something is in the directory already.
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
    # Other readers refuse files that do not say whose layout they have.
    safetensors_numpy.save_file(arrays, root / name, {'format': 'pt'})
    where |= dict.fromkeys(shard, name)
  if len(shards) > 1:
    total = sum(array.nbytes for array in tensors.values())
    index = {'metadata': {'total_size': total}, 'weight_map': where}
    (root / _INDEX).write_text(json.dumps(index, indent=2) + '\n')
  for name, data in (beside or {}).items():
    (root / name).write_text(json.dumps(data, indent=2) + '\n')
  # Last: with it the directory is a checkpoint.
  (root / CONFIG).write_text(json.dumps(config, indent=2) + '\n')


def check_new(directory: str) -> None:
  """Raises ValueError if there is something in a directory."""
  root = pathlib.Path(directory)
  if root.exists() and (not root.is_dir() or any(root.iterdir())):
    raise ValueError(
      f'{directory} is there already and nothing is written over. Name a new '
      'directory, or remove it.'
    )


def _shards(tensors, shard_bytes: int) -> list[list[str]]:
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
  """Returns the file of each weight, as the index says."""
  index = _json(root / _INDEX).get('weight_map')
  if not isinstance(index, dict) or not index:
    raise ValueError(f'{root / _INDEX} has no weight_map of names to files.')
  for file in index.values():
    # It comes from elsewhere: it may not make us read another directory.
    own = isinstance(file, str) and pathlib.PurePath(file).name == file
    if not own or file in ('.', '..'):
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
  held = {file: _names(root / file) for file in files}
  absent = [name for name, file in index.items() if name not in held[file]]
  if absent:
    raise ValueError(
      f'{root / _INDEX} promises weights that its files do not hold: '
      f'{", ".join(absent[:4])}. Index and files are of different checkpoints.'
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
