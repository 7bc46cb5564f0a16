"""Training: set up, restore, step, save, evaluate, done."""

from collections.abc import Iterator
import contextlib
import logging
import signal
from typing import Any

import jax

from t2x import files
from t2x.config import consistency
from t2x.config import experiment
from t2x.config import layout_advice
from t2x.data import corpus as corpus_lib
from t2x.data import input_pipeline
from t2x.multihost import liveness_monitor
from t2x.multihost import processes
from t2x.parallel import mesh as mesh_lib
from t2x.parallel import sharding
from t2x.tracking import trackers
from t2x.trainer import run as run_lib
from t2x.trainer import workdir as workdir_lib
from t2x.training import optim
from t2x.training import train_state

_log = logging.getLogger(__name__)


def train(
  config: experiment.Experiment,
  workdir: str,
  *,
  allow_config_change: bool = False,
  profile_steps: tuple[int, int] | None = None,
  executable: str | None = None,
  stop_after: int | None = None,
  show: bool = True,
) -> train_state.TrainState:
  """Trains to the end, going on from the newest checkpoint in `workdir`.

  SIGTERM and the first SIGINT save a checkpoint and return.

  Args:
    config: the experiment.
    workdir: directory of the run, local or gs://.
    allow_config_change: go on although model, data, optimizer or seed differ.
    profile_steps: (first, last) step to record for TensorBoard's profiler.
    executable: file of programs made ahead of time; see executables.py.
    stop_after: step after which the run evaluates, saves and ends, to go on
      later; None runs to its end.
    show: show progress.

  Returns:
    The state at the end, on the devices.

  Raises:
    ValueError: anything in the config that cannot be, before compiling.
    NonFiniteError: after `train.max_skipped` skipped updates in a row.
    CheckpointError: no checkpoint can be used, or the last state not saved.
  """
  trackers.check_installed(config.train.trackers)
  devices = jax.devices()
  layout_advice.check(
    config, len(devices), num_slices=mesh_lib.num_slices(devices)
  )
  workdir = str(files.path(workdir))
  changes = workdir_lib.check(workdir, config, allow_change=allow_config_change)
  mesh = mesh_lib.make(config.mesh)
  tokenizer = workdir_lib.read_tokenizer(workdir, changes)
  corpus = corpus_lib.prepare(config.data, tokenizer)
  workdir_lib.check_corpus(
    workdir, corpus.fingerprint, allow_change=allow_config_change
  )
  consistency.check_vocabulary(config, corpus.tokenizer.vocab_size)
  with sharding.use(mesh, config.rules), _stop_signals() as stopping:
    run = run_lib.Run(config, workdir, mesh, corpus, executable)
    run.restore(changes)
    _tell_of_warmup(config.optim.schedule, run.num_steps)
    # Only now, so that a run that cannot go on stays as it was.
    if processes.is_primary():
      workdir_lib.write(workdir, config, corpus, changes, run.step)
    run.open(show)
    stages = run.program.partitioning.pipeline
    if stages is not None:
      _log.info('Pipeline: %s.', stages.summary())
    with contextlib.closing(run), jax.transfer_guard('disallow'):
      profiler = _Profiler(workdir, profile_steps)
      return _loop(run, stopping, profiler, stop_after)


def _loop(
  run: run_lib.Run,
  stopping: list[int],
  profiler: '_Profiler',
  stop_after: int | None,
) -> train_state.TrainState:
  config = run.config.train
  end = min(run.num_steps, stop_after or run.num_steps)
  # Every process stops after the same step, whichever of them was asked to.
  any_process = processes.AnyProcess(run.mesh)
  for step in range(run.step + 1, end + 1):
    profiler.before(step)
    run.advance(step)
    liveness_monitor.follow(run.where)
    profiler.after(step, run.state)
    last = step == end
    # Kept: a signal may come at any time, and nothing goes unsaved.
    stop = any_process(bool(stopping))
    if last or (_due(config.eval_every, step) and not stop):
      run.finish_row(evaluate_now=True)
      stop = any_process(bool(stopping))
    if last or stop or _due(config.checkpoint_every, step):
      run.save()
    if stop:
      _log.warning('Stopped by a signal after step %d.', step)
      break
  profiler.stop(run.state)
  run.check_saved()
  if run.step == end and processes.is_primary():
    finished = run.step == run.num_steps
    workdir_lib.write_end(run.workdir, run.step, finished=finished)
  return run.state


def _due(every: int, step: int) -> bool:
  return bool(every) and step % every == 0


def resolve_num_steps(
  config: experiment.Experiment, corpus: corpus_lib.Corpus
) -> int:
  """Returns the steps of a run that has not begun."""
  seed = config.train.seed
  segment = input_pipeline.segment(corpus, config.data, seed=seed)
  steps = experiment.num_steps(config, [segment])
  assert steps is not None
  return steps


def _tell_of_warmup(schedule: optim.Schedule, num_steps: int) -> None:
  warmup = optim.warmup_updates(schedule, num_steps)
  if warmup < schedule.warmup_steps:
    _log.warning(
      'optim.schedule.warmup_steps=%d leaves a run of %d updates no room for '
      'the end of its schedule; the warmup is cut to %d.',
      schedule.warmup_steps,
      num_steps,
      warmup,
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
  """Yields a list that fills when the process is asked to stop."""
  received: list[int] = []

  def handle(number: int, frame: Any) -> None:
    del frame
    received.append(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)

  try:
    old = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
  except ValueError:  # Not the main thread, as in some notebooks.
    yield received
    return
  try:
    yield received
  finally:
    for number, handler in old.items():
      signal.signal(number, handler)


class _Profiler:
  """Records steps `first` to `last`, both included, if there are any."""

  def __init__(self, workdir: str, steps: tuple[int, int] | None):
    self._folder = str(files.path(workdir) / 'profile')
    self._first, self._last = steps or (0, 0)
    self._running = False

  def before(self, step: int) -> None:
    """A run that goes on in the middle of the steps records the rest."""
    if not self._running and self._first <= step <= self._last:
      jax.profiler.start_trace(self._folder)
      self._running = True

  def after(self, step: int, state: train_state.TrainState) -> None:
    if step >= self._last:
      self.stop(state)

  def stop(self, state: train_state.TrainState) -> None:
    if self._running:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      self._running = False
