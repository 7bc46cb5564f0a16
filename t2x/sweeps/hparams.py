"""Shows a study in TensorBoard's HPARAMS tab: parameters and results.

  STUDY/tensorboard/KEY/   one file of events for each trial that has ended

`tensorboard --logdir STUDY/tensorboard` opens it. A trial has its metric by
step, as a curve, and its result under `result/METRIC`.
"""

from collections.abc import Sequence
import datetime
import importlib
import logging
import math
import os
import pathlib
import tempfile
from typing import Any

from t2x import files
from t2x.sweeps import space
from t2x.sweeps import study as study_lib

_log = logging.getLogger(__name__)

FOLDER = 'tensorboard'  # In the study.
_FILE = 'events.out.tfevents.0.trial'  # Written anew as a whole.
_STATUS = {
  'complete': 'STATUS_SUCCESS',
  'pruned': 'STATUS_UNKNOWN',
  'failed': 'STATUS_FAILURE',
}


def write(study: study_lib.Study) -> int:
  """Writes every trial that has ended, and returns how many those are."""
  trials = [t for t in study.trials() if t.state != 'running']
  for trial in trials:
    write_trial(study, trial)
  return len(trials)


def write_trial(study: study_lib.Study, trial: study_lib.Trial) -> None:
  """Writes a trial that has ended. An error is logged: the study has it all.

  Args:
    study: the study.
    trial: the trial.
  """
  folder = study.directory / FOLDER / trial.key
  try:
    folder.mkdir(parents=True, exist_ok=True)
    files.write_whole(folder / _FILE, _events(study, trial))
  except OSError as error:
    _log.error('Trial %d is not shown in TensorBoard: %s', trial.number, error)


def tag_of(study: study_lib.Study) -> str:
  """Returns the tag of a trial's result."""
  return f'result/{study.sweep.metric}'


def _events(study: study_lib.Study, trial: study_lib.Trial) -> bytes:
  """Returns the file of a trial's events."""
  # Late: it imports torch where that is installed.
  from google.protobuf import message
  from tensorboardX import event_file_writer
  from tensorboardX import summary as summaries

  # Imported by name: type checkers see no classes in generated modules.
  event_pb2 = importlib.import_module('tensorboardX.proto.event_pb2')
  summary_pb2 = importlib.import_module('tensorboardX.proto.summary_pb2')
  began, ended = _seconds(trial.began), _seconds(trial.ended)
  tag = tag_of(study)
  described, start, _ = summaries.hparams(_parameters(study, trial), {tag: 0.0})
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, 'events')
    writer = event_file_writer.EventsWriter(path)

    def add(seconds: float, summary: message.Message, step: int = 0) -> None:
      event = event_pb2.Event(wall_time=seconds, step=step, summary=summary)
      writer.write_event(event)

    def scalar(name: str, value: float) -> Any:
      found = summary_pb2.Summary.Value(tag=name, simple_value=value)
      return summary_pb2.Summary(value=[found])

    add(began, described)
    add(began, start)
    for step, value in sorted(trial.values.items()):
      if math.isfinite(value):
        add(ended, scalar(study.sweep.metric, value), step)
    # A result that is not finite stays an empty cell.
    diverged = trial.value is not None and not math.isfinite(trial.value)
    if trial.value is not None and not diverged:
      add(ended, scalar(tag, trial.value), max(trial.values, default=0))
    state = 'failed' if diverged else trial.state
    add(ended, _end(_STATUS[state], ended))
    writer.close()
    (file,) = pathlib.Path(folder).iterdir()
    return file.read_bytes()


def _end(status: str, seconds: float) -> Any:
  """Returns the end of a session; tensorboardX's says success of all."""
  from tensorboardX import summary as summaries

  api_pb2 = importlib.import_module('tensorboardX.proto.api_pb2')
  plugin_pb2 = importlib.import_module('tensorboardX.proto.plugin_hparams_pb2')
  summary = summaries.hparams({}, {})[2]
  content = plugin_pb2.HParamsPluginData(
    session_end_info=plugin_pb2.SessionEndInfo(
      status=api_pb2.Status.Value(status), end_time_secs=seconds
    ),
    version=0,
  )
  plugin = summary.value[0].metadata.plugin_data
  plugin.content = content.SerializeToString()
  return summary


def _seconds(time: datetime.datetime | None) -> float:
  return time.timestamp() if time is not None else 0.0


def _parameters(
  study: study_lib.Study, trial: study_lib.Trial
) -> dict[str, bool | float | str]:
  """Returns the fields that a sweep varies, with a trial's values.

  A field whose values are of several types, such as numbers and None, is text
  in all trials: TensorBoard takes one type.
  """
  found = {}
  for name, parameter in study.sweep.parameters.items():
    fields = space.fields_of(name)
    point = trial.point[name]
    own = point if len(fields) > 1 else (point,)
    for i, (field, value) in enumerate(zip(fields, own, strict=True)):
      ends = [e[i] if len(fields) > 1 else e for e in parameter.ends]
      found[field] = value if _are_alike(ends) else space.text(value)
  return found


def _are_alike(values: Sequence[Any]) -> bool:
  """Whether TensorBoard has a type for all of some values."""
  types = {type(value) for value in values}
  return types in ({bool}, {str}) or types <= {int, float}
