"""Saving and restoring the state of a run with Orbax.

What is in a checkpoint, and whether it is whole, is in checkpoint_files.py.
"""

import contextlib
import logging
import os
from typing import Any

import jax
import orbax.checkpoint as ocp

from t2x import files
from t2x.multihost import processes
from t2x.trainer import checkpoint_files

_log = logging.getLogger(__name__)

CheckpointError = checkpoint_files.CheckpointError
by_path = checkpoint_files.by_path


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
    self._directory = files.path(workdir) / 'checkpoints'
    if not files.is_remote(workdir):  # Orbax wants it absolute.
      self._directory = files.path(os.path.abspath(self._directory))
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
    """Orbax's manager of the directory, made at its first use."""
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
    arrays = checkpoint_files.by_path(state)
    sums = {
      name: int(s)
      for name, s in jax.device_get(checkpoint_files.sums(arrays)).items()
    }
    meta = {
      'step': step,
      'data': position,
      'checksums': sums,
      'arrays': checkpoint_files.array_types(arrays),
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
    self,
    shapes: Any,
    step: int | None = None,
    *,
    partial: bool = False,
    fresh: str | None = None,
  ) -> tuple[int, Any, dict[str, Any]] | None:
    """Restores the newest checkpoint that is whole.

    Damaged newer ones are renamed to `damaged_checkpoint_STEP`, so that a run
    can save these steps again.

    Args:
      shapes: the state as ShapeDtypeStructs with shardings.
      step: the step to take; None for the newest.
      partial: whether `shapes` is a part of what was saved (a model without its
        optimizer), and the files are only read.
      fresh: prefix of the paths of arrays that need not go on; where they were
        saved with other shapes, they are None.

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
      folder = self._directory / str(candidate)
      try:
        state, meta = checkpoint_files.read(
          folder, shapes, partial=partial, fresh=fresh
        )
      except checkpoint_files.Damaged as error:
        failures.append(f'step {candidate}: {short(error)}')
        _log.warning(
          'The checkpoint of step %d cannot be used (%s)%s.',
          candidate,
          short(error),
          '; trying the one before it' if step is None else '',
        )
        continue
      if step is None and not partial:
        self._set_aside([s for s in steps if s > candidate])
        self._remove_torn()
      return candidate, state, meta['data']
    if failures:
      others = [s for s in sorted(steps) if step not in (None, s)]
      way_out = 'start in another workdir'
      if others:
        way_out = f'take another of the steps {others}'
      raise CheckpointError(
        f'No checkpoint in {self._directory} can be used: '
        f'{"; ".join(failures)}. Restore the files, or {way_out}.'
      )
    return None

  def close(self) -> None:
    """Ends the manager's threads."""
    if self._manager is not None:
      self._manager.close()

  def _set_aside(self, steps: list[int]) -> None:
    """Renames unusable checkpoints, so that their steps can be saved again."""
    if not steps:
      return
    if self._manager is not None:
      self._manager.close()
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
    lost = isinstance(error, jax.errors.JaxRuntimeError)
    if lost and jax.process_count() > 1:
      raise error  # Not of the files: another process is gone.
    _log.error(
      'The checkpoint of step %s could not be saved (%s). Training goes on; '
      'the last complete checkpoint is that of step %s in %s. Free space or '
      'make the directory writable.',
      step,
      short(error),
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


def short(error: Exception) -> str:
  """Returns the first line of an error, at most 200 characters."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0].partition(' See full TensorStore')[0][:200]
