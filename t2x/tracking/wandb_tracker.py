"""Weights & Biases: offline in WORKDIR/wandb unless WANDB_MODE says otherwise.

`wandb sync WORKDIR/wandb/offline-run-*` uploads an offline run.
"""

from collections.abc import Mapping
import importlib
import os
import secrets
from typing import Any

from t2x.tracking import trackers


class WandbTracker:
  """A run of Weights & Biases; see `trackers.Tracker`."""

  def start(self, run: trackers.RunInfo) -> trackers.Started:
    """Begins a run, or goes on with one.

    Raises:
      ValueError: it is to be online, and nobody is logged in.
    """
    mode: Any = os.environ.get('WANDB_MODE') or 'offline'
    if mode == 'offline':
      os.environ.setdefault('WANDB_ERROR_REPORTING', 'false')
    # By name, here and in the other trackers: type checkers may not have it.
    wandb = importlib.import_module('wandb')
    if mode not in ('offline', 'disabled') and not wandb.login(prompt=False):
      raise ValueError(
        f'WANDB_MODE={mode}, and nobody is logged in. Run wandb login, or set '
        'WANDB_API_KEY'
      )
    self._num_steps, self._last_step = run.num_steps, 0
    self._run = wandb.init(
      project=run.project,
      name=run.name,
      id=run.identifier or secrets.token_hex(6),
      resume='allow',
      config=dict(run.config),
      dir=run.folder,
      mode=mode,
      # Not mixed up with a run of a notebook; what is printed stays as it is.
      reinit='create_new',
      settings=wandb.Settings(console='off', silent=True),
    )
    last = self._run.step - 1 if self._run.resumed else 0
    return trackers.Started(identifier=self._run.id, last_step=max(last, 0))

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the values of one step, by tag."""
    self._run.log(dict(values), step=step)
    self._last_step = step

  def flush(self) -> None:
    """Does nothing: another process has the rows already."""

  def close(self) -> None:
    """Ends the run, as failed where steps are left: it may go on later."""
    self._run.finish(exit_code=int(self._last_step < self._num_steps))
