"""A study: the trials of one sweep of one experiment, in a directory.

  STUDY/study.json     the experiment, the sweep, and where results are kept
  STUDY/journal.log    trials and results, by Optuna, unless in a database
  STUDY/trials/KEY/    the workdir of a run, as of any other
  STUDY/logs/KEY.log   what it printed, where its launcher keeps that here; of
                       a study in gs://, in ~/.cache/t2x/sweep_logs
  STUDY/jobs/KEY.json  the job that runs it, by its launcher
  STUDY/claims/, STUDY/workers/   who runs what; see `ownership`

A run is known by the hash of its config (KEY), and so is a trial. The directory
is local or gs://.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import datetime
import json
import logging
import math
import os
import re
from typing import Any
from typing import Literal
import uuid

from etils import epath
import optuna

from t2x import files
from t2x import reading
from t2x.config import experiment as experiment_lib
from t2x.config import overrides
from t2x.sweeps import definition
from t2x.sweeps import journal
from t2x.sweeps import ownership
from t2x.sweeps import points
from t2x.sweeps import search
from t2x.sweeps import space

_log = logging.getLogger(__name__)

FILE = 'study.json'
_FORMAT = 1
_KEYS = ('format', 'experiment', 'config', 'sweep', 'storage', 'name')
_TRIAL = 't2x'  # Optuna's attributes of a trial.
_OUTCOME = 'outcome'
_PRUNED = 'pruned_at'
# What a sweep that goes on may change. More points of a Latin hypercube would
# move those that are there.
_MAY_CHANGE = ('sweep.max_retries', 'sweep.search.num_trials')
_FIXED_SEARCHES = ('latin_hypercube',)
# What changes no program, and yet the results that are compared.
_RESULT_SETTINGS = (
  'train.eval_every',
  'train.eval_batches',
  'train.max_skipped',
  'data.eval_splits',
)

State = Literal['running', 'complete', 'pruned', 'failed']
_STATES: dict[Any, State] = {
  optuna.trial.TrialState.RUNNING: 'running',
  optuna.trial.TrialState.WAITING: 'running',
  optuna.trial.TrialState.COMPLETE: 'complete',
  optuna.trial.TrialState.PRUNED: 'pruned',
  optuna.trial.TrialState.FAIL: 'failed',
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
  """A trial as the study knows it.

  Attributes:
    number: number of the trial, from 0.
    key: hash of what it computes.
    slot: name under which it was claimed.
    state: `running`, `complete`, `pruned` or `failed`.
    point: value of each parameter.
    runs: key -> settings of each of its runs.
    worker: name of the worker that began it or took it over.
    value: its result; None before there is one. Infinite for one that diverged.
    values: mean of the metric over its runs, by step.
    pruned_at: step after which it is to end early; None if it is not.
    outcome: facts of its end: `error`, `seconds`, `failures`.
    origin: beginning and end of its runs; None for whole runs.
    began: time of its beginning.
    ended: time of its end; None before.
  """

  number: int
  key: str
  slot: str
  state: State
  point: space.Point
  runs: Mapping[str, Mapping[str, str]]
  worker: str
  value: float | None
  values: Mapping[int, float]
  pruned_at: int | None
  outcome: Mapping[str, Any]
  origin: points.Origin | None
  began: datetime.datetime | None
  ended: datetime.datetime | None

  @property
  def first_step(self) -> int:
    """The step after which its own part of longer runs begins."""
    return self.origin.first_step if self.origin else 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
  """What study.json holds.

  Attributes:
    experiment: name of the experiment.
    config: the experiment without any point.
    sweep: the sweep.
    storage: address of the database with the results; None for the journal.
    name: name of the study in the journal or database; '' makes one of the
      experiment's that no other study has.
  """

  experiment: str
  config: experiment_lib.Experiment
  sweep: definition.Sweep
  storage: str | None = None
  name: str = ''

  def __post_init__(self) -> None:
    if not self.name:
      name = f'{self.experiment}-{uuid.uuid4().hex[:8]}'
      object.__setattr__(self, 'name', name)

  def to_json(self) -> dict[str, Any]:
    """Returns the facts as JSON values."""
    return {
      'format': _FORMAT,
      'experiment': self.experiment,
      'config': overrides.to_json(self.config),
      'sweep': self.sweep.to_json(),
      'storage': self.storage,
      'name': self.name,
    }


class Study:
  """Reads and writes the trials of a study.

  Attributes:
    directory: directory of the study.
    facts: the experiment and the sweep.
  """

  def __init__(self, directory: epath.PathLike, facts: Facts):
    """Opens a study whose study.json is there; see `create` and `read`.

    Args:
      directory: directory of the study.
      facts: facts of its study.json.
    """
    self.directory = files.path(directory)
    self.facts = facts
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    self._storage = journal.storage(self.directory, facts.storage)
    self._study = optuna.create_study(
      storage=self._storage,
      study_name=facts.name,
      direction=facts.sweep.direction,
      load_if_exists=True,
      sampler=optuna.samplers.RandomSampler(seed=0),
    )
    if facts.sweep.pruning is not None:
      steps = experiment_lib.num_steps(facts.config)
      assert steps is not None, 'checked before'
      self._study.pruner = facts.sweep.pruning.pruner(steps)

  @property
  def sweep(self) -> definition.Sweep:
    """The sweep."""
    return self.facts.sweep

  def workdir(self, key: str) -> epath.Path:
    """Returns the workdir of a run."""
    return self.directory / 'trials' / key

  def trials(self) -> list[Trial]:
    """Returns all trials, by number."""
    found = self._study.get_trials(deepcopy=False)
    return [self._trial(t) for t in found if _TRIAL in t.user_attrs]

  def trial(self, number: int) -> Trial:
    """Returns a trial by its number."""
    return self._trial(self._study.get_trials(deepcopy=False)[number])

  def interrupted(self, trials: Sequence[Trial]) -> set[int]:
    """Returns the numbers of running trials whose worker has ended.

    Nobody runs them any more; the sweep's command goes on with them.

    Args:
      trials: trials of the study.
    """
    workers = ownership.Workers(self.directory)
    names = {t.worker for t in trials if t.state == 'running'}
    dead = {name for name in names if workers.is_dead(name)}
    return {
      t.number for t in trials if t.state == 'running' and t.worker in dead
    }

  def begin(self, found: points.PointRuns, slot: str, worker: str) -> Trial:
    """Adds a trial that is about to run.

    Args:
      found: the point and its runs.
      slot: name under which it was claimed.
      worker: name of the worker that runs it.
    """
    parameters = self.sweep.parameters
    params = {n: search.optuna_value(v) for n, v in found.point.items()}
    template = optuna.trial.FrozenTrial(
      number=-1,
      trial_id=-1,
      state=optuna.trial.TrialState.RUNNING,
      value=None,
      values=None,
      datetime_start=datetime.datetime.now(),
      datetime_complete=None,
      params=params,
      distributions=search.to_optuna(parameters),
      user_attrs={_TRIAL: _attributes(found, slot, worker)},
      system_attrs={},
      intermediate_values={},
    )
    identifier = self._storage.create_new_trial(
      self._study._study_id, template_trial=template
    )
    return self._trial(self._storage.get_trial(identifier))

  def suggest(self) -> tuple[int, space.Point]:
    """Asks Optuna for the next point.

    Returns:
      The number of the trial, for `begin_suggested`, and its point.
    """
    assert isinstance(self.sweep.search, search.Tpe)
    number = len(self._study.get_trials(deepcopy=False))
    self._study.sampler = self.sweep.search.sampler(number)
    parameters = self.sweep.parameters
    asked = self._study.ask(search.to_optuna(parameters))
    return asked.number, search.from_optuna(parameters, asked.params)

  def begin_suggested(
    self, number: int, found: points.PointRuns, slot: str, worker: str
  ) -> Trial:
    """Notes what a suggested trial runs; arguments as for `begin`."""
    attributes = _attributes(found, slot, worker)
    self._set(number, _TRIAL, attributes)
    return self.trial(number)

  def take_over(self, trial: Trial, worker: str) -> Trial:
    """Notes that a worker goes on with a trial that another began."""
    kept = self._study.get_trials(deepcopy=False)[trial.number].user_attrs
    self._set(trial.number, _TRIAL, {**kept[_TRIAL], 'worker': worker})
    return self.trial(trial.number)

  def report(self, trial: Trial, step: int, value: float) -> None:
    """Adds the value of a trial's metric after a step, unless it is known."""
    known = self._study.get_trials(deepcopy=False)[trial.number]
    if step not in known.intermediate_values:
      identifier = self._identifier(trial.number)
      self._storage.set_trial_intermediate_value(identifier, step, value)

  def should_prune(self, trial: Trial) -> bool:
    """Whether the sweep's rule ends a trial after what was reported."""
    if self.sweep.pruning is None:
      return False
    frozen = self._storage.get_trial(self._identifier(trial.number))
    return self._study.pruner.prune(self._study, frozen)

  def mark_pruned(self, trial: Trial, step: int) -> None:
    """Notes that a trial is to end early, for what it had after a step."""
    self._set(trial.number, _PRUNED, step)

  def finish(
    self,
    trial: Trial,
    state: State,
    value: float | None = None,
    **outcome: float | str,
  ) -> None:
    """Writes the end of a trial.

    Args:
      trial: the trial.
      state: `complete`, `pruned` or `failed`.
      value: its result; a pruned trial's is the last that was reported.
      **outcome: facts of its end: `error`, `seconds`, `failures`.
    """
    self._set(trial.number, _OUTCOME, outcome)
    if state == 'pruned' and value is None:
      value = trial.values.get(max(trial.values, default=0))
    to = {own: theirs for theirs, own in _STATES.items()}[state]
    values = None if value is None or state == 'failed' else [value]
    identifier = self._identifier(trial.number)
    self._storage.set_trial_state_values(identifier, to, values)

  def drop(self, number: int) -> None:
    """Ends a suggested trial that is not to run, as if it had not been."""
    self._storage.set_trial_state_values(
      self._identifier(number), optuna.trial.TrialState.FAIL, None
    )

  def _identifier(self, number: int) -> int:
    return self._study.get_trials(deepcopy=False)[number]._trial_id

  def _set(self, number: int, name: str, value: object) -> None:
    self._storage.set_trial_user_attr(self._identifier(number), name, value)

  def _trial(self, kept: optuna.trial.FrozenTrial) -> Trial:
    own = kept.user_attrs[_TRIAL]
    outcome = dict(kept.user_attrs.get(_OUTCOME, {}))
    return Trial(
      number=kept.number,
      key=own['key'],
      slot=own['slot'],
      state=_STATES[kept.state],
      point=search.from_optuna(self.sweep.parameters, kept.params),
      runs=own['runs'],
      worker=own['worker'],
      value=kept.values[0] if kept.values else None,
      values=kept.intermediate_values,
      pruned_at=kept.user_attrs.get(_PRUNED),
      origin=_origin(own.get('origin')),
      outcome=outcome,
      began=kept.datetime_start,
      ended=kept.datetime_complete,
    )

  def best(self) -> Trial | None:
    """Returns the complete trial with the best finite result, if any."""
    # Asked after each trial: the others are not made into `Trial`s.
    sign = 1 if self.sweep.direction == 'minimize' else -1
    done = [
      (sign * kept.values[0], kept.number, kept)
      for kept in self._study.get_trials(deepcopy=False)
      if kept.state == optuna.trial.TrialState.COMPLETE
      and kept.values
      and math.isfinite(kept.values[0])
      and _TRIAL in kept.user_attrs
    ]
    return self._trial(min(done)[2]) if done else None


def create(directory: epath.PathLike, facts: Facts) -> Study:
  """Opens the study in a directory, or begins one there.

  Args:
    directory: directory of the study, local or gs://.
    facts: the experiment and the sweep that the study is of.

  Raises:
    ValueError: it is a study of another experiment, or of another space.
  """
  root = files.path(directory)
  journal.check_url(facts.storage)
  _make(root)
  text = json.dumps(facts.to_json(), indent=1) + '\n'
  if not files.create_whole(root / FILE, text):
    facts, changes = _check_same(root, facts)
    for name, (before, after) in changes.items():
      _log.info(
        'changed since the study began: %s: %r -> %r', name, before, after
      )
    if changes:
      text = json.dumps(facts.to_json(), indent=1) + '\n'
      files.write_whole(root / FILE, text)
  for folder in ('trials', 'jobs'):
    (root / folder).mkdir(parents=True, exist_ok=True)
  log_folder(root).mkdir(parents=True, exist_ok=True)
  return Study(root, facts)


def check(directory: epath.PathLike, facts: Facts) -> None:
  """Checks that a study could begin in a directory, or go on there.

  Args:
    directory: directory of the study, local or gs://.
    facts: the experiment and the sweep.

  Raises:
    ValueError: it cannot be made or written, it holds a study of something
      else, or the database cannot be opened.
  """
  root = files.path(directory)
  journal.check_url(facts.storage)
  try:
    if (root / FILE).exists():
      _check_same(root, facts)
    elif not files.is_remote(root):
      there = next(p for p in (root, *root.parents) if p.exists())
      if not there.is_dir():
        raise NotADirectoryError(f'{there} is a file')
      if not os.access(there, os.W_OK):
        raise PermissionError(f'{there} cannot be written')
  except OSError as error:
    raise _no_directory(directory, error) from error


def _make(root: epath.Path) -> None:
  try:
    root.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise _no_directory(root, error) from error


def _no_directory(directory: epath.PathLike, error: OSError) -> ValueError:
  return ValueError(
    f'--study={directory}: there can be no directory there '
    f'({error.strerror or error}). Name another one.'
  )


def log_folder(directory: epath.Path) -> epath.Path:
  """Returns the local folder of what the runs of a study print.

  It is in the study, unless that is in an object store, which takes no
  appending: then in the user's cache.

  Args:
    directory: directory of the study.
  """
  if not files.is_remote(directory):
    return directory / 'logs'
  name = re.sub('[^A-Za-z0-9._-]+', '-', str(directory))
  return epath.Path(files.cache_directory() / 'sweep_logs' / name)


def read(directory: epath.PathLike) -> Study:
  """Opens the study in a directory, with what its study.json says.

  Raises:
    ValueError: there is none.
  """
  root = files.path(directory)
  if not (root / FILE).exists():
    raise ValueError(
      f'--study={directory} holds no study: it has no {FILE}. '
      'scripts/sweep.py begins one.'
    )
  data = _read(root)
  try:
    facts = Facts(
      experiment=data['experiment'],
      config=overrides.from_json(experiment_lib.Experiment, data['config']),
      sweep=definition.from_json(data['sweep']),
      storage=data['storage'],
      name=data['name'],
    )
  except (KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f'{root / FILE} is damaged ({type(error).__name__}: {error}). Restore '
      'it, or use another --study.'
    ) from error
  return Study(root, facts)


def _check_same(
  root: epath.Path, facts: Facts
) -> tuple[Facts, dict[str, tuple[Any, Any]]]:
  """Returns the facts of a study that goes on, and what changes in its file.

  Raises:
    ValueError: the directory holds a study of something else.
  """
  old = _read(root)
  facts = dataclasses.replace(facts, name=old['name'])
  new = facts.to_json()
  changes = overrides.differences(old, new)
  outer = tuple(
    f'config.{name}'
    for name in experiment_lib.OUTER_SETTINGS
    if name not in _RESULT_SETTINGS
  )
  may_change = _MAY_CHANGE
  if facts.sweep.search.kind in _FIXED_SEARCHES:
    may_change = _MAY_CHANGE[:1]
  lines = [
    f'  {name}: {before!r} -> {after!r}'
    for name, (before, after) in changes.items()
    if not name.startswith((*may_change, *outer))
    and not (name == 'sweep.metric' and not _has_results(root))
  ]
  if lines:
    raise ValueError(
      f'--study={root} holds a study of something else:\n'
      + '\n'.join(lines)
      + '\nUse another --study, or undo the changes. Trials that are there '
      'could not be compared with new ones.'
    )
  return facts, changes


def _has_results(root: epath.Path) -> bool:
  return any(trial.value is not None for trial in read(root).trials())


def _read(root: epath.Path) -> dict[str, Any]:
  remedy = 'Restore it, or use another --study.'
  data = reading.json_object(root / FILE, remedy)
  missing = [name for name in _KEYS if name not in data]
  if missing:
    raise ValueError(f'{root / FILE} has no {missing[0]!r}. {remedy}')
  if data.get('format') != _FORMAT:
    raise ValueError(
      f'{root / FILE} is of format {data.get("format")!r}, and this t2x reads '
      f'format {_FORMAT}.'
    )
  return data


def _attributes(
  found: points.PointRuns, slot: str, worker: str
) -> dict[str, Any]:
  runs = {run.key: dict(run.settings) for run in found.runs}
  result = {'key': found.key, 'slot': slot, 'worker': worker, 'runs': runs}
  if found.origin is not None:
    result['origin'] = dataclasses.asdict(found.origin)
  return result


def _origin(kept: Mapping[str, Any] | None) -> points.Origin | None:
  if kept is None:
    return None
  return points.Origin(**{**kept, 'parents': tuple(kept['parents'])})
