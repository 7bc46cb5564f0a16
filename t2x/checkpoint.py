"""Saving and restoring the state of a run with Orbax.

A checkpoint holds arrays by path, in the one canonical stacking of
`t2x.stack`, so it restores onto any mesh and onto scanned or unrolled layers.
It also holds a checksum of every array: a sum of its bits modulo 2**32, which
no layout changes, so that damage to the files is seen.
"""

import contextlib
import logging
import os
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from t2x import paths
from t2x import processes
from t2x import sharding

_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
  """No checkpoint can be used; says which were tried and why they failed."""


class _Damaged(Exception):
  """Files that are not there, or not what was written."""


class Checkpoints:
  """The checkpoints of one run, in `workdir/checkpoints`.

  Args:
    workdir: directory of the run, local or gs://.
    keep_last: newest checkpoints that are kept.
    keep_every: checkpoints at multiples of this step are kept for good.
  """

  def __init__(
    self, workdir: str, *, keep_last: int = 3, keep_every: int | None = None
  ):
    self._directory = paths.path(workdir) / 'checkpoints'
    if not paths.is_remote(workdir):  # Orbax wants it absolute.
      self._directory = paths.path(os.path.abspath(self._directory))
    self._options = ocp.CheckpointManagerOptions(
      max_to_keep=keep_last,
      keep_period=keep_every,
      enable_async_checkpointing=True,
    )
    self._manager: ocp.CheckpointManager | None = None
    self._saving: int | None = None
    self._torn = False

  @property
  def manager(self) -> ocp.CheckpointManager:
    if self._manager is None:
      self._manager = ocp.CheckpointManager(
        self._directory, options=self._options
      )
    return self._manager

  def save(self, step: int, state: Any, position: dict[str, Any]) -> bool:
    """Starts saving `state`; training may go on while files are written.

    Args:
      step: the step that the state has reached.
      state: a pytree of arrays.
      position: JSON; where the data stands.

    Returns:
      False if this save, or the one before it, failed. The failure is logged
      and the checkpoints before it stay as they are.
    """
    arrays = by_path(state)
    sums = {name: int(s) for name, s in jax.device_get(_sums(arrays)).items()}
    meta = {
      'step': step,
      'data': position,
      'checksums': sums,
      'arrays': _described(arrays),
    }
    before = self.wait()
    try:
      self.manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(arrays), meta=ocp.args.JsonSave(meta)
        ),
        force=True,
      )
    except Exception as error:  # A full disk must not end a run.
      self._report(step, error)
      return False
    self._saving = step
    return before

  def wait(self) -> bool:
    """Waits for the save under way; False if it failed."""
    if self._manager is None:
      return True
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      self._report(self._saving, error)
      return False
    if self._torn:  # Threads of a failed save may have written after it.
      self._remove_torn()
    return True

  def latest_step(self) -> int | None:
    """Returns the newest complete step, or None."""
    return max(self._steps(), default=None)

  def restore(
    self, shapes: Any, step: int | None = None, *, partial: bool = False
  ):
    """Restores the newest checkpoint that is whole.

    Damaged newer ones are renamed to `damaged_checkpoint_STEP`, so that a run
    can save these steps again.

    Args:
      shapes: the state as ShapeDtypeStructs with shardings.
      step: take this one; default the newest.
      partial: `shapes` is a part of what was saved (a model without its
        optimizer), and the files are only read.

    Returns:
      (step, state, data position), or None if there is no checkpoint.

    Raises:
      CheckpointError: there are checkpoints and none can be used, or the
        newest was saved with other settings.
      Exception: files that cannot be reached at the moment (a network or a
        permission); nothing is set aside for that.
    """
    if not self._directory.exists():
      return None
    steps = sorted(self._steps(), reverse=True)
    if step is not None and step not in steps:
      raise CheckpointError(
        f'{self._directory} has no checkpoint of step {step}; it has '
        f'{", ".join(map(str, sorted(steps))) or "none"}.'
      )
    failures = []
    for candidate in steps if step is None else [step]:
      try:
        state, meta = self._restore(candidate, shapes, partial)
      except _Damaged as error:
        failures.append(f'step {candidate}: {_short(error)}')
        _log.warning(
          'The checkpoint of step %d cannot be used (%s); trying the one '
          'before it.',
          candidate,
          _short(error),
        )
        continue
      if step is None and not partial:
        self._set_aside([s for s in steps if s > candidate])
        self._remove_torn()
      return candidate, state, meta['data']
    if failures:
      raise CheckpointError(
        f'No checkpoint in {self._directory} can be used: '
        f'{"; ".join(failures)}. Restore the files, or start in another '
        'workdir.'
      )
    return None

  def close(self) -> None:
    if self._manager is not None:
      self._manager.close()

  def _restore(self, step: int, shapes: Any, partial: bool):
    """Returns the state and what was saved with it.

    Raises:
      _Damaged: in every process, if it is damaged for one.
      CheckpointError: the arrays are not those of `shapes`.
    """
    wanted = by_path(shapes)
    with _reading(f'{step} meta'):
      meta = self._read(step, meta=ocp.args.JsonRestore())
      was, sums = meta['arrays'], meta['checksums']
    self._check_arrays(step, was, _described(wanted), partial)
    args = ocp.args.PyTreeRestore(
      wanted,
      restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
      partial_restore=partial,
    )
    with _reading(f'{step} state'):
      arrays = self._read(step, state=args)
    # The same everywhere: sums over all devices.
    found = jax.device_get(_sums(arrays))
    damaged = [name for name, s in found.items() if int(s) != sums[name]]
    if damaged:
      raise _Damaged(f'damaged arrays: {", ".join(damaged[:3])}')
    paths, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    leaves = [arrays[sharding.path_name(path)] for path, _ in paths]
    return treedef.unflatten(leaves), meta

  def _read(self, step: int, **item: Any) -> Any:
    args = ocp.args.Composite(**item)
    (value,) = dict(self.manager.restore(step, args=args)).values()
    return value

  def _check_arrays(self, step, was, now, partial) -> None:
    """Raises CheckpointError where other settings shaped what was saved."""
    extra, missing = sorted(was.keys() - now), sorted(now.keys() - was)
    other = [n for n in now if n in was and was[n] != now[n]]
    if not (missing or other or (extra and not partial)):
      return
    facts = [f'{n} is {was[n]} there and {now[n]} here' for n in other[:3]]
    facts += [f'not needed {extra[:3]}'] if extra and not partial else []
    facts += [f'missing {missing[:3]}'] if missing else []
    raise CheckpointError(
      f'The checkpoint of step {step} in {self._directory} was saved with '
      f'other settings: {"; ".join(facts)}. The model, the optimizer, '
      'train.ema_decay and train.trainable decide which arrays there are, and '
      'no run can go on with others, --allow_config_change or not. Undo the '
      'change, or start in another workdir.'
    )

  def _set_aside(self, steps: list[int]) -> None:
    """Renames unusable checkpoints, so that their steps can be saved again."""
    if not steps:
      return
    self.manager.close()
    self._manager = None
    if processes.is_primary():
      for step in steps:
        new = self._directory.parent / f'damaged_checkpoint_{step}'
        if new.exists():  # The step was damaged before; one copy will do.
          new.rmtree()
        (self._directory / str(step)).rename(new)
    processes.all_agree(True, 'damaged checkpoints are set aside')

  def _steps(self) -> list[int]:
    """Returns the complete steps.

    A directory has its final name when it is complete; an object store cannot
    rename, and Orbax puts a file there last.
    """
    if not self._directory.is_dir():
      return []
    return [int(step) for step in ocp.utils.checkpoint_steps(self._directory)]

  def _report(self, step: int | None, error: Exception) -> None:
    """Logs a failure, and drops what it left behind."""
    _log.error(
      'The checkpoint of step %s could not be saved (%s). Training goes on; '
      'the last complete checkpoint is that of step %s in %s. Free space or '
      'make the directory writable.',
      step,
      _short(error),
      self.latest_step(),
      self._directory,
    )
    # A manager that failed still counts the step as saved.
    manager, self._manager = self._manager, None
    if manager is not None:
      with contextlib.suppress(Exception):  # It was reported above.
        manager.close()
    self._torn = True
    self._remove_torn()

  def _remove_torn(self) -> None:
    """Removes saves that never ended, which may fill the disk."""
    if not processes.is_primary() or not self._directory.is_dir():
      return
    for path in self._directory.iterdir():
      if '.orbax-checkpoint-tmp' in path.name:
        with contextlib.suppress(OSError):
          path.rmtree()


def by_path(tree: Any) -> dict[str, Any]:
  """Returns dotted path -> leaf."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {sharding.path_name(path): leaf for path, leaf in flat}


def _described(arrays: dict[str, Any]) -> dict[str, str]:
  """Returns type and shape of each array, as in `float32(5, 3)`."""
  return {name: f'{a.dtype}{a.shape}' for name, a in arrays.items()}


@jax.jit
def _sums(arrays: dict[str, jax.Array]) -> dict[str, jax.Array]:
  return {name: _bit_sum(array) for name, array in arrays.items()}


def _bit_sum(array: jax.Array) -> jax.Array:
  if jnp.issubdtype(array.dtype, jnp.bool_):
    array = array.astype(jnp.uint8)
  unsigned = jnp.dtype(f'uint{8 * array.dtype.itemsize}')
  bits = jax.lax.bitcast_convert_type(array, unsigned)
  return bits.astype(jnp.uint32).sum(dtype=jnp.uint32)


# What a storage says when it cannot answer now; not a word about the files.
_UNREACHABLE = (
  'UNAVAILABLE',
  'DEADLINE_EXCEEDED',
  'PERMISSION_DENIED',
  'UNAUTHENTICATED',
  'RESOURCE_EXHAUSTED',
  'CANCELLED',
  'ABORTED',
)


@contextlib.contextmanager
def _reading(what: str):
  """Turns what damaged files raise into `_Damaged`, in every process."""
  error = None
  try:
    yield
  except (PermissionError, ConnectionError, TimeoutError, MemoryError):
    raise
  except Exception as e:
    if any(word in str(e)[:500] for word in _UNREACHABLE):
      raise
    error = e
  if not processes.all_agree(error is None, f'read checkpoint {what}'):
    raise _Damaged(error or 'damaged for another process') from error


def _short(error: Exception) -> str:
  """Returns the first line of an error, at most 200 characters."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0].partition(' See full TensorStore')[0][:200]
