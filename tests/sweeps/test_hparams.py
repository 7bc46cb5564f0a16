"""A study in TensorBoard's HPARAMS tab, read by the plugin's own code."""

import math

import pytest
import small_sweep
from tensorboard import context
from tensorboard.backend.event_processing import data_provider
from tensorboard.backend.event_processing import plugin_event_multiplexer
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams import backend_context
from tensorboard.plugins.hparams import get_experiment
from tensorboard.plugins.hparams import list_session_groups

from t2x.sweeps import hparams
from t2x.sweeps import points
from t2x.sweeps import study as study_lib

_TAG = 'result/eval/train/loss'


class _Tab:
  """What the tab shows of a folder."""

  def __init__(self, folder):
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(folder))
    multiplexer.Reload()
    self.runs = multiplexer
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    self._context = backend_context.Context(
      base_plugin.TBContext(data_provider=provider)
    )
    self._request = context.RequestContext()

  def experiment(self):
    """Returns the types of parameters, and the tags of metrics."""
    handler = get_experiment.Handler(
      self._request, self._context, 'id', api_pb2.GetExperimentRequest()
    )
    found = handler.run()
    types = {
      i.name: api_pb2.DataType.Name(i.type).removeprefix('DATA_TYPE_')
      for i in found.hparam_infos
    }
    return types, [i.name.tag for i in found.metric_infos]

  def sessions(self):
    """Returns name -> (parameters, metrics, status)."""
    request = api_pb2.ListSessionGroupsRequest(
      start_index=0,
      slice_size=100,
      allowed_statuses=[
        api_pb2.STATUS_SUCCESS,
        api_pb2.STATUS_FAILURE,
        api_pb2.STATUS_UNKNOWN,
        api_pb2.STATUS_RUNNING,
      ],
    )
    response = list_session_groups.Handler(
      self._request, self._context, 'id', request
    ).run()
    found = {}
    for group in response.session_groups:
      (session,) = group.sessions
      parameters = {
        name: getattr(value, value.WhichOneof('kind'))
        for name, value in group.hparams.items()
      }
      metrics = {v.name.tag: v.value for v in session.metric_values}
      status = api_pb2.Status.Name(session.status).removeprefix('STATUS_')
      found[session.name] = parameters, metrics, status
    return found


def test_a_sweep_leaves_its_trials_in_the_tab(tmp_path):
  facts = small_sweep.facts(tmp_path)
  study = study_lib.create(tmp_path / 'study', facts)
  small_sweep.worker(study).run()
  tab = _Tab(tmp_path / 'study' / 'tensorboard')
  assert tab.experiment() == ({'optim.learning_rate': 'FLOAT64'}, [_TAG])
  assert tab.sessions() == {
    trial.key: (
      dict(trial.point),
      {_TAG: pytest.approx(trial.value)},
      'SUCCESS',
    )
    for trial in study.trials()
  }
  trial = study.trials()[1]
  curve = tab.runs.Tensors(trial.key, 'eval/train/loss')
  assert [event.step for event in curve] == [*range(1, 9)]


def _study(tmp_path):
  sizes = 'model.embed_dim, model.num_layers'
  facts = small_sweep.facts(
    tmp_path,
    parameters={
      'optim.learning_rate': (1, 0.5),
      sizes: ((32, 1), (64, 2)),
      'train.scan_layers': (True, False),
      'train.ema_decay': (None, 0.5),
    },
  )
  return study_lib.create(tmp_path / 'study', facts), sizes


def test_ends_and_types(tmp_path):
  study, sizes = _study(tmp_path)
  ends = (
    ('complete', 0.25, 'SUCCESS'),
    ('pruned', 0.75, 'UNKNOWN'),
    ('failed', None, 'FAILURE'),
    ('complete', math.inf, 'FAILURE'),
  )
  expected = {}
  for (state, value, status), size in zip(ends, 2 * [(32, 1), (64, 2)]):
    point = {
      'optim.learning_rate': 1 if state == 'complete' else 0.5,
      sizes: size,
      'train.scan_layers': value != math.inf,
      'train.ema_decay': None if size[1] == 1 else 0.5,
    }
    found = points.candidate(study.facts.config, study.sweep, point)
    trial = study.begin(found, found.key, 'me')
    study.report(trial, 3, 0.75)
    study.finish(study.trial(trial.number), state, value)
    expected[found.key] = (
      {
        'optim.learning_rate': point['optim.learning_rate'],
        'model.embed_dim': float(size[0]),
        'model.num_layers': float(size[1]),
        'train.scan_layers': point['train.scan_layers'],
        'train.ema_decay': 'none' if size[1] == 1 else '0.5',
      },
      {_TAG: value} if value in (0.25, 0.75) else {},
      status,
    )
  # One that still runs is not there yet.
  point = {**point, 'train.ema_decay': None}
  found = points.candidate(study.facts.config, study.sweep, point)
  study.begin(found, found.key, 'me')
  assert hparams.write(study) == 4
  assert hparams.write(study) == 4  # In place of the first.
  tab = _Tab(tmp_path / 'study' / 'tensorboard')
  assert tab.sessions() == expected
  types, metrics = tab.experiment()
  assert metrics == [_TAG]
  assert types == {
    'optim.learning_rate': 'FLOAT64',
    'model.embed_dim': 'FLOAT64',
    'model.num_layers': 'FLOAT64',
    'train.scan_layers': 'BOOL',
    'train.ema_decay': 'STRING',
  }


def test_a_full_disk_ends_no_sweep(tmp_path, monkeypatch, caplog):
  study, sizes = _study(tmp_path)
  point = {
    'optim.learning_rate': 1,
    sizes: (32, 1),
    'train.scan_layers': True,
    'train.ema_decay': None,
  }
  found = points.candidate(study.facts.config, study.sweep, point)
  trial = study.begin(found, found.key, 'me')
  study.finish(trial, 'complete', 1.0)

  def fail(*args):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(hparams.files, 'write_whole', fail)
  hparams.write(study)
  assert 'Trial 0 is not shown in TensorBoard' in caplog.text
