"""Reading the files of one checkpoint, and telling whether they are whole.

A checkpoint holds arrays by path, in the one canonical stacking of
`t2x.layers.stack`, so it restores onto any mesh and onto scanned or unrolled
layers. It also holds a checksum of every array: a sum of its bits modulo 2**32,
which no layout changes, so that damage to the files is seen.

Nothing here waits for other processes except the votes of `_reading`, so that
one process that cannot read does not leave the others behind.
"""

from collections.abc import Iterator
import contextlib
import json
import re
from typing import Any

from etils import epath
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from t2x.multihost import processes
from t2x.parallel import sharding


class CheckpointError(ValueError):
  """No checkpoint can be used; says which were tried and why they failed."""


class Damaged(Exception):
  """Files that are not there, or not what was written."""


def read(
  folder: epath.Path, shapes: Any, *, partial: bool, fresh: str | None = None
) -> tuple[Any, dict[str, Any]]:
  """Returns the state in `folder`, and the metadata saved with it.

  Args:
    folder: the directory of one step.
    shapes: the state as ShapeDtypeStructs with shardings.
    partial: whether `shapes` is a part of what was saved.
    fresh: prefix of the paths of arrays that need not go on; where they were
      saved with other shapes, they are None.

  Raises:
    Damaged: in every process, if it is damaged for one.
    CheckpointError: the arrays are not those of `shapes`.
    Exception: files that cannot be reached at the moment.
  """
  wanted = by_path(shapes)
  with _reading(f'meta of {folder}'):
    meta = json.loads((folder / 'meta' / 'metadata').read_text())
    was, expected = meta['arrays'], meta['checksums']
  left = _unlike(was, array_types(wanted), fresh) if fresh else set()
  was, wanted = (
    {n: a for n, a in arrays.items() if n not in left}
    for arrays in (was, wanted)
  )
  _check_arrays(folder, was, array_types(wanted), partial)
  args = ocp.args.PyTreeRestore(
    wanted,
    restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
    partial_restore=partial or bool(left),
  )
  with _reading(f'state of {folder}'):
    # The handler alone: around it Orbax waits for all processes.
    handler = ocp.PyTreeCheckpointHandler()
    arrays = handler.restore(folder / 'state', args=args)
  # The same everywhere: sums over all devices.
  found = jax.device_get(sums(arrays))
  damaged = [name for name, s in found.items() if int(s) != expected[name]]
  if damaged:
    raise Damaged(f'damaged arrays: {", ".join(damaged[:3])}')
  flat, treedef = jax.tree_util.tree_flatten_with_path(shapes)
  names = [sharding.path_name(path) for path, _ in flat]
  leaves = [None if name in left else arrays[name] for name in names]
  return treedef.unflatten(leaves), meta


def _unlike(was: dict[str, str], now: dict[str, str], start: str) -> set[str]:
  """Returns the arrays that begin so, if any is not as it was."""
  names = {name for name in (*was, *now) if name.startswith(start)}
  same = all(was.get(name) == now.get(name) for name in names)
  return set() if same else names


def _check_arrays(
  folder: epath.Path, was: dict[str, str], now: dict[str, str], partial: bool
) -> None:
  """Raises CheckpointError where other settings shaped what was saved."""
  extra, missing = sorted(was.keys() - now), sorted(now.keys() - was)
  other = [n for n in now if n in was and was[n] != now[n]]
  if not (missing or other or (extra and not partial)):
    return
  facts = [f'{n} is {was[n]} there and {now[n]} here' for n in other[:3]]
  facts += [f'not needed {extra[:3]}'] if extra and not partial else []
  facts += [f'missing {missing[:3]}'] if missing else []
  way_out = (
    'Leave those settings as the run has them.'
    if partial
    else 'The model, the optimizer, train.ema_decay and train.trainable decide '
    'which arrays there are, and no run can go on with others, '
    '--allow_config_change or not. Undo the change, or start in another '
    'workdir.'
  )
  raise CheckpointError(
    f'The checkpoint of step {folder.name} in {folder.parent} was saved with '
    f'other settings: {"; ".join(facts)}. {way_out}'
  )


@contextlib.contextmanager
def _reading(what: str) -> Iterator[None]:
  """Makes one process's failure to read that of all.

  Damage becomes `Damaged` in each of them; where one cannot reach the files,
  it raises what it met and the others an OSError.
  """
  error = None
  try:
    yield
  except Exception as e:
    error = e
  if processes.all_agree(error is None, what):
    return
  unreachable = error is not None and _is_unreachable(error)
  if processes.all_agree(not unreachable, f'{what} is reachable'):
    raise Damaged(error or 'damaged for another process') from error
  if unreachable and error is not None:
    raise error
  raise OSError(f'Another process cannot reach the {what}.')


# What a storage says when it cannot answer now; not a word about the files.
_UNREACHABLE = re.compile(
  r'(^|: )(UNAVAILABLE|DEADLINE_EXCEEDED|PERMISSION_DENIED|UNAUTHENTICATED|'
  r'RESOURCE_EXHAUSTED|CANCELLED|ABORTED)\b'
)


def _is_unreachable(error: Exception) -> bool:
  """Whether an error says nothing about the files themselves."""
  if isinstance(error, (FileNotFoundError, NotADirectoryError)):
    return False
  remote = type(error).__module__.partition('.')[0] in ('aiohttp', 'gcsfs')
  known = isinstance(error, (OSError, MemoryError)) or remote
  return known or bool(_UNREACHABLE.search(str(error)[:500]))


def by_path(tree: Any) -> dict[str, Any]:
  """Returns dotted path -> leaf."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {sharding.path_name(path): leaf for path, leaf in flat}


def array_types(arrays: dict[str, Any]) -> dict[str, str]:
  """Returns type and shape of each array, as in `float32(5, 3)`."""
  return {name: f'{a.dtype}{a.shape}' for name, a in arrays.items()}


@jax.jit
def sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns the checksum of each array, uint32."""
  return {name: _bit_sum(array) for name, array in arrays.items()}


def _bit_sum(array: jax.Array) -> jax.Array:
  # It may lie in the host's memory, where TPUs do not compute.
  array = jax.device_put(array, jax.memory.Space.Device)
  if jnp.issubdtype(array.dtype, jnp.bool_):
    array = array.astype(jnp.uint8)
  unsigned = jnp.dtype(f'uint{8 * array.dtype.itemsize}')
  bits = jax.lax.bitcast_convert_type(array, unsigned)
  return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)
