"""Runs the trials of a study: starts, watches, prunes, retries, records.

Everything that must survive this process is in the study: what a killed sweep
had begun is gone on with by the same command, from the runs' checkpoints.
Several such processes may work on one study.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
import dataclasses
import difflib
import itertools
import json
import logging
import math
import re
import secrets
import statistics
import time

from etils import epath

from t2x import files
from t2x import reading
from t2x.config import experiment
from t2x.sweeps import hparams
from t2x.sweeps import ownership
from t2x.sweeps import points
from t2x.sweeps import run_progress
from t2x.sweeps import search
from t2x.sweeps import space
from t2x.sweeps import study as study_lib
from t2x.sweeps.launchers import launcher as launcher_lib
from t2x.trainer import workdir as workdir_lib

_log = logging.getLogger(__name__)

_END = object()  # Of the trials of a search.
# Suggestions in a row that the study has had, after which the space is empty.
_MOST_REPEATED = 20
_MOST_REFUSALS = 8  # Of a launcher in a row, about two minutes.
_MOST_SECONDS = 60.0  # Between two of them.
_ATTEMPT = 'attempt'  # In place of a handle: a job that is being submitted.
_COPIED = 'parent.json'  # Written once a run has the whole state of its parent.
# Of a parent: its end, and its names in trackers.
_NOT_COPIED = (_COPIED, workdir_lib.FINISHED, workdir_lib.STOPPED, 'trackers')
_IDLE_SECONDS = 1.0  # Between looks for what others leave.
_LOOK_SECONDS = 20.0  # Between looks for trials of dead workers.
_LAST_LINES = 5  # Of a failed run's output, kept with its trial.
_MOST_GROUP = 24  # Characters of a study's name in those of its jobs.

Command = Callable[[points.RunConfig, str], Sequence[str]]


@dataclasses.dataclass
class _Run:
  """A run of a trial that this process looks after.

  Attributes:
    key: hash of its config.
    config: the run's settings and config.
    progress: reader of its files.
    seen: its progress when it was last looked at.
    handle: the job that runs it; None where none does.
    cancelled: whether that job was asked to end.
    look_at: time before which the job is not looked at.
    failures: times that it has ended otherwise than it should.
    last_error: the last failure, with its step.
    result: its result once it is over.
    error: reason why it has no result; '' unless it failed for good.
  """

  key: str
  config: points.RunConfig
  progress: run_progress.RunProgress
  seen: run_progress.Snapshot = run_progress.Snapshot()
  handle: launcher_lib.Handle | None = None
  cancelled: bool = False
  look_at: float = 0.0
  failures: int = 0
  submitted_at: int = -1
  last_error: str = ''
  result: float | None = None
  error: str = ''

  @property
  def is_finished(self) -> bool:
    """Whether it has taken all steps that it is to take, and saved."""
    stop = self.config.stop_after
    if stop is not None and self.seen.stopped_at == self.seen.step >= stop:
      return True
    return self.seen.finished

  @property
  def has_diverged(self) -> bool:
    """Whether it ended because its updates were skipped for too long."""
    most = self.config.config.train.max_skipped
    return bool(self.seen.diverged) and self.seen.num_skipped >= most

  @property
  def is_over(self) -> bool:
    return self.result is not None or bool(self.error)


@dataclasses.dataclass
class _Active:
  """A trial that this process looks after."""

  trial: study_lib.Trial
  runs: list[_Run]
  is_pruned: bool = False
  reported: int = 0


class Scheduler:
  """One worker of a study."""

  def __init__(
    self,
    study: study_lib.Study,
    launcher: launcher_lib.Launcher,
    workers: ownership.Workers,
    *,
    command: Command,
    parallel: int = 1,
    skip_impossible: bool = False,
    say: Callable[[str], None] = print,
    poll_seconds: float = 0.1,
    retry_seconds: float = 1.0,
  ):
    """Prepares; `run` does the work.

    Args:
      study: the study.
      launcher: the launcher of its runs.
      workers: the workers of the study, of which this becomes one.
      command: function from a run and its workdir to its command line.
      parallel: most runs at a time.
      skip_impossible: leave out points that cannot run.
      say: function that takes lines on what happens.
      poll_seconds: seconds between two looks at the runs.
      retry_seconds: seconds after which a launcher that refuses is asked again,
        for the first time.
    """
    self._study = study
    self._launcher = launcher
    self._workers = workers
    self._command = command
    self._parallel = parallel
    self._skip_impossible = skip_impossible
    self._say = say
    self._poll_seconds = poll_seconds
    self._retry_seconds = retry_seconds
    self._refusals = 0
    self._start_at = 0.0
    self._checker = points.Checker(launcher.devices)
    self._active: list[_Active] = []
    self._stopping = False
    self._source = self._next_trials()
    self._is_empty = False
    self._orphans: set[str] = set()

  def stop(self) -> None:
    """Lets `run` return soon: runs of this process save and end."""
    self._stopping = True

  def run(self) -> None:
    """Works until all trials of the study have ended, or it is stopped.

    Raises:
      ValueError: no row of a run has the metric.
      LaunchError: the launcher refuses, again and again.
    """
    looked = -math.inf
    with self._workers.at_work():
      try:
        while True:
          if time.monotonic() - looked > _LOOK_SECONDS and not self._stopping:
            self._take_over()
            looked = time.monotonic()
          self._fill()
          active = len(self._active)
          self._poll()
          if self._stopping and (self._launcher.stays or not self._active):
            return
          if not self._active and self._is_done():
            return
          if len(self._active) < active:
            continue  # The next trial takes the place of one that ended.
          # Without a trial of its own, it waits for those of others.
          time.sleep(self._poll_seconds if self._active else _IDLE_SECONDS)
      except BaseException:
        self._abandon()
        raise

  def _is_done(self) -> bool:
    if not self._is_empty:
      return False
    # Where others are at it, this one waits, and goes on with what they leave.
    return all(trial.state != 'running' for trial in self._study.trials())

  # --- Which trial is next. ---

  def _fill(self) -> None:
    """Starts runs as long as there is room for more."""
    if self._stopping:
      return
    running = [r for a in self._active for r in a.runs if r.handle is not None]
    room = self._parallel - len(running)
    waiting = list(itertools.islice(self._waiting(), max(room, 0)))
    while len(waiting) < room and not self._is_empty:
      trial = next(self._source, _END)
      if trial is _END:
        self._is_empty = True
        break
      if trial is None:  # What comes next depends on what runs.
        break
      assert isinstance(trial, study_lib.Trial)
      active = self._activate(trial)
      self._active.append(active)
      waiting += [(active, run) for run in active.runs]
    self._start(waiting[: max(room, 0)])

  def _waiting(self) -> Iterator[tuple[_Active, _Run]]:
    """Yields the runs that nothing runs and that are not over."""
    for active in self._active:
      for run in active.runs:
        if run.handle is None and not run.is_over and not active.is_pruned:
          yield active, run

  def _next_trials(self) -> Iterator[study_lib.Trial | None]:
    """Yields new trials of this process, each claimed; None for not yet."""
    claimed = set(self._workers.claimed())
    if isinstance(self._study.sweep.search, search.PopulationBased):
      yield from self._generations(self._study.sweep.search)
      return
    if isinstance(self._study.sweep.search, search.Tpe):
      yield from self._suggested(claimed)
      return
    for point in self._study.sweep.search.points(self._study.sweep.parameters):
      try:
        found = points.candidate(
          self._study.facts.config, self._study.sweep, point
        )
      except ValueError as error:
        self._leave_out(point, error)
        continue
      if found.key in claimed and found.key not in self._orphans:
        continue
      claimed.add(found.key)
      if self._is_impossible(found) or not self._claim(found.key):
        continue
      yield self._study.begin(found, found.key, self._workers.own)

  def _generations(
    self, way: search.PopulationBased
  ) -> Iterator[study_lib.Trial | None]:
    base, sweep = self._study.facts.config, self._study.sweep
    steps = experiment.num_steps(base)
    assert steps is not None, 'checked before'
    sign = 1 if sweep.direction == 'minimize' else -1
    before: dict[int, study_lib.Trial] = {}
    for generation in range(way.generations):
      stop = steps * (generation + 1) // way.generations
      if not generation:
        family = [(None, point) for point in way.first(sweep.parameters)]
      else:
        results = [
          (t.point, math.inf if t.value is None else sign * t.value)
          for _, t in sorted(before.items())
        ]
        if not any(math.isfinite(loss) for _, loss in results):
          raise ValueError(
            f'None of the {len(results)} runs of generation {generation - 1} '
            'has a finite result, so there is none to go on from. Narrow the '
            'space; --show says how each ended.'
          )
        family = way.next(sweep.parameters, results, generation)
      for member, (parent, point) in enumerate(family):
        parents = () if parent is None else tuple(before[parent].runs)
        slot = f'g{generation:03}m{member:03}'
        if self._claim(slot):
          origin = points.Origin(
            parents=parents,
            stop_after=stop,
            member=slot,
            first_step=steps * generation // way.generations,
          )
          found = points.candidate(base, sweep, point, origin)
          yield self._study.begin(found, slot, self._workers.own)
      while len(before := self._generation(generation)) < way.population:
        yield None

  def _generation(self, generation: int) -> dict[int, study_lib.Trial]:
    """Returns the trials of a generation that have ended, by member."""
    return {
      int(trial.slot[5:]): trial
      for trial in self._study.trials()
      if trial.slot.startswith(f'g{generation:03}m')
      and trial.state != 'running'
    }

  def _copy_parent(self, run: _Run) -> None:
    """Gives a run the state of the one that it begins with."""
    if run.config.parent is None:
      return
    workdir = self._study.workdir(run.key)
    marker = workdir / _COPIED
    if marker.exists():
      return
    if workdir.exists():  # Of a copy that was cut off.
      workdir.rmtree()
    parent = self._study.workdir(run.config.parent)
    files.copy_directory(parent, workdir, without=_NOT_COPIED)
    files.write_whole(marker, json.dumps({'parent': run.config.parent}) + '\n')
    run.seen = run.progress.read()

  def _claim(self, name: str) -> bool:
    if name in self._orphans:
      self._orphans.discard(name)
      return self._workers.take_over(name)
    return self._workers.claim(name)

  def _suggested(self, claimed: set[str]) -> Iterator[study_lib.Trial]:
    for i in range(self._study.sweep.num_points):
      slot = f't{i:05}'
      if slot in claimed and slot not in self._orphans:
        continue
      if self._claim(slot):
        trial = self._suggest(slot)
        if trial is None:
          return
        yield trial

  def _suggest(self, slot: str) -> study_lib.Trial | None:
    """Returns a trial of a point that is new to the study, if one is found."""
    base, sweep = self._study.facts.config, self._study.sweep
    for _ in range(_MOST_REPEATED):
      number, point = self._study.suggest()
      try:
        found = points.candidate(base, sweep, point)
      except ValueError as error:
        self._leave_out(point, error)
        self._study.drop(number)
        continue
      if self._is_impossible(found) or not self._claim(found.key):
        self._study.drop(number)
        continue
      return self._study.begin_suggested(number, found, slot, self._workers.own)
    self._say(
      f'{_MOST_REPEATED} suggestions in a row were points that the study has '
      'had: the search ends.'
    )
    return None

  def _leave_out(self, point: space.Point, error: ValueError) -> None:
    """Says that a config refuses a point, if such points may be left out."""
    self._refuse(point, str(error))
    self._say(f'left out {points.describe(point)}: {error}')

  def _is_impossible(self, found: points.PointRuns) -> bool:
    error = self._checker.error_of(found)
    if error is None:
      return False
    self._refuse(found.point, error)
    return True

  def _refuse(self, point: space.Point, error: str) -> None:
    """Raises ValueError unless points that cannot run may be left out."""
    if not self._skip_impossible:
      total = self._study.sweep.num_points
      raise ValueError(points.refusal([(point, error)], total))

  def _take_over(self) -> None:
    """Goes on with what dead workers have begun.

    A worker may do its last work, and end, at any moment: whatever it has left
    is looked up after it is known to be dead.
    """
    claimed = self._workers.claimed()
    trials = self._study.trials()
    mine = {active.trial.number for active in self._active}
    for trial in trials:
      if trial.state == 'running' and trial.number not in mine:
        self._take_over_trial(trial)
    left = claimed.keys() - _begun(trials) - self._orphans
    owners = {name: self._workers.owner_of(name) for name in left}
    dead = {
      name
      for name, owner in owners.items()
      if owner is None or self._workers.is_dead(owner)
    }
    if dead and (orphans := dead - _begun(self._study.trials())):
      self._orphans |= orphans
      self._source, self._is_empty = self._next_trials(), False

  def _take_over_trial(self, trial: study_lib.Trial) -> None:
    if not self._workers.is_dead(trial.worker):
      return
    now = self._study.trial(trial.number)
    if now.state != 'running' or now.worker != trial.worker:
      return
    if self._workers.take_over(trial.slot):
      own = self._study.take_over(trial, self._workers.own)
      self._say(f'{_name(own)}: goes on')
      self._active.append(self._activate(own))

  # --- A run's way. ---

  def _activate(self, trial: study_lib.Trial) -> _Active:
    found = points.candidate(
      self._study.facts.config, self._study.sweep, trial.point, trial.origin
    )
    runs = []
    for config in found.runs:
      progress = run_progress.RunProgress(
        self._study.workdir(config.key),
        self._study.sweep.metric,
        trial.first_step,
      )
      run = _Run(key=config.key, config=config, progress=progress)
      run.seen = progress.read()
      run.handle = self._find_job(run)
      runs.append(run)
    return _Active(trial, runs, is_pruned=trial.pruned_at is not None)

  def _start(self, waiting: Sequence[tuple[_Active, _Run]]) -> None:
    """Hands runs in together, which clusters like better."""
    if time.monotonic() < self._start_at:
      return
    jobs, runs = [], []
    batch = secrets.token_hex(4)
    for active, run in waiting:
      run.seen = run.progress.read()
      if run.is_finished:  # By an earlier worker that could not say so.
        self._conclude(run)
        continue
      self._copy_parent(run)
      attempt = f'{batch}-{len(jobs)}'
      job = job_of(run.config, self._command, self._study.directory, attempt)
      runs.append((active, run))
      jobs.append(job)
      if self._launcher.stays:  # Should this process end before it has handles.
        self._write_handle(run, {_ATTEMPT: attempt})
    if not jobs:
      return
    try:
      handles = self._launcher.submit(jobs)
    except launcher_lib.LaunchError as error:
      self._put_off(error)
      return
    self._refusals = 0
    # Where there is no room for all, the others wait.
    for (active, run), handle in zip(runs, handles, strict=False):
      if run.failures == 0 and run.seen.step == 0:
        self._say(
          f'{_run_name(active.trial, run)}: starts (logs/{run.key}.log)'
        )
      run.submitted_at, run.handle = run.seen.step, handle
      run.cancelled, run.look_at = False, 0.0
      self._write_handle(run, handle)

  def _put_off(self, error: launcher_lib.LaunchError) -> None:
    """Lets some time pass before the launcher is asked again.

    Raises:
      LaunchError: it has refused for too long.
    """
    self._refusals += 1
    wait = min(self._retry_seconds * 2 ** (self._refusals - 1), _MOST_SECONDS)
    if self._refusals > _MOST_REFUSALS:
      raise launcher_lib.LaunchError(
        f'{error}\nThat was the answer {self._refusals} times in a row. Mend '
        'it; the same command goes on.'
      ) from error
    self._say(f'not started: {error}; tried again in {wait:.0f} s')
    self._start_at = time.monotonic() + wait

  def _poll(self) -> None:
    for active in list(self._active):
      if not self._workers.holds(active.trial.slot):
        self._let_go(active)
        continue
      for run in active.runs:
        if run.handle is not None:
          self._look_after(active, run)
      if not active.is_pruned:
        self._report(active)
      elif not self._stopping:
        self._cancel_all(active)
      self._finish(active)

  def _let_go(self, active: _Active) -> None:
    """Leaves a trial to the worker that took it over.

    That happens to one whose signs of life were held up: a machine that was
    suspended, say.
    """
    self._say(f'{_name(active.trial)}: another worker has taken it over')
    self._active.remove(active)
    if not self._launcher.stays:  # Where jobs stay, the other has found them.
      self._end_all([run for run in active.runs if run.handle is not None])

  def _cancel(self, run: _Run) -> None:
    """Asks a run to save and end, again and again if that fails."""
    if run.handle is None or run.cancelled:
      return
    try:
      self._launcher.cancel(run.handle)
    except launcher_lib.LaunchError as error:
      _log.warning('%s; asked again later.', error)
      return
    run.cancelled = True

  def _cancel_all(self, active: _Active) -> None:
    for run in active.runs:
      self._cancel(run)

  def _look_after(self, active: _Active, run: _Run) -> None:
    assert run.handle is not None
    if time.monotonic() < run.look_at:
      return
    before = json.dumps(run.handle)
    if self._stopping and not self._launcher.stays:
      self._cancel(run)
    try:
      # Before its files: what it wrote last is read once it is over.
      state = self._launcher.state(run.handle)
    except launcher_lib.LaunchError as error:
      _log.warning('%s; asked again later.', error)
      run.look_at = time.monotonic() + _LOOK_SECONDS
      return
    if json.dumps(run.handle) != before:
      self._write_handle(run, run.handle)
    run.seen = run.progress.read()
    if not state.is_over:
      return
    handle, run.handle = run.handle, None
    self._forget_handle(run)
    if run.is_finished:
      self._conclude(run)
    elif active.is_pruned or self._stopping:
      return
    elif state.phase != 'preempted' and run.has_diverged:
      run.result = math.inf
      if self._study.sweep.direction == 'maximize':
        run.result = -math.inf
    elif state.phase == 'preempted' or (
      state.phase in ('ended', 'lost') and run.seen.step > run.submitted_at
    ):
      self._say(
        f'{_name(active.trial)}: interrupted after step {run.seen.step}'
        f'{": " + state.message if state.message else ""}; goes on'
      )
    else:
      said = self._launcher.logs(handle, _LAST_LINES).strip()
      reason = state.message or f'{state.phase} before its last step'
      self._fail(active, run, f'{reason}: {said}' if said else reason)

  def _fail(self, active: _Active, run: _Run, error: str) -> None:
    """Lets a run be tried again, or not."""
    run.failures += 1
    where = f'after step {run.seen.step}, {error}'
    # The same at the same place: once more would not help.
    again = run.failures <= self._study.sweep.max_retries
    if again and where != run.last_error:
      self._say(f'{_name(active.trial)}: failed {where}\n  starts again')
    else:
      run.error = where
    run.last_error = where

  def _conclude(self, run: _Run) -> None:
    values, sweep = run.seen.values, self._study.sweep
    if run.seen.diverged and run.seen.step not in values:
      run.result = math.inf if sweep.direction == 'minimize' else -math.inf
    elif not values:
      raise ValueError(_no_metric(sweep.metric, run))
    elif sweep.result == 'last':
      run.result = values[max(values)]
    else:
      best = min if sweep.direction == 'minimize' else max
      run.result = best(values.values())

  # --- A trial's way. ---

  def _report(self, active: _Active) -> None:
    """Reports steps that all runs have reached, and prunes by them.

    Raises:
      ValueError: a run has rows of its kind without the metric.
    """
    for run in active.runs:
      self._check_names(run)
    common = set.intersection(*(set(run.seen.values) for run in active.runs))
    for step in sorted(common):
      if step <= active.reported:
        continue
      active.reported = step
      value = statistics.fmean(run.seen.values[step] for run in active.runs)
      self._study.report(active.trial, step, value)
      going = any(not run.is_finished for run in active.runs)
      if going and self._study.should_prune(active.trial):
        # Kept before anything ends: asked again, a rule may say otherwise.
        self._study.mark_pruned(active.trial, step)
        active.is_pruned = True
        self._cancel_all(active)
        return

  def _check_names(self, run: _Run) -> None:
    """Raises ValueError as soon as it is sure that no row will have the metric.

    Those of an evaluation come together, all others in each row.
    """
    metric, names = self._study.sweep.metric, run.seen.names
    family = metric.rpartition('/')[0]
    if family.startswith('eval/'):
      has_family = any(name.startswith(f'{family}/') for name in names)
    else:
      has_family = bool(names)
    if has_family and metric not in names:
      raise ValueError(_no_metric(metric, run))

  def _finish(self, active: _Active) -> None:
    """Records a trial that is over."""
    runs, trial = active.runs, active.trial
    failed = [run for run in runs if run.error]
    if failed:
      self._cancel_all(active)
    if any(run.handle is not None for run in runs):
      return
    facts = {
      'seconds': round(sum(run.seen.seconds for run in runs), 3),
      'failures': sum(run.failures for run in runs),
      'steps': sum(max(run.seen.step - trial.first_step, 0) for run in runs),
    }
    if failed:
      error = failed[0].error
      self._study.finish(trial, 'failed', error=error, **facts)
      self._say(f'{_name(trial)}: FAILED {error}')
    elif active.is_pruned:
      trial = self._study.trial(trial.number)
      self._study.finish(trial, 'pruned', **facts)
      at = trial.pruned_at
      found = None if at is None else trial.values.get(at)
      value = '' if found is None else f' ({found:.5g})'
      self._say(f'{_name(trial)}: pruned after step {at}{value}')
    elif all(run.result is not None for run in runs):
      value = statistics.fmean(run.result or 0.0 for run in runs)
      if not math.isfinite(value):
        facts['error'] = 'diverged: ' + runs[0].seen.diverged
      self._study.finish(trial, 'complete', value, **facts)
      shown = f'{value:.6g}' if math.isfinite(value) else 'diverged'
      best = self._study.best()
      said = f'; best {best.value:.5g}' if best and best.value != value else ''
      self._say(f'{_name(trial)}: {self._study.sweep.metric} {shown}{said}')
    elif not self._stopping:
      return
    self._active.remove(active)
    ended = self._study.trial(trial.number)
    if ended.state != 'running':
      hparams.write_trial(self._study, ended)

  def _abandon(self) -> None:
    """Lets this process's runs save and end, where they do not stay."""
    if self._launcher.stays:
      return
    runs = [run for active in self._active for run in active.runs]
    self._end_all([run for run in runs if run.handle is not None])

  def _end_all(self, runs: Sequence[_Run]) -> None:
    """Lets runs save and end, and waits for it."""
    for run in runs:
      self._cancel(run)
    for run in runs:
      while not self._is_over(run):
        time.sleep(self._poll_seconds)

  def _is_over(self, run: _Run) -> bool:
    assert run.handle is not None
    try:
      return self._launcher.state(run.handle).is_over
    except launcher_lib.LaunchError:  # Then nothing more can be done about it.
      return True

  # --- Jobs, kept in the study so that they are found again. ---

  def _handle_file(self, run: _Run) -> epath.Path:
    return self._study.directory / 'jobs' / f'{run.key}.json'

  def _write_handle(self, run: _Run, handle: launcher_lib.Handle) -> None:
    files.write_whole(self._handle_file(run), json.dumps(handle) + '\n')

  def _find_job(self, run: _Run) -> launcher_lib.Handle | None:
    """Returns the handle of the job that an earlier process began, if any."""
    file = self._handle_file(run)
    if not file.exists():
      return None
    kept = reading.json_object(file, 'Remove it: its job is then unknown.')
    if _ATTEMPT not in kept:
      return kept
    # That process ended as it was about to submit the job, or just after.
    directory = self._study.directory
    job = job_of(run.config, self._command, directory, kept[_ATTEMPT])
    return self._launcher.find(job)

  def _forget_handle(self, run: _Run) -> None:
    self._handle_file(run).unlink(missing_ok=True)


def job_of(
  run: points.RunConfig,
  command: Command,
  directory: epath.Path,
  attempt: str = '',
) -> launcher_lib.LaunchJob:
  """Returns the job of a run.

  Args:
    run: the run.
    command: function from a run and its workdir to its command line.
    directory: directory of the study.
    attempt: name of this attempt, unlike all others of any run.
  """
  group = re.sub('[^a-z0-9]+', '-', directory.name.lower()).strip('-')
  group = group[:_MOST_GROUP].rstrip('-') or 'study'
  group = group if group[0].isalpha() else f's-{group}'
  workdir = str(directory / 'trials' / run.key)
  return launcher_lib.LaunchJob(
    name=f'{group}-{run.key}',
    attempt=attempt,
    command=command(run, workdir),
    workdir=workdir,
    log=str(study_lib.log_folder(directory) / f'{run.key}.log'),
    group=group,
    settings=run.settings,
  )


def _no_metric(metric: str, run: _Run) -> str:
  close = difflib.get_close_matches(metric, run.seen.names, n=1, cutoff=0.3)
  hint = f' Did you mean {close[0]!r}?' if close else ''
  return (
    f'metric={metric!r}: no row of run {run.key} has it. Rows have '
    f'{", ".join(run.seen.names)}.{hint} The metric may change as long as no '
    'trial has a result.'
  )


def _begun(trials: Sequence[study_lib.Trial]) -> set[str]:
  """Returns the names under which trials were claimed."""
  return {trial.slot for trial in trials} | {trial.key for trial in trials}


def _name(trial: study_lib.Trial) -> str:
  point = {
    name: float(f'{value:.5g}') if isinstance(value, float) else value
    for name, value in trial.point.items()
  }
  return f'trial {trial.number} ({points.describe(point)})'


def _run_name(trial: study_lib.Trial, run: _Run) -> str:
  """Returns the name of a trial's run, with its seed if there are several."""
  if len(trial.runs) == 1:
    return _name(trial)
  return f'{_name(trial)} seed {run.config.settings["train.seed"]}'
