"""MLflow: WORKDIR/mlruns/mlflow.db, or the server of MLFLOW_TRACKING_URI.

The database is SQLite's: MLflow's folders of files take no more runs.
"""

from collections.abc import Mapping
import importlib
import os
import re
import time
from typing import Any

from t2x.tracking import trackers

# What MLflow takes at a time, and how long a setting may be.
_MOST_PARAMS = 100
_MOST_METRICS = 1000
_MOST_CHARACTERS = 6000


class MlflowTracker:
  """A run of MLflow; see `trackers.Tracker`."""

  def start(self, run: trackers.RunInfo) -> trackers.Started:
    """Begins a run, or goes on with one."""
    # It asks the network otherwise, whatever the store.
    os.environ.setdefault('MLFLOW_DISABLE_TELEMETRY', 'true')
    mlflow = importlib.import_module('mlflow')
    uri, artifacts = os.environ.get('MLFLOW_TRACKING_URI'), None
    if not uri:
      folder = run.folder.absolute() / 'mlruns'
      folder.mkdir(parents=True, exist_ok=True)
      uri, artifacts = f'sqlite:///{folder}/mlflow.db', folder.as_uri()
    self._entities = mlflow.entities
    self._error = mlflow.exceptions.MlflowException
    self._client = mlflow.MlflowClient(uri)
    self._num_steps, self._last_step = run.num_steps, 0
    found = self._find(run.identifier)
    if found is None:
      experiment = self._experiment(run.project, artifacts)
      found = self._client.create_run(experiment, run_name=run.name)
    else:
      self._client.update_run(found.info.run_id, status='RUNNING')
    self._id = found.info.run_id
    self._write_config(run.config, found.data.params)
    last = self._last(found.data.metrics)
    return trackers.Started(identifier=self._id, last_step=last)

  def _find(self, identifier: str | None) -> Any:
    """Returns the run to go on with, if this store has it."""
    if identifier is None:
      return None
    try:
      found = self._client.get_run(identifier)
    except self._error as error:
      if error.error_code == 'RESOURCE_DOES_NOT_EXIST':
        return None
      raise
    return found if found.info.lifecycle_stage == 'active' else None

  def _experiment(self, project: str, artifacts: str | None) -> str:
    found = self._client.get_experiment_by_name(project)
    if found is None:
      try:
        return self._client.create_experiment(project, artifacts)
      except self._error:  # Another run may have been faster.
        found = self._client.get_experiment_by_name(project)
        if found is None:
          raise
    return found.experiment_id

  def _write_config(
    self, config: Mapping[str, Any], kept: Mapping[str, str]
  ) -> None:
    """Writes settings; those that have changed as tags, as they are fixed."""
    texts = {_name(n): str(v)[:_MOST_CHARACTERS] for n, v in config.items()}
    params = [
      self._entities.Param(name, text)
      for name, text in texts.items()
      if name not in kept
    ]
    for part in _parts(params, _MOST_PARAMS):
      self._client.log_batch(self._id, params=part)
    for name, text in texts.items():
      if kept.get(name, text) != text:
        self._client.set_tag(self._id, f'changed.{name}', text)

  def _last(self, metrics: Mapping[str, float]) -> int:
    """Returns the last step of a run, from a metric that every row has."""
    names = sorted(metrics, key=lambda name: name.startswith('eval/'))
    if not names:
      return 0
    history = self._client.get_metric_history(self._id, names[0])
    return max((metric.step for metric in history), default=0)

  def write(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the values of one step, by tag."""
    now = int(time.time() * 1000)
    metrics = [
      self._entities.Metric(_name(tag), float(value), now, step)
      for tag, value in values.items()
    ]
    for part in _parts(metrics, _MOST_METRICS):
      self._client.log_batch(self._id, metrics=part)
    self._last_step = step

  def flush(self) -> None:
    """Does nothing: `write` has stored its row when it returns."""

  def close(self) -> None:
    """Ends the run, as killed where steps are left: it may go on later."""
    done = self._last_step >= self._num_steps
    self._client.set_terminated(self._id, 'FINISHED' if done else 'KILLED')


def _name(tag: str) -> str:
  return re.sub(r'[^\w\-. :/]', '_', tag)


def _parts(items: list[Any], size: int) -> list[list[Any]]:
  return [items[i : i + size] for i in range(0, len(items), size)]
