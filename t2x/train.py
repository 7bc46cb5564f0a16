"""Training: set up, restore, step, save, evaluate, done."""

from collections.abc import Generator
import contextlib
import logging
import signal
import time

import jax
import numpy as np

from t2x import checkpoint
from t2x import evaluate
from t2x import experiment
from t2x import flops
from t2x import mesh as mesh_lib
from t2x import metrics as metrics_lib
from t2x import program as program_lib
from t2x import report
from t2x import run_dir
from t2x import sharding
from t2x import train_step
from t2x.data import corpus as corpus_lib
from t2x.data import pipeline

_log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
  """A loss or gradient was not finite too many times in a row."""


def train(
  config: experiment.Experiment,
  workdir: str,
  *,
  allow_config_change: bool = False,
  profile_steps: tuple[int, int] | None = None,
  show: bool = True,
) -> train_step.TrainState:
  """Trains to the end, going on from the newest checkpoint in `workdir`.

  SIGTERM and the first SIGINT save a checkpoint and return.

  Args:
    config: the experiment.
    workdir: where everything is kept, local or gs://.
    allow_config_change: go on although model, data, optimizer or seed differ.
    profile_steps: (first, last) step to record for TensorBoard's profiler.
    show: show progress.

  Returns:
    The state at the end, on the devices.

  Raises:
    ValueError: anything in the config that cannot be, before compiling.
    NonFiniteError: after `train.max_skipped` skipped updates in a row.
    CheckpointError: no checkpoint can be used, or the last state not saved.
  """
  experiment.check(config, jax.device_count())
  workdir = str(run_dir.path(workdir))
  primary = jax.process_index() == 0
  changes = {}
  if primary:
    changes = run_dir.check(workdir, config, allow_change=allow_config_change)
  mesh = mesh_lib.make(config.mesh)
  # A layout that cannot be is refused here.
  program_lib.shapes_of(config, mesh)
  tokenizer = run_dir.read_tokenizer(workdir, changes)
  corpus = corpus_lib.prepare(config.data, tokenizer)
  run_dir.check_corpus(
    workdir, corpus.fingerprint, allow_change=allow_config_change
  )
  experiment.check_vocabulary(config, corpus.tokenizer.vocab_size)
  num_steps = resolve_num_steps(config, corpus)
  with sharding.use(mesh, config.rules), _stop_signals() as stopping:
    run = Run(config, workdir, mesh, corpus, num_steps)
    run.restore()
    if primary:  # Only now, so that a run that cannot go on stays as it was.
      run_dir.write(workdir, config, corpus, changes)
    run.open(show)
    with contextlib.closing(run), jax.transfer_guard('disallow'):
      return _loop(run, stopping, _Profiler(workdir, profile_steps))


def _loop(run: 'Run', stopping, profiler) -> train_step.TrainState:
  config = run.config.train
  for step in range(run.step + 1, run.num_steps + 1):
    profiler.before(step)
    run.advance(step)
    profiler.after(step, run.state)
    last = step == run.num_steps
    if last or (_due(config.eval_every, step) and not stopping):
      run.finish_row(evaluate_now=True)
    # Read once: a signal may come at any time, and nothing goes unsaved.
    stop = bool(stopping)
    if last or stop or _due(config.checkpoint_every, step):
      run.save()
    if stop:
      _log.warning('Stopped by a signal after step %d.', step)
      break
  profiler.stop(run.state)
  run.check_saved()
  return run.state


def _due(every: int, step: int) -> bool:
  return bool(every) and step % every == 0


class Run:
  """The pieces of a run, and the state that moves through them.

  Attributes:
    step: updates so far.
    state: the train state, on the devices.
  """

  def __init__(self, config, workdir, mesh, corpus, num_steps):
    self.config = config
    self.workdir = workdir
    self.corpus = corpus
    self.num_steps = num_steps
    self.num_devices = mesh.size
    self.program = program_lib.Program(config, mesh, num_steps=num_steps)
    self.saved = checkpoint.Checkpoints(
      workdir,
      keep_last=config.train.keep_last,
      keep_every=config.train.keep_every,
    )
    self._pending = None

  def restore(self) -> None:
    """Restores the newest checkpoint, or draws the weights."""
    restored = self.saved.restore(self.program.shapes)
    if restored is None:
      self.step, self.state = 0, self.program.init_state()
    else:
      self.step, self.state, _ = restored
      _log.info('Going on from the checkpoint of step %d.', self.step)

  def open(self, show: bool) -> None:
    """Opens what is written to and read from in each step."""
    self.writer = metrics_lib.Writer(
      self.workdir,
      start_step=self.step,
      num_steps=self.num_steps,
      primary=jax.process_index() == 0,
      show=show,
      header=self._flops_text(),
    )
    self.batches = self._global(
      pipeline.train_batches(
        self.corpus,
        self.config.data,
        seed=self.config.train.seed,
        start_step=self.step,
        rows=self.program.rows,
      )
    )
    self._time = time.perf_counter()

  def advance(self, step: int) -> None:
    """Dispatches one step, then reads the metrics of the one before."""
    batch, num_tokens = next(self.batches)
    self.state, metrics = self.program.step(self.state, batch)
    self.step = step
    # The device works on this step while the host waits for the last one.
    self.finish_row()
    self._pending = step, metrics, num_tokens

  def finish_row(self, evaluate_now: bool = False) -> None:
    """Writes the row of the last step, with its evaluation if asked."""
    if self._pending is None:
      return
    (step, metrics, num_tokens), self._pending = self._pending, None
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    now = time.perf_counter()
    seconds, self._time = now - self._time, now
    stopped = metrics['num_skipped'] >= self.config.train.max_skipped
    if step % self.config.train.log_every and not (evaluate_now or stopped):
      return
    with jax.transfer_guard('allow'):
      rate = float(self.program.learning_rate(step - 1))
    row = {
      'step': step,
      **metrics,
      'learning_rate': rate,
      'tokens_per_second': num_tokens / seconds,
      'step_seconds': seconds,
      'mfu': flops.mfu(self._flops, seconds, self.num_devices, self._peak),
    }
    if evaluate_now:
      row.update(self.evaluate())
    self.writer.write(row)
    if stopped:
      self._stop_non_finite(step, metrics)

  def evaluate(self) -> dict[str, float]:
    """Returns `eval/NAME/...` of every evaluation split."""
    config = self.config
    row = {}
    model = train_step.averaged_model(self.state, config.train.step_config)
    for split in config.data.eval_splits:
      batches = pipeline.eval_batches(
        self.corpus,
        config.data,
        split,
        rows=self.program.rows,
        max_batches=config.train.eval_batches,
      )
      batches = (batch for batch, _ in self._global(batches))
      metrics = evaluate.evaluate(self.program.evaluate, model, batches)
      if config.train.eval_batches is None:
        metrics |= evaluate.bits_per_byte(
          metrics, self.corpus, config.data, split
        )
      row |= {f'eval/{split}/{name}': v for name, v in metrics.items()}
    self._time = time.perf_counter()
    return row

  def save(self) -> None:
    """Saves the state; the rows up to its step are on disk first."""
    self.finish_row()
    if self.writer.flush():
      with jax.transfer_guard('allow'):  # Orbax copies to the host here.
        self.saved.save(self.step, self.state, {'step': self.step})

  def check_saved(self) -> None:
    """Raises CheckpointError if the state is not on disk by now."""
    self.saved.wait()
    latest = self.saved.latest_step()
    if latest != self.step:
      raise checkpoint.CheckpointError(
        f'The state of step {self.step} could not be saved; the last complete '
        f'checkpoint in {self.workdir} is that of step {latest}. Free space '
        'or make the directory writable, and give the same command again: it '
        'goes on from there.'
      )

  def close(self) -> None:
    self.batches.close()
    self.saved.wait()
    self.saved.close()
    try:
      self.writer.close()
      if jax.process_index() == 0:
        report.write(self.workdir)
    except OSError as error:
      _log.error('%s could not be written in full: %s', self.workdir, error)

  def _global(self, batches: Generator) -> Generator:
    """Yields (global batch, tokens in it) from this host's rows."""
    with contextlib.closing(batches):
      for batch in batches:
        num_tokens = sum(
          np.count_nonzero(v) for k, v in batch.items() if 'segments' in k
        )
        yield self.program.place(batch), num_tokens * jax.process_count()

  def _stop_non_finite(self, step: int, metrics: dict[str, float]) -> None:
    names = [f'{k}={v}' for k, v in metrics.items() if not np.isfinite(v)]
    skipped = int(metrics['num_skipped'])
    raise NonFiniteError(
      f'Step {step}: {", ".join(names)}. {skipped} updates in a row were '
      f'skipped for values that are not finite (train.max_skipped='
      f'{self.config.train.max_skipped}); the weights are those of step '
      f'{step - skipped}. Lower optim.learning_rate, or look at the data of '
      'these steps.'
    )

  def _flops_text(self) -> str:
    config = self.config
    spec = pipeline.batch_spec(config.data)
    rows, length = spec['inputs'][0]
    source = spec.get('encoder_inputs', ((0, None),))[0][1]
    shape = (config.model, rows, length, source)
    self._flops = flops.train_flops(*shape)
    kind = jax.devices()[0].device_kind
    self._peak = flops.peak_flops(kind, config.model.dtype)
    return flops.formula(*shape, peak=self._peak)


def resolve_num_steps(config: experiment.Experiment, corpus) -> int:
  """Returns the run's length in steps."""
  train = config.train
  if train.num_steps is not None:
    return train.num_steps
  if train.num_tokens is not None:
    return -(-train.num_tokens // (config.data.batch_size * config.data.length))
  assert train.num_epochs is not None
  epoch = pipeline.steps_per_epoch(corpus, config.data)
  return max(int(np.ceil(train.num_epochs * epoch)), 1)


@contextlib.contextmanager
def _stop_signals():
  """Yields a list that fills when the process is asked to stop."""
  received: list[int] = []

  def handle(number, frame):
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
    self._folder = str(run_dir.path(workdir) / 'profile')
    self._first, self._last = steps or (0, 0)
    self._running = False

  def before(self, step: int) -> None:
    """A run that goes on in the middle of the steps records the rest."""
    if not self._running and self._first <= step <= self._last:
      jax.profiler.start_trace(self._folder)
      self._running = True

  def after(self, step: int, state: train_step.TrainState) -> None:
    if step >= self._last:
      self.stop(state)

  def stop(self, state: train_step.TrainState) -> None:
    if self._running:
      jax.block_until_ready(state)
      jax.profiler.stop_trace()
      self._running = False
