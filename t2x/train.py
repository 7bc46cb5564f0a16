"""Training: set up, restore, step, save, evaluate, done."""

from collections.abc import Iterator
import contextlib
import functools
import logging
import signal
import time

from flax import nnx
import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np

from t2x import (
  checkpoint,
  evaluate,
  experiment,
  flops,
  optim,
  report,
  run_dir,
  sharding,
  train_step,
)
from t2x import mesh as mesh_lib
from t2x import metrics as metrics_lib
from t2x.data import corpus as corpus_lib
from t2x.data import pipeline
from t2x.models import model as model_lib

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
  """
  experiment.check(config, jax.device_count())
  mesh = mesh_lib.make(config.mesh)
  shapes_of(config, mesh)  # A layout that cannot be is refused here.
  corpus = corpus_lib.prepare(config.data)
  experiment.check_vocabulary(config, corpus.tokenizer.vocab_size)
  num_steps = resolve_num_steps(config, corpus)
  if jax.process_index() == 0:
    run_dir.write(
      workdir, config, corpus.tokenizer, allow_change=allow_config_change
    )
  with sharding.use(mesh, config.rules), _stop_signals() as stopping:
    run = Run(config, workdir, mesh, corpus, num_steps)
    run.start(show)
    with contextlib.closing(run), jax.transfer_guard('disallow'):
      return _loop(run, stopping, profile_steps)


def _loop(run: 'Run', stopping, profile_steps) -> train_step.TrainState:
  config = run.config.train
  for step in range(run.step + 1, run.num_steps + 1):
    _profile(run.workdir, profile_steps, step)
    run.advance(step)
    last = step == run.num_steps or bool(stopping)
    if last or (config.eval_every and step % config.eval_every == 0):
      run.finish_row(evaluate_now=step == run.num_steps or not last)
    every = config.checkpoint_every
    if last or (every and step % every == 0):
      run.save()
    if stopping:
      _log.warning('Stopped by a signal after step %d; saved.', step)
      break
  run.saved.wait()
  return run.state


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
    self.key = jax.device_put(
      jax.random.key(config.train.seed), NamedSharding(mesh, P())
    )
    self.tx = optim.make(config.optim, num_steps)
    self.rate = jax.jit(optim.make_schedule(config.optim, num_steps))
    self.shapes, self.batch_sharding = shapes_of(config, mesh)
    self.rows = local_rows(self.batch_sharding, config.data.batch_size)
    shardings = jax.tree.map(lambda s: s.sharding, self.shapes)
    self.step_fn = jax.jit(
      functools.partial(
        train_step.train_step, tx=self.tx, config=config.train.step_config
      ),
      out_shardings=(shardings, NamedSharding(mesh, P())),
      donate_argnums=0,
    )
    self.eval_fn = jax.jit(
      functools.partial(train_step.eval_step, execution=config.train.execution)
    )
    self.saved = checkpoint.Checkpoints(
      workdir,
      keep_last=config.train.keep_last,
      keep_every=config.train.keep_every,
    )
    self._pending = None

  def start(self, show: bool) -> None:
    """Restores the newest checkpoint, or draws the weights."""
    restored = self.saved.restore(self.shapes)
    if restored is None:
      self.step, self.state = 0, self._init()
    else:
      self.step, self.state, _ = restored
      _log.info('Going on from the checkpoint of step %d.', self.step)
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
        rows=self.rows,
      )
    )
    self._time = time.perf_counter()

  def advance(self, step: int) -> None:
    """Dispatches one step, then reads the metrics of the one before."""
    batch, num_tokens = next(self.batches)
    self.state, metrics = self.step_fn(self.state, batch, self.key)
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
    self._check_finite(step, metrics)
    if step % self.config.train.log_every and not evaluate_now:
      return
    with jax.transfer_guard('allow'):
      rate = float(self.rate(step - 1))
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
        rows=self.rows,
        max_batches=config.train.eval_batches,
      )
      batches = (batch for batch, _ in self._global(batches))
      metrics = evaluate.evaluate(self.eval_fn, model, batches)
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
    self.writer.flush()
    self.saved.save(self.step, self.state, {'step': self.step})

  def close(self) -> None:
    self.batches.close()
    self.saved.wait()
    self.saved.close()
    self.writer.close()
    if jax.process_index() == 0:
      report.write(self.workdir)

  def _init(self):
    config = self.config
    shardings = jax.tree.map(lambda s: s.sharding, self.shapes)
    init = functools.partial(init_state, config, self.tx)
    return jax.jit(init, out_shardings=shardings)(self.key)

  def _global(self, batches: Iterator) -> Iterator:
    """Yields (global batch, tokens in it) from this host's rows."""
    with contextlib.closing(batches):
      for batch in batches:
        num_tokens = sum(
          np.count_nonzero(v) for k, v in batch.items() if 'segments' in k
        )
        place = functools.partial(
          jax.make_array_from_process_local_data, self.batch_sharding
        )
        yield jax.tree.map(place, batch), num_tokens * jax.process_count()

  def _check_finite(self, step: int, metrics: dict[str, float]) -> None:
    if metrics['num_skipped'] < self.config.train.max_skipped:
      return
    names = [k for k, v in metrics.items() if not np.isfinite(v)]
    raise NonFiniteError(
      f'Step {step}: {" and ".join(names)} not finite, for the '
      f'{int(metrics["num_skipped"])}th step in a row (train.max_skipped='
      f'{self.config.train.max_skipped}). The weights are those before it. '
      'Lower optim.learning_rate, or look at the data of these steps.'
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


def init_state(config, tx, key: jax.Array) -> train_step.TrainState:
  """Draws the weights and makes the state before the first step."""
  model = model_lib.make(config.model, rngs=nnx.Rngs(key))
  return train_step.init_state(model, tx, config.train.step_config)


def shapes_of(config: experiment.Experiment, mesh: jax.sharding.Mesh):
  """Returns the state as sharded shapes, and the sharding of a batch.

  Nothing is allocated or compiled.

  Raises:
    ShardingError: a layout that cannot be.
  """
  tx = optim.make(config.optim, 1)
  key = jax.eval_shape(jax.random.key, 0)
  shapes = jax.eval_shape(functools.partial(init_state, config, tx), key)
  shardings = train_step.state_shardings(
    shapes, mesh, config.rules, config.train.step_config
  )
  shapes = jax.tree.map(
    lambda s, d: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=d),
    shapes,
    shardings,
  )
  rows = (config.data.batch_size, config.data.length)
  spec = sharding.to_spec(
    ('batch', 'length'), config.rules, shape=rows, mesh=mesh, name='batch'
  )
  return shapes, NamedSharding(mesh, spec)


def resolve_num_steps(config: experiment.Experiment, corpus) -> int:
  """Returns the run's length in steps."""
  train = config.train
  if train.num_steps is not None:
    return train.num_steps
  if train.num_tokens is not None:
    return -(-train.num_tokens // (config.data.batch_size * config.data.length))
  epoch = pipeline.steps_per_epoch(corpus, config.data)
  return max(int(np.ceil(train.num_epochs * epoch)), 1)


def local_rows(batch_sharding: NamedSharding, num_rows: int) -> slice:
  """Returns the rows of a global batch that this process holds."""
  shape = (num_rows, 1)
  spec = P(*batch_sharding.spec[:1])
  indices = NamedSharding(batch_sharding.mesh, spec)
  slices = [
    index[0]
    for index in indices.addressable_devices_indices_map(shape).values()
  ]
  starts = [s.start or 0 for s in slices]
  stops = [num_rows if s.stop is None else s.stop for s in slices]
  rows = slice(min(starts), max(stops))
  held = {i for s, e in zip(starts, stops) for i in range(s, e)}
  assert len(held) == rows.stop - rows.start, 'rows of a process have gaps'
  return rows


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


def _profile(workdir: str, steps: tuple[int, int] | None, step: int) -> None:
  if steps is None:
    return
  if step == steps[0]:
    jax.profiler.start_trace(str(run_dir.path(workdir) / 'profile'))
  elif step == steps[1]:
    jax.profiler.stop_trace()
