"""Trackio: WORKDIR/trackio, or where its environment variables say.

`TRACKIO_DIR=WORKDIR/trackio trackio show` opens its dashboard.
"""

from collections.abc import Mapping
import importlib
import logging
import os
import pathlib
import secrets
from typing import Any

from t2x.tracking import trackers

_log = logging.getLogger(__name__)

_FOLDER = 'TRACKIO_DIR'


class TrackioTracker:
  """A run of Trackio; see `trackers.Tracker`."""

  def start(self, run: trackers.RunInfo) -> trackers.Started:
    """Begins a run, or goes on with one."""
    trackio = _import(run.folder.absolute() / 'trackio')
    # It knows runs by their names, which workdirs elsewhere may share.
    name = run.identifier or f'{run.name}-{secrets.token_hex(3)}'
    self._run = trackio.init(
      project=run.project,
      name=name,
      config=dict(run.config),
      resume='allow',
      embed=False,
      auto_log_gpu=False,
      auto_log_cpu=False,
    )
    return trackers.Started(identifier=name)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the values of one step, by tag."""
    self._run.log(dict(values), step=step)

  def flush(self) -> None:
    """Does nothing: its own thread stores rows within a second."""

  def close(self) -> None:
    """Waits until all rows are stored."""
    self._run.finish()


def _import(folder: pathlib.Path) -> Any:
  """Returns Trackio, which takes its folder from the environment, and once."""
  given = os.environ.get(_FOLDER)
  os.environ[_FOLDER] = given or str(folder)
  try:
    trackio = importlib.import_module('trackio')
  finally:
    if given is None:
      del os.environ[_FOLDER]
    else:
      os.environ[_FOLDER] = given
  used = pathlib.Path(trackio.utils.TRACKIO_DIR)
  if not given and used != folder:
    _log.warning(
      'Trackio writes to %s: it keeps the folder of the first run of a '
      'process.',
      used,
    )
  return trackio
